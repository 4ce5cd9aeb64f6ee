"""A run that was cut and goes on ends exactly as the one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.atomic_io import write_manifest
from finetuning.errors import CheckpointError, StorageError
from finetuning.training.resume.find import find_resume_point

LORA = {
    "peft_type": "LORA",
    "peft_kwargs": {"r": 4, "lora_dropout": 0.2, "target_modules": "all-linear"},
}
FULL = {"peft_type": "NO_PEFT"}
# 24 rows in batches of 4 are 6 steps an epoch: saved inside the first pass, resumed into the second.
SAVED = {"training_args.max_steps": 8, "training_args.save_strategy": "steps", "training_args.save_steps": 3}


def cut_after_checkpoint_3(whole: Path, values: Any) -> None:
    """The output directory as a run that was killed after its first checkpoint leaves it, at another place."""
    cut = Path(values["training_args"]["output_dir"])
    cut.mkdir()
    (whole / "checkpoint-3").rename(cut / "checkpoint-3")


EPOCHS = {
    "training_args.max_steps": None,
    "training_args.num_train_epochs": 1,
    "training_args.save_strategy": "epoch",
    "training_args.eval_strategy": "epoch",
    "training_args.logging_strategy": "epoch",
    "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
}


@pytest.mark.parametrize(
    "changes",
    [{}, EPOCHS, {"data_conf.streaming": True}],
    ids=["in the middle of an epoch", "at its end", "streaming"],
)
def test_a_run_whose_steps_are_done_is_only_published(
    train: Any, sft_values: Any, read_tensors: Any, changes: Any
) -> None:
    """Killed between its last step and the publication of its model."""
    changes = {**SAVED, "training_args.lr_scheduler_type": "constant", **changes}
    values = sft_values({**changes, "run_conf.resume_from_checkpoint": "auto"})
    whole = train(values)
    first, history = read_tensors(whole.final), whole.trainer.state.log_history
    newest = find_resume_point(whole.output_dir, "auto").checkpoint
    assert newest is not None
    manifest = (newest / "manifest.json").stat().st_mtime_ns
    whole.final.rename(whole.output_dir / "aside")
    again = train(values)
    second = read_tensors(again.final)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.result.steps == whole.result.steps
    logged = [entry for entry in history if "train_runtime" not in entry]
    assert [entry for entry in again.trainer.state.log_history if "train_runtime" not in entry] == logged
    assert (newest / "manifest.json").stat().st_mtime_ns == manifest, "it is not saved again"


@pytest.mark.parametrize(
    ("method", "peft", "batching"),
    [("sft", LORA, "auto"), ("sft", LORA, "padded"), ("sft", FULL, "auto"), ("dpo", FULL, None), ("dpo", LORA, None)],
    ids=["sft lora", "sft lora padded", "sft full", "dpo full", "dpo lora"],
)
def test_a_resumed_run_is_bit_identical(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, method: str, peft: Any, batching: str | None
) -> None:
    make = sft_values if method == "sft" else dpo_values
    changes = {**SAVED, "peft_conf": peft, **({"sft_args.batching": batching} if batching else {})}
    if method == "dpo":
        changes["training_args.disable_dropout"] = True
    whole = train(make(changes))
    again = make({**changes, "run_conf.resume_from_checkpoint": "auto"})
    again["training_args"]["output_dir"] += "-cut"
    cut_after_checkpoint_3(whole.output_dir, again)
    resumed = train(again)
    assert resumed.result.steps == 8
    assert len(resumed.losses) == 8, "the log goes on with that of the checkpoint"
    assert resumed.losses == whole.losses
    first, second = read_tensors(whole.final), read_tensors(resumed.final)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_broken_newest_checkpoint_is_passed_over_with_a_note(
    train: Any, sft_values: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(sft_values({**SAVED, "training_args.max_steps": 6}))
    newest = whole.output_dir / "checkpoint-6"
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    for path in whole.final.iterdir():
        path.unlink()
    capsys.readouterr()
    changes = {**SAVED, "training_args.max_steps": 6, "run_conf.resume_from_checkpoint": True}
    resumed = train(sft_values(changes))
    displayed = capsys.readouterr().out
    assert "checkpoint-6 skipped: optimizer.pt has" in displayed
    assert "checkpoint-3" in displayed
    assert resumed.losses == whole.losses


def make_checkpoint(folder: Path, *, without: str = "", state: str | None = None) -> Path:
    folder.mkdir(parents=True)
    state = state or json.dumps({"global_step": int(folder.name.rpartition("-")[2])})
    files = {"trainer_state.json": state, "model.safetensors": "w", "optimizer.pt": "o", "scheduler.pt": "s"}
    for name, text in files.items():
        if name != without:
            (folder / name).write_text(text)
    if without != "manifest.json":
        write_manifest(folder)
    return folder


def test_the_newest_whole_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    for number in (2, 10, 9):
        make_checkpoint(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-final").mkdir()
    assert find_resume_point(tmp_path, "auto").checkpoint == tmp_path / "checkpoint-10"
    assert find_resume_point(tmp_path, True).checkpoint == tmp_path / "checkpoint-10"
    assert find_resume_point(tmp_path, False).checkpoint is None
    assert find_resume_point(tmp_path, "False").checkpoint is None
    assert find_resume_point(tmp_path, str(tmp_path / "checkpoint-2")).checkpoint == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"without": "trainer_state.json"}, "trainer_state.json is missing"),
        ({"state": '{"global_'}, "trainer_state.json is truncated"),
        ({"state": "{}"}, "trainer_state.json has no global_step"),
        ({"without": "model.safetensors"}, "it has no weights"),
        ({"without": "optimizer.pt"}, "it has no optimizer state"),
        ({"without": "scheduler.pt"}, "scheduler.pt is missing"),
    ],
)
def test_each_fault_of_a_checkpoint_is_named(tmp_path: Path, fault: dict[str, str], reason: str) -> None:
    broken = make_checkpoint(tmp_path / "checkpoint-4", **fault)
    assert find_resume_point(tmp_path, "auto").notes[0].startswith(f"checkpoint-4 skipped: {reason}")
    with pytest.raises(CheckpointError, match=f"checkpoint-4 skipped: {reason}"):
        find_resume_point(tmp_path, True)
    with pytest.raises(CheckpointError, match=r"run_conf.resume_from_checkpoint: cannot resume from"):
        find_resume_point(tmp_path, str(broken))
    whole = make_checkpoint(tmp_path / "checkpoint-3")
    assert find_resume_point(tmp_path, "auto").checkpoint == whole


@pytest.mark.parametrize("requested", ["auto", "path"])
def test_a_checkpoint_without_its_manifest_is_refused(tmp_path: Path, requested: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint-4", without="manifest.json")
    if requested == "auto":
        assert find_resume_point(tmp_path, "auto").notes == ("checkpoint-4 skipped: manifest.json is missing",)
    else:
        with pytest.raises(CheckpointError, match=r"cannot resume from .*checkpoint-4: manifest.json is missing"):
            find_resume_point(tmp_path, str(checkpoint))


@pytest.mark.parametrize(
    "name", ["model-00002-of-00002.safetensors", "scaler.pt", "rng_state.pth", "run_config.json", "stream.json"]
)
def test_a_file_that_the_manifest_does_not_list_is_not_trusted(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint-4")
    (checkpoint / "serving.json").write_text("{}")
    assert find_resume_point(tmp_path, "auto").checkpoint == checkpoint
    (checkpoint / name).write_text("x")
    assert find_resume_point(tmp_path, "auto").notes == (
        f"checkpoint-4 skipped: {name} is not listed in manifest.json",
    )


def test_true_needs_a_checkpoint_and_auto_does_not(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "none", "auto").checkpoint is None
    with pytest.raises(CheckpointError, match=r"no valid checkpoint in .* Set auto to start a new run"):
        find_resume_point(tmp_path / "none", True)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_complete_run_is_left_alone(train: Any, sft_values: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = train(sft_values(SAVED))
    record = done.output_dir / "run.json"
    record.write_text(record.read_text().replace('"completed"', '"running"'))
    going_on = sft_values({**SAVED, "run_conf.resume_from_checkpoint": "auto"})
    assert train(going_on).result.status == "already complete", "killed after it had published"
    assert [job["status"] for job in json.loads(record.read_text())["jobs"]] == ["running", "completed"]
    before = snapshot(done.output_dir)
    with pytest.raises(StorageError, match=r"holds an earlier run \(checkpoint-8, checkpoint-final\).*auto"):
        train(sft_values(SAVED))
    assert train(going_on).result.status == "already complete"
    with pytest.raises(StorageError, match=r"training_args.max_steps was 8, is 9.*another final_checkpoint_name"):
        train(sft_values({**SAVED, "training_args.max_steps": 9, "run_conf.resume_from_checkpoint": "auto"}))
    assert snapshot(done.output_dir) == before


@pytest.mark.parametrize("by_path", [False, True])
def test_a_longer_run_takes_the_place_of_a_shorter_one_and_a_fresh_one_of_both(
    by_path: bool, train: Any, sft_values: Any
) -> None:
    short = train(sft_values({**SAVED, "training_args.max_steps": 3}))
    final = snapshot(short.final)
    (short.output_dir / ".complete").touch()
    changes = {
        "training_args.max_steps": 6,
        "run_conf.resume_from_checkpoint": str(short.output_dir / "checkpoint-3") if by_path else "auto",
        "run_conf.on_existing_run": "move",
        "run_conf.allow_changed": ["training_args.max_steps"],
    }
    longer = train(sft_values({**SAVED, **changes}))
    assert len(longer.losses) == 6 and longer.losses[:3] == short.losses
    assert not (short.output_dir / ".complete").exists(), "moved before it is complete again"
    assert snapshot(short.output_dir / "earlier-1" / "checkpoint-final") == final
    longer_final = snapshot(longer.final)
    assert longer_final != final
    if by_path:
        return
    (short.output_dir / "telemetry").rename(short.output_dir / "telemetry-before")
    fresh = train(sft_values({**SAVED, "training_args.max_steps": 3, "run_conf.on_existing_run": "move"}))
    assert fresh.losses[:3] == short.losses
    moved = sorted(path.name for path in (short.output_dir / "earlier-2").iterdir())
    assert moved == ["checkpoint-3", "checkpoint-6", "checkpoint-final"]
    assert snapshot(short.output_dir / "earlier-2" / "checkpoint-final") == longer_final
    assert not (short.output_dir / "checkpoint-6").exists()


def test_a_complete_run_goes_on_under_another_name(train: Any, sft_values: Any) -> None:
    short = train(sft_values({**SAVED, "training_args.max_steps": 3, "training_args.lr_scheduler_type": "constant"}))
    changes = {
        "training_args.lr_scheduler_type": "constant",
        "training_args.max_steps": 6,
        "run_conf.resume_from_checkpoint": "auto",
        "run_conf.final_checkpoint_name": "longer",
    }
    longer = train(sft_values({**SAVED, **changes}))
    assert longer.losses[:3] == short.losses
    assert len(longer.losses) == 6
    assert (short.final / "model.safetensors").is_file()
    assert (longer.output_dir / "longer" / "model.safetensors").is_file()
    record = json.loads((longer.output_dir / "run.json").read_text())
    assert [job["status"] for job in record["jobs"]] == ["completed", "completed"]
    assert record["resumed_from"].endswith("checkpoint-3")
