"""A run goes on from a checkpoint under what it was made under, or says what differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import CheckpointError
from finetuning.training.contract import CONTRACT_NAME, differences

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
SAVED = {
    "training_args.max_steps": 6,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 3,
    "peft_conf": LORA,
}


@pytest.fixture
def resume(train: Any, sft_values: Any) -> Any:
    """A function that trains, cuts the run at checkpoint 3, and goes on with changes; gives both runs."""

    def go(changes: dict[str, Any], first: dict[str, Any] | None = None) -> tuple[Any, Any]:
        whole = train(sft_values({**SAVED, **(first or {})}))
        cut = Path(f"{whole.output_dir}-cut")
        cut.mkdir()
        (whole.output_dir / "checkpoint-3").rename(cut / "checkpoint-3")
        auto = {"training_args.output_dir": str(cut), "run_conf.resume_from_checkpoint": "auto"}
        return whole, train(sft_values({**SAVED, **(first or {}), **auto, **changes}))

    return go


def test_each_checkpoint_holds_its_contract_under_its_manifest(train: Any, sft_values: Any) -> None:
    checkpoint = train(sft_values(SAVED)).output_dir / "checkpoint-3"
    contract = json.loads((checkpoint / CONTRACT_NAME).read_text())
    assert contract["training_args.learning_rate"] == 0.01
    assert contract["plan.world_size"] == 1
    assert len(contract["data"]) == 64
    assert contract["versions.torch"]
    assert CONTRACT_NAME in json.loads((checkpoint / "manifest.json").read_text())


CURVE = {
    "training_args.learning_rate": 0.001,
    "training_args.seed": 7,
    "training_args.weight_decay": 0.1,
    "training_args.max_steps": 8,
    "batchsize_conf.total_train_batch_size": 8,
    "sft_args.train_on_completions_only": False,
    "peft_conf.peft_kwargs.lora_alpha": 99,
    "training_args.lr_scheduler_type": "cosine",
}
UNFIT = {"peft_conf.peft_kwargs.r": 8, "peft_conf": {"peft_type": "NO_PEFT"}}


def test_what_changes_the_curve_needs_leave_and_what_does_not_fit_has_none(train: Any, sft_values: Any) -> None:
    values = {**SAVED, "training_args.max_steps": 3}
    done = train(sft_values(values))
    done.final.rename(done.output_dir / "elsewhere")
    again = {**values, "run_conf.resume_from_checkpoint": "auto", "run_conf.allow_changed": ["peft_conf.peft_type"]}
    for key, value in CURVE.items():
        with pytest.raises(CheckpointError) as refused:
            train(sft_values(copy.deepcopy({**again, key: value})))
        assert [str(problem) for problem in refused.value.problems] == [
            f"{key}: checkpoint-3 was made otherwise: {key} was {_before(done, key)}, is {value}, which changes the"
            f" curve. Put it back, or name it in run_conf.allow_changed: [{key}]."
        ]
    for key, value in UNFIT.items():
        with pytest.raises(CheckpointError, match=r"checkpoint-3 does not fit.*start afresh"):
            train(sft_values(copy.deepcopy({**again, key: value})))


def _before(done: Any, key: str) -> Any:
    return json.loads((done.output_dir / "checkpoint-3" / CONTRACT_NAME).read_text()).get(key, "not set")


def test_what_leaves_the_curve_may_change(resume: Any, tmp_path: Path, write_jsonl: Any, sft_rows: Any) -> None:
    moved = write_jsonl(tmp_path / "moved.jsonl", sft_rows(24))
    changes = {
        "data_conf.training_data.datasets": [{"path": str(moved)}],
        "training_args.save_total_limit": 1,
        "training_args.save_steps": 2,
        "batchsize_conf.max_per_device_train_batch_size": 1,
    }
    whole, resumed = resume(changes)
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-5)


def test_changed_rows_need_leave(resume: Any, tmp_path: Path, write_jsonl: Any, sft_rows: Any) -> None:
    changed = write_jsonl(tmp_path / "changed.jsonl", list(reversed(sft_rows(24))))
    with pytest.raises(CheckpointError, match=r"data: checkpoint-3 was made otherwise"):
        resume({"data_conf.training_data.datasets": [{"path": str(changed)}]})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_learning_rate_that_may_change_is_really_applied(resume: Any, schedule: str) -> None:
    changes = {"training_args.learning_rate": 0.001, "run_conf.allow_changed": ["training_args.learning_rate"]}
    first = {"training_args.lr_scheduler_type": schedule}
    whole, resumed = resume(changes, first)
    rates = [
        [entry["learning_rate"] for entry in run.trainer.state.log_history if "learning_rate" in entry]
        for run in (whole, resumed)
    ]
    assert rates[1][:3] == rates[0][:3]
    assert rates[1][3:] == pytest.approx([rate / 10 for rate in rates[0][3:]])
    assert resumed.losses[:4] == whole.losses[:4]
    assert resumed.losses[4:] != whole.losses[4:]


def test_versions_are_compared_one_by_one() -> None:
    before, now = {"versions.torch": "2.0", "versions.mlflow": "3.1"}, {"versions.torch": "2.1", "versions.mlflow": "3"}
    assert [(found.key, found.effect) for found in differences(before, now)] == [
        ("versions.mlflow", "safe"),
        ("versions.torch", "curve"),
    ]
