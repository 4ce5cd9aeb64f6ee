"""A checkpoint is resumed with another number of processes: those of FSDP2 are, those of DeepSpeed are refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_job import DEVICE, ENVIRON, FSDP_SETUP, LORA, ON_GPUS, SAVED, Job, newest

CHANGES = {**SAVED, **DEVICE, "training_args.save_steps": 4, "training_args.max_steps": 12}
SIZES = (2, 4, 1) if not ON_GPUS or torch.cuda.device_count() >= 4 else (2, 1)
# The signal of a scheduler, at a step that saves.
STOP = """
import signal
from finetuning.training.signals import StopOnSignal
_end = StopOnSignal.on_step_end
def stop(self, args, state, control, **kwargs):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
    return _end(self, args, state, control, **kwargs)
StopOnSignal.on_step_end = stop
"""


@pytest.fixture
def run(sft_values: Any, write_config: Any, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that runs a job with so many processes, up to a step."""
    jobs: list[Job] = []

    def start(preset: str, processes: int, stop: int, peft: Any, *options: str) -> Job:
        config = write_config(sft_values({**CHANGES, "peft_conf": peft}))
        before = (FSDP_SETUP if preset == "fsdp2" else "") + STOP.format(step=stop)
        launch = ["--preset", preset, "--nproc", str(processes), *options]
        jobs.append(Job(tmp_path, config, launch, before, environ=ENVIRON))
        jobs[-1].wait()
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.mark.parametrize("peft", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_a_checkpoint_of_fsdp2_is_resumed_with_any_number_of_processes(
    run: Any,
    train: Any,
    sft_values: Any,
    losses: Any,
    read_tensors: Any,
    tmp_path: Path,
    peft: Any,
    record_property: Any,
) -> None:
    out, job = tmp_path / "out", None
    for processes, stop in zip(SIZES, (4, 8, 100) if len(SIZES) == 3 else (4, 100), strict=True):
        job = run("fsdp2", processes, stop, peft)
        assert job.process.returncode == (0 if processes == 1 else 128 + signal.SIGTERM), job.output
        if processes > 1:
            shards = out / f"checkpoint-{newest(out)}" / "pytorch_model_fsdp_0"
            assert len(list(shards.glob("*.distcp"))) == processes, "each process writes its own"
    assert f"plan.world_size was {SIZES[-2]}, is 1" in job.output
    alone = train(sft_values({**CHANGES, "peft_conf": peft, "training_args.output_dir": str(tmp_path / "alone")}))
    expected, logged = losses(alone.output_dir), losses(out)
    assert logged.keys() == expected.keys()
    record_property("largest difference", f"{max(abs(logged[key] - expected[key]) for key in expected):.1e}")
    assert logged == pytest.approx(expected, abs=1e-4)
    saved, whole = read_tensors(out / "checkpoint-final"), read_tensors(alone.final)
    assert saved.keys() == whole.keys()
    assert all(torch.allclose(saved[name], whole[name], atol=1e-3) for name in whole)


@pytest.mark.parametrize("preset", ["zero2", "zero3"])
def test_a_checkpoint_of_deepspeed_is_refused_with_another_number_of_processes(
    run: Any, run_record: Any, tmp_path: Path, preset: str
) -> None:
    pytest.importorskip("deepspeed", reason="see make test-cluster")
    full = {"peft_type": "NO_PEFT"}
    assert run(preset, 2, 4, full).process.returncode == 128 + signal.SIGTERM
    job = run(preset, 4 if SIZES[1] == 4 else 1, 100, full, "--max-restarts", "2")
    assert job.process.returncode == 1, job.output
    assert "checkpoint-4 holds the optimizer states of DeepSpeed for 2 processes, and this job has" in job.output
    assert "restart 1" not in job.output
    job = run("ddp", 2, 100, full)
    assert job.process.returncode == 1, job.output
    assert "checkpoint-4 was saved under DeepSpeed, and this job runs without" in job.output
    assert json.loads((tmp_path / "out" / "run.json").read_text())["error"]
