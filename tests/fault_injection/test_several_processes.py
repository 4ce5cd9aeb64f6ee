"""Jobs of several processes, of which one runs out of memory, hangs, or is gone the next time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
BATCH = {"batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 4}}
SAVED = {"training_args.save_strategy": "steps", "training_args.save_steps": 3, "training_args.max_steps": 6}

SMALL = """
from dataclasses import replace
import torch
from finetuning.algorithms import ALGORITHMS
from finetuning.trainer.oom_retry import num_rows

def build(parts):
    trainer = method.build_trainer(parts)

    class Small(type(trainer)):
        \"\"\"On a device that holds MOST rows from the second step on, and fails in the PASS pass.\"\"\"

        def compute_loss(self, model, inputs, *args, **kwargs):
            full = num_rows(inputs) > MOST and self.state.global_step >= 1
            if full and "PASS" == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if full:
                first = next(weight for weight in model.parameters() if weight.requires_grad)
                self.handle = first.register_hook(self.fail)
            return loss

        def fail(self, gradient):
            self.handle.remove()
            raise torch.OutOfMemoryError("CUDA out of memory in the backward pass.")

    trainer.__class__ = Small
    return trainer

method = ALGORITHMS["sft"]
ALGORITHMS["sft"] = replace(method, build_trainer=build)
"""


@pytest.fixture
def run(fork_server: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> Callable[..., Any]:
    """A function that runs a job to its end, one process for each code that it is to run first: its directory, what
    the main process printed, and the exit codes."""

    def job(changes: Any, befores: list[str], out: Path | None = None) -> tuple[Path, str, list[int]]:
        out = out or tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        config = write_config(sft_values({**changes, "training_args.output_dir": str(out)}), f"{out.name}.yaml")
        if len(befores) == 1:
            processes = [fork_server.start(["sft", config], before=befores[0])]
        else:
            processes = fork_server.start_all(["sft", config], befores)
        codes = [process.wait() for process in processes]
        output = "".join(process.output for process in processes)
        assert "find_unused_parameters" not in output, "nothing is looked for that cannot be"
        return out, output, codes

    return job


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_process_that_runs_out_of_memory_goes_on_in_smaller_pieces(
    run: Any, logged_losses: Any, where: str
) -> None:
    changes = {**BATCH, "peft_conf": LORA, "training_args.max_steps": 4}
    changes["batchsize_conf"] = {"total_train_batch_size": 8, "max_per_device_train_batch_size": 2}
    enough, output, codes = run(changes, [""])
    assert codes == [0], output
    small, output, codes = run(changes, ["", SMALL.replace("MOST", "1").replace("PASS", where)])
    assert codes == [0, 0], output
    assert logged_losses(small) == pytest.approx(logged_losses(enough), abs=2e-5)
    [division] = json.loads((small / "run.json").read_text())["memory"]["oom_retries"]
    assert division.startswith("process 1, step 2: out of memory at micro-batch 2; retrying with 1")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_job_goes_on_with_another_number_of_processes(run: Any, logged_losses: Any, before: int, after: int) -> None:
    changes = {**SAVED, "peft_conf": LORA, "run_conf.resume_from_checkpoint": "auto"}
    whole, output, codes = run(changes, [""] * before)
    assert codes == [0] * before, output
    cut = whole.with_name(f"{whole.name}-cut")
    cut.mkdir()
    (whole / "checkpoint-3").rename(cut / "checkpoint-3")
    _, output, codes = run(changes, [""] * after, cut)
    assert codes == [0] * after, output
    assert f"plan.world_size was {before}, is {after}" in output
    assert logged_losses(cut) == pytest.approx(logged_losses(whole)[3:], abs=1e-4)
    second = {"batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 2}}
    (cut / "checkpoint-final").rename(cut / "aside")
    _, output, codes = run(changes | second, [""] * after, cut)
    assert codes == [1] * after
    assert "checkpoint-6 was saved with a different config: batchsize_conf.total_train_batch_size was 4, is 8" in output
    assert "allow_changed" in output and "Traceback" not in output


def test_a_process_that_is_gone_ends_the_job_and_the_next_start_goes_on(
    fork_server: Any, run: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    changes = {**SAVED, "peft_conf": LORA, "run_conf.resume_from_checkpoint": "auto"}
    out = tmp_path / "out"
    config = write_config(sft_values({**changes, "training_args.max_steps": 100_000}))
    main, second = fork_server.start_all(["sft", config], ["", ""])
    assert main.wait_for((out / "checkpoint-6").exists), main.output
    assert second.kill() == -signal.SIGKILL
    assert main.wait() == 203, main.output
    assert "the connection to another process of the job was lost" in main.output
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    saved = max(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    longer = {**changes, "training_args.max_steps": saved + 3, "run_conf.allow_changed": ["training_args.max_steps"]}
    _, output, codes = run(longer, ["", ""], out)
    assert codes == [0, 0], output
    assert f"checkpoint-{saved}" in output


BROKEN = """
from finetuning.training.telemetry import TelemetrySession

def broken(self, step):
    raise RuntimeError("no folder to look at")

TelemetrySession._folder = broken
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_what_goes_wrong_in_telemetry_costs_no_step(run: Any, logged_losses: Any, rank: int) -> None:
    changes = {**SAVED, "peft_conf": LORA, "training_args.max_steps": 3, "telemetry": {"ranks": "all"}}
    befores = ["", ""]
    befores[rank] = BROKEN
    out, output, codes = run(changes, befores)
    assert codes == [0, 0], output
    assert len(logged_losses(out)) == 3
    assert (out / "checkpoint-final").is_dir()
    if rank == 0:
        assert output.count("telemetry is incomplete, training continues: end: RuntimeError: no folder") == 1
        faults = json.loads((out / "run.json").read_text())["telemetry"]["faults"]
        assert faults == ["end: RuntimeError: no folder to look at"]


def test_a_process_that_hangs_is_named_with_what_it_does(
    fork_server: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    changes = {"peft_conf": LORA, "training_args.max_steps": 100_000, "run_conf.name_hung_after": 3}
    main, second = fork_server.start_all(["sft", write_config(sft_values(changes))], ["", ""])
    assert main.wait_for(lambda: '"step": 3' in _log(tmp_path)), main.output
    second.send_signal(signal.SIGSTOP)
    assert second.wait_for(lambda: second.state == "T")
    beat = json.loads((tmp_path / "out" / "heartbeat" / "rank-1.json").read_text())
    named = f"rank 1 on host {os.uname().nodename} hangs: {beat['phase']} of step {beat['step']} for"
    assert main.wait_for(lambda: named in main.output), main.output
    second.send_signal(signal.SIGCONT)
    main.send_signal(signal.SIGUSR1)
    assert (main.wait(), second.wait()) == (138, 138), "it goes on, and what is asked of one is done by all"
    assert "signal 10 at step" in main.output


def _log(folder: Path) -> str:
    log = folder / "out" / "training_logs.jsonl"
    return log.read_text(encoding="utf-8") if log.exists() else ""
