"""A run goes on from a checkpoint under what it was made under, or says what differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.atomic_io import MANIFEST, write_manifest
from finetuning.errors import CheckpointError
from finetuning.training.resume.config_changes import RUN_CONFIG_NAME

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


def test_each_checkpoint_holds_its_run_config_under_its_manifest(train: Any, sft_values: Any) -> None:
    checkpoint = train(sft_values(SAVED)).output_dir / "checkpoint-3"
    run_config = json.loads((checkpoint / RUN_CONFIG_NAME).read_text())
    assert run_config["training_args.learning_rate"] == 0.01
    assert run_config["plan.world_size"] == 1
    assert len(run_config["data"]) == 64
    assert run_config["versions.torch"]
    assert RUN_CONFIG_NAME in json.loads((checkpoint / "manifest.json").read_text())


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
            f"{key}: checkpoint-3 was saved with a different config: {key} was {_before(done, key)}, is {value}, which"
            " changes the loss trajectory. Restore it, or allow the change by"
            f" run_conf.allow_changed: [{key}]."
        ]
    for key, value in UNFIT.items():
        with pytest.raises(CheckpointError, match=r"checkpoint-3 is incompatible.*Start a new one"):
            train(sft_values(copy.deepcopy({**again, key: value})))


def _before(done: Any, key: str) -> Any:
    return json.loads((done.output_dir / "checkpoint-3" / RUN_CONFIG_NAME).read_text()).get(key, "not set")


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
    with pytest.raises(CheckpointError, match=r"data: checkpoint-3 was saved with a different config"):
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


@pytest.fixture
def resume_across(train: Any, sft_values: Any) -> Any:
    """A function that saves checkpoint 3, changes its contract in place, and resumes from it."""

    def go(edit: Any, changes: dict[str, Any] | None = None) -> Any:
        values = {**SAVED, "training_args.max_steps": 3}
        checkpoint = train(sft_values(values)).output_dir / "checkpoint-3"
        (checkpoint.parent / "checkpoint-final").rename(checkpoint.parent / "elsewhere")
        run_config = json.loads((checkpoint / RUN_CONFIG_NAME).read_text())
        edit(run_config)
        (checkpoint / RUN_CONFIG_NAME).write_text(json.dumps(run_config))
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint)
        return train(
            sft_values(copy.deepcopy({**values, "run_conf.resume_from_checkpoint": "auto", **(changes or {})}))
        )

    return go


NEW_KEYS = (
    "sft_args.packing",
    "sft_args.train_on",
    "training_args.warmup_steps",
    "overrides.lr_multiplier",
    "overrides.lr_batch_size_scaling",
    "overrides.loraplus_lr_ratio",
    "overrides.part_learning_rates",
    "quant_conf.quantization_type",
    "data_conf.chat_template",
    "data_conf.padding_side",
    "peft_conf.task_type",
)


def test_a_checkpoint_of_an_engine_with_fewer_keys_is_resumed_where_the_new_ones_are_at_their_defaults(
    resume_across: Any,
) -> None:
    def take_out(run_config: dict[str, Any]) -> None:
        for key in NEW_KEYS:
            del run_config[key]
        for dataset in run_config["data_conf.training_data.datasets"]:
            del dataset["add_eos_token"], dataset["handlers"]

    assert resume_across(take_out).final.is_dir()


@pytest.mark.parametrize(
    ("key", "was", "changes"),
    [
        ("sft_args.packing", "False", {"sft_args.packing": True}),
        ("overrides.loraplus_lr_ratio", "not set", {"overrides": {"loraplus_lr_ratio": 16}}),
        # What passes through: there, no key means the default of the library that was installed then.
        ("training_args.neftune_noise_alpha", "not set", {"training_args.neftune_noise_alpha": 5.0}),
        ("peft_conf.peft_kwargs.lora_alpha", "not set", {"peft_conf.peft_kwargs.lora_alpha": 8}),
    ],
    ids=["declared", "not set by default", "the trainer's", "the adapter's"],
)
def test_a_key_that_the_checkpoint_does_not_know_needs_leave_where_it_is_set(
    resume_across: Any, key: str, was: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError) as refused:
        resume_across(lambda run_config: run_config.pop(key, None), changes)
    assert [str(problem).partition(", is ")[0] for problem in refused.value.problems] == [
        f"{key}: checkpoint-3 was saved with a different config: {key} was {was}"
    ]


def test_a_dataset_of_a_checkpoint_with_fewer_keys_is_reported_by_the_key_that_differs(
    resume_across: Any, sft_values: Any
) -> None:
    def take_out(run_config: dict[str, Any]) -> None:
        del run_config["data_conf.training_data.datasets"][0]["max_rows"]

    (dataset,) = sft_values()["data_conf"]["training_data"]["datasets"]
    rows = "data_conf.training_data.datasets.0.max_rows"
    with pytest.raises(CheckpointError, match=rf"{rows} was not set, is 20.*allow_changed: \[{rows}\]"):
        resume_across(take_out, {"data_conf.training_data.datasets": [{**dataset, "max_rows": 20}]})


def test_a_key_that_only_the_checkpoint_has_is_reported_and_needs_permission(resume_across: Any) -> None:
    def add(run_config: dict[str, Any]) -> None:
        run_config |= {"sft_args.forgotten": 3, "tracking.forgotten": "x"}

    unknown = "sft_args.forgotten was 3, which this version of finetuning does not know"
    with pytest.raises(CheckpointError, match=rf"{unknown}, which may.*allow_changed") as refused:
        resume_across(add)
    assert len(refused.value.problems) == 1


def test_what_only_the_checkpoint_knows_is_left_out_where_it_may_be(resume_across: Any, capsys: Any) -> None:
    def add(run_config: dict[str, Any]) -> None:
        run_config |= {"sft_args.forgotten": 3, "guard.forgotten": "x"}

    assert resume_across(add, {"run_conf.allow_changed": ["sft_args.forgotten"]}).final.is_dir()
    message = capsys.readouterr().out
    unknown = "which this version of finetuning does not know"
    assert f"sft_args.forgotten was 3, {unknown}: allowed, and ignored from this checkpoint on" in message
    assert f"guard.forgotten was x, {unknown}: it does not affect the loss trajectory" in message


def test_versions_are_compared_one_by_one(resume_across: Any) -> None:
    def age(run_config: dict[str, Any]) -> None:
        run_config |= {"versions.torch": "2.0", "versions.mlflow": "3.0"}

    with pytest.raises(CheckpointError, match=r"versions.torch was 2.0, is") as refused:
        resume_across(age)
    assert [problem.location.key for problem in refused.value.problems] == ["versions.torch"]


def test_a_checkpoint_with_the_old_file_name_of_its_run_config_is_compared(train: Any, sft_values: Any) -> None:
    values = {**SAVED, "training_args.max_steps": 3}
    checkpoint = train(sft_values(values)).output_dir / "checkpoint-3"
    (checkpoint.parent / "checkpoint-final").rename(checkpoint.parent / "elsewhere")
    (checkpoint / RUN_CONFIG_NAME).rename(checkpoint / "contract.json")
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    changed = {**values, "training_args.weight_decay": 0.5, "run_conf.resume_from_checkpoint": "auto"}
    with pytest.raises(CheckpointError, match=r"training_args.weight_decay was .*, is 0\.5"):
        train(sft_values(copy.deepcopy(changed)))
