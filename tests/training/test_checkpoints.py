"""What a run leaves behind: whole checkpoints, the best of them, nothing that is not finite."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from finetuning.algorithms import ALGORITHMS
from finetuning.atomic_io import find_manifest_mismatch
from finetuning.config.sections.experiment import SFTExperiment
from finetuning.errors import DataError, GuardStopped, StorageError
from finetuning.trainer.mixin import TrainingLoopMixin
from finetuning.training import output_dir
from finetuning.training.final_model import copy_to_save_model_dir
from finetuning.training.output_dir import check_free_space, lock_output_dir

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
EACH_STEP = {"training_args.save_strategy": "steps", "training_args.save_steps": 1}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def all_finite(folder: Path, read_tensors: Any) -> bool:
    result = [tensors for path in folder.rglob("*.safetensors") for tensors in read_tensors(path.parent).values()]
    return bool(result) and all(torch.isfinite(tensor).all() for tensor in result)


@pytest.mark.parametrize("peft", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_checkpoints_are_whole_readable_and_free_of_pickles(train: Any, sft_values: Any, peft: Any) -> None:
    run = train(sft_values({**EACH_STEP, "peft_conf": peft, "training_args.save_total_limit": 2}))
    assert [name for name in names(run.output_dir) if name.startswith(("checkpoint", "."))] == [
        ".finetuning.lock",
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-final",
    ]
    for path in run.output_dir.rglob("*"):
        assert path.name != "training_args.bin"
        if path.is_file() and path.parent != run.output_dir:
            assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
    for number in (2, 3):
        checkpoint = run.output_dir / f"checkpoint-{number}"
        assert "manifest.json" in names(checkpoint)
        assert find_manifest_mismatch(checkpoint) is None
    settings = run.final / ("adapter_config.json" if peft is LORA else "config.json")
    assert "sdpa_varlen" not in settings.read_text()


@pytest.mark.parametrize("strategy", ["best", "steps"])
def test_the_best_model_is_kept_and_is_the_result(
    train: Any, sft_values: Any, read_tensors: Any, strategy: str
) -> None:
    changes = {
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 1,
        "training_args.save_strategy": strategy,
        "training_args.save_steps": 1,
        "training_args.save_total_limit": 2,
        "training_args.metric_for_best_model": "eval_loss",
        "training_args.load_best_model_at_end": True,
        # The loss falls, so that by this measure the first checkpoint is the best.
        "training_args.greater_is_better": True,
        "peft_conf": LORA,
    }
    run = train(sft_values(changes))
    assert run.trainer.state.best_global_step == 1
    assert ("checkpoint-3" in names(run.output_dir)) == (strategy == "steps")
    kept, final = read_tensors(run.output_dir / "checkpoint-1"), read_tensors(run.final)
    assert all(torch.equal(kept[name], final[name]) for name in final)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_that_diverges_stops_and_leaves_its_last_good_checkpoint(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, method: str
) -> None:
    make = sft_values if method == "sft" else dpo_values
    changes = {
        **EACH_STEP,
        "training_args.save_total_limit": 1,
        "training_args.max_steps": 6,
        "training_args.learning_rate": 1e30,
        "training_args.lr_scheduler_type": "constant_with_warmup",
        "training_args.warmup_steps": 1,
    }
    with pytest.raises(GuardStopped, match="not finite") as stopped:
        train(make(changes))
    assert stopped.value.exit_code == 3
    out = Path(make()["training_args"]["output_dir"])
    assert not (out / "checkpoint-final").exists()
    assert [name for name in names(out) if name.startswith("checkpoint-")] != []
    assert all_finite(out, read_tensors)
    assert not list(out.glob(".*.partial"))
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "stopped by a guard"
    assert "not finite" in record["error"]


def with_callback(callback: type) -> Any:
    """SFT with a callback that breaks something."""
    sft = ALGORITHMS["sft"]

    def build(inputs: Any) -> Any:
        trainer = sft.build_trainer(inputs)
        trainer.add_callback(callback())
        return trainer

    return replace(sft, build_trainer=build)


def test_what_is_said_of_a_loss_that_is_not_finite_is_true(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    class BreaksAfterFirstStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            if state.global_step == 1:
                with torch.no_grad():
                    model.model.norm.weight[0] = float("nan")

    with pytest.raises(GuardStopped) as stopped:
        train(sft_values(), with_callback(BreaksAfterFirstStep))
    (problem,) = stopped.value.problems
    assert problem.message == (
        "step 2: loss nan is not finite, and model.norm.weight holds values that are not finite since an earlier step."
        " No checkpoint was saved before"
    )
    assert problem.hint == "Lower the learning rate."

    out = sft_values()["training_args"]["output_dir"]
    changes = {**EACH_STEP, "training_args.output_dir": f"{out}-2", "training_args.max_steps": 3}
    step = Trainer.training_step
    calls: list[int] = []

    def not_finite_in_the_second_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return step(self, *args, **kwargs) * (float("inf") if len(calls) > bad_after else 1.0)

    monkeypatch.setattr(Trainer, "training_step", not_finite_in_the_second_step)
    bad_after = 2  # micro-batches
    with pytest.raises(GuardStopped) as stopped:
        train(sft_values(changes))
    (problem,) = stopped.value.problems
    assert problem.message == (
        "step 2: loss inf is not finite. This step did not change the weights. checkpoint-1 was saved before, with"
        " finite weights"
    )
    assert problem.hint == "Lower the learning rate, or check the rows of this step."

    calls.clear()
    bad_after = 0
    with pytest.raises(GuardStopped) as stopped:
        train(sft_values({"training_args.output_dir": f"{out}-3"}))
    (problem,) = stopped.value.problems
    assert problem.message.startswith("step 1: loss inf is not finite. This step did not change the weights. No check")
    assert problem.hint == (
        "No step was taken before, so the learning rate is not the reason: check the rows of this step and the base"
        " model."
    )


@pytest.mark.parametrize(
    ("fp16", "dtype", "said"),
    [
        (False, torch.float16, "Set run_conf.model_args.dtype: float32, as float16 weights become NaN in training. "),
        (True, torch.float32, "Use training_args.bf16 instead of fp16. "),
        (False, torch.bfloat16, ""),
    ],
)
def test_a_dtype_is_blamed_only_if_it_is_the_runs(fp16: bool, dtype: torch.dtype, said: str) -> None:
    trainer: Any = SimpleNamespace(args=SimpleNamespace(fp16=fp16), model=torch.nn.Linear(2, 2, dtype=dtype))
    assert TrainingLoopMixin._describe_dtype_risk(trainer) == said


def test_weights_that_an_optimizer_broke_are_not_saved(train: Any, sft_values: Any, read_tensors: Any) -> None:
    """Gradients were finite, the step was not: neither the checkpoint nor the fine-tuned model may hold it."""
    sft = ALGORITHMS["sft"]

    def build(parts: Any) -> Any:
        from transformers import TrainerCallback

        class Breaks(TrainerCallback):
            def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
                if state.global_step == 1:
                    with torch.no_grad():
                        next(model.parameters()).view(-1)[0] = float("inf")

        trainer = sft.build_trainer(parts)
        trainer.add_callback(Breaks())
        return trainer

    broken = replace(sft, build_trainer=build)
    with pytest.raises(GuardStopped, match="step 2: a weight is not finite"):
        train(sft_values({**EACH_STEP, "training_args.max_steps": 2}), broken)
    out = Path(sft_values()["training_args"]["output_dir"])
    assert [name for name in names(out) if name.startswith("checkpoint")] == ["checkpoint-1"]
    with pytest.raises(GuardStopped, match=r"checkpoint-final: the saved model failed.*It was not published"):
        train(sft_values({"training_args.max_steps": 2, "training_args.output_dir": f"{out}-unsaved"}), broken)
    assert not [name for name in names(Path(f"{out}-unsaved")) if "checkpoint" in name]


def test_a_run_that_never_began_leaves_nothing(train: Any, sft_values: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    bad = {"data_conf.training_data.datasets": [{"path": str(tmp_path / "bad.jsonl")}]}
    with pytest.raises(DataError):
        train(sft_values(bad))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError):
        train(sft_values(bad))
    assert (tmp_path / "out" / "run.json").is_file(), "a directory that was there is not removed"


def test_a_directory_is_claimed_by_one_run(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-7.partial").mkdir()
    with lock_output_dir(tmp_path):
        assert not (tmp_path / ".checkpoint-7.partial").exists()
        with (
            pytest.raises(StorageError, match=r"another run \(process \d+ on .*\) is using"),
            lock_output_dir(tmp_path),
        ):
            pass
    with lock_output_dir(tmp_path):
        pass


@pytest.mark.parametrize("exists", [True, False])
def test_a_copy_of_the_final_model_that_is_not_equal_is_an_error(
    sft_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """An earlier model in the folder is not replaced by half of another."""

    def copy_all_but_one_byte(source: Path, target: Path) -> None:
        content = Path(source).read_bytes()
        change = int(Path(source).name == "config.json")  # the last one
        Path(target).write_bytes(content[:-1] + bytes([content[-1] ^ change]))

    names = ("model.safetensors", "config.json")
    target = tmp_path / "served"
    if exists:
        target.mkdir()
        for name in names:
            (target / name).write_text(f"old {name}")
    monkeypatch.setattr("shutil.copyfile", copy_all_but_one_byte)
    experiment = SFTExperiment.model_validate(sft_values({"save_model_dir": str(target)}))
    final = Path(experiment.training_args.output_dir) / "checkpoint-final"
    final.mkdir(parents=True)
    for name in names:
        (final / name).write_text(f"new {name}")
    with pytest.raises(StorageError, match=r"config\.json.* is not what was copied to it"):
        copy_to_save_model_dir(experiment)
    left = {path.name: path.read_text() for path in target.iterdir()} if target.exists() else {}
    assert left == ({name: f"old {name}" for name in names} if exists else {})
    assert not (Path(experiment.training_args.output_dir) / ".complete").exists()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:  # as on Lustre without the mount option `flock`
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(output_dir, "_RENEW_S", 0.05)
    monkeypatch.setattr(output_dir, "_STALE_S", 0.4)


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_is_not_another_run(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_output_dir(tmp_path):
            holder = (tmp_path / ".finetuning.lock").read_text()
            assert holder.startswith(f"process {os.getpid()} on {os.uname().nodename} since 20")
        assert (tmp_path / ".finetuning.lock").read_text() == ""


@pytest.mark.usefixtures("no_locks")
def test_a_lease_on_this_machine_is_that_of_a_run_while_its_process_runs(tmp_path: Path) -> None:
    lease = tmp_path / ".finetuning.lock"
    holder = f"process {os.getppid()} on {os.uname().nodename} since 2026-01-01T00:00:00Z"
    lease.write_text(holder)
    with pytest.raises(StorageError, match=f"another run \\({holder}\\) is using"), lock_output_dir(tmp_path):
        pass
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    lease.write_text(f"process {ended} on {os.uname().nodename} since 2026-01-01T00:00:00Z")
    with lock_output_dir(tmp_path):
        pass


@pytest.mark.parametrize("is_locked", [False, True], ids=["no locks", "locked"])
def test_a_lease_of_another_machine_is_taken_over_once_it_is_not_renewed(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_locked: bool
) -> None:
    monkeypatch.setattr(output_dir, "try_lock", lambda descriptor: False if is_locked else None)
    lease = tmp_path / ".finetuning.lock"
    holder = "process 7 on another-machine since 2026-01-01T00:00:00Z"
    lease.write_text(holder)
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(0.02):
            os.utime(lease)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(StorageError, match="another run"), lock_output_dir(tmp_path):
            pass
    finally:
        is_over.set()
        thread.join()
    assert lease.read_text() == holder, "a lease that is renewed is not touched"
    with lock_output_dir(tmp_path):
        assert f"process {os.getpid()} " in lease.read_text()
    assert f"was in use by {holder}, which has not been heard of" in caplog.text


@pytest.mark.usefixtures("no_locks")
def test_a_run_whose_lease_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(output_dir.os, "_exit", codes.append)
    with lock_output_dir(tmp_path):
        (tmp_path / ".finetuning.lock").write_text("process 7 on another-machine since 2026-01-01T00:00:00Z")
        deadline = time.monotonic() + 10
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert codes[0] == 203


def test_a_full_disk_is_reported_before_anything_is_loaded(
    sft_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.plan.memory_estimate import estimate_memory

    values = sft_values({"training_args.save_strategy": "steps"})
    experiment = validate(ConfigDocument(values), SFTExperiment).experiment
    memory = estimate_memory(experiment)
    Path(experiment.training_args.output_dir).mkdir()
    check_free_space(experiment, memory)
    usage = output_dir.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_dir.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"1000 B free; a checkpoint and the final model need about .* MiB"):
        check_free_space(experiment, memory)
