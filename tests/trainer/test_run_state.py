"""The state of a run, apart from model and optimizer, is saved, restored exactly, and verified."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetuning.algorithms import ALGORITHMS
from finetuning.atomic_io import write_manifest
from finetuning.callbacks.controller.callback import make_controllers
from finetuning.callbacks.controller.metrics import Event, Metric
from finetuning.callbacks.controller.operations import Operation
from finetuning.callbacks.loss_guard import LossGuardCallback
from finetuning.config.sections.controller import LossGuardConfig, TrainerController
from finetuning.errors import CheckpointError, GuardStopped
from finetuning.trainer import loaded_state
from finetuning.trainer.loaded_state import RunStateMixin

FULL = {"peft_type": "NO_PEFT"}
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
SAVED = {
    "training_args.max_steps": 8,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 3,
    "training_args.logging_steps": 4,
}
# Speeds and times differ between any two runs, and `train_loss` is the mean over the steps of a job.
NOT_COMPARED = ("runtime", "per_second", "step_time", "flos", "train_loss")


def history(run: Any) -> list[dict[str, float]]:
    """The log of a run without what differs between jobs."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in NOT_COMPARED)}
        for entry in run.trainer.state.log_history
    ]


@pytest.fixture
def interrupt(train: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A function that trains to the end, and returns that run and the values of one that resumes in its middle."""

    def run(make: Any, changes: dict[str, Any], algorithm: Any = None, step: int = 3) -> tuple[Any, dict[str, Any]]:
        whole = train(make(copy.deepcopy(changes)), algorithm)
        values = make({**copy.deepcopy(changes), "run_conf.resume_from_checkpoint": "auto"})
        values["training_args"]["output_dir"] += "-resumed"
        folder = Path(values["training_args"]["output_dir"])
        folder.mkdir()
        shutil.copytree(whole.output_dir / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        return whole, values

    return run


def assert_equal_runs(whole: Any, resumed: Any, read_tensors: Any) -> None:
    assert history(resumed) == history(whole)
    first, second = read_tensors(whole.final), read_tensors(resumed.final)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training_args.train_sampling_strategy": "group_by_length"},
        {"training_args.train_sampling_strategy": "sequential"},
        {"training_args.data_seed": 3, "training_args.dataloader_num_workers": 1},
        {"training_args.neftune_noise_alpha": 5},
    ],
    ids=["random", "by length", "sequential", "workers", "neftune"],
)
def test_logs_between_two_checkpoints_are_those_of_an_uninterrupted_run(
    train: Any, sft_values: Any, read_tensors: Any, interrupt: Any, changes: dict[str, Any]
) -> None:
    whole, values = interrupt(sft_values, {**SAVED, "peft_conf": LORA, **changes})
    assert_equal_runs(whole, train(values), read_tensors)


def test_the_training_loss_is_the_mean_over_the_steps_of_the_job(train: Any, sft_values: Any, interrupt: Any) -> None:
    whole, values = interrupt(sft_values, {**SAVED, "training_args.logging_steps": 1})
    values["training_args"]["logging_steps"] = 4
    losses = [entry["train_loss"] for entry in train(values).trainer.state.log_history if "train_loss" in entry]
    assert losses == [pytest.approx(sum(whole.losses[3:]) / 5, rel=1e-5)]


def test_the_metrics_of_preferences_are_those_of_an_uninterrupted_run(
    train: Any, dpo_values: Any, read_tensors: Any, interrupt: Any
) -> None:
    whole, values = interrupt(dpo_values, {**SAVED, "peft_conf": LORA})
    assert "rewards/margins" in history(whole)[0]
    assert_equal_runs(whole, train(values), read_tensors)


def test_metrics_that_are_not_restored_stop_the_run(
    train: Any, dpo_values: Any, interrupt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, values = interrupt(dpo_values, {**SAVED, "peft_conf": LORA})
    load = RunStateMixin.load_run_state

    def load_half(self: Any, state: dict[str, Any]) -> None:
        changed = copy.deepcopy(state)
        changed["log"]["metrics"]["rewards/margins"].pop()
        load(self, changed)

    monkeypatch.setattr(RunStateMixin, "load_run_state", load_half)
    with pytest.raises(CheckpointError, match=r"was not loaded as it was saved: run_state\.pt\[log\]\[metrics\]"):
        train(values)


def test_a_checkpoint_without_run_state_is_a_warning(
    train: Any, sft_values: Any, interrupt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, values = interrupt(sft_values, {**SAVED, "peft_conf": LORA})
    checkpoint = Path(values["training_args"]["output_dir"]) / "checkpoint-3"
    (checkpoint / "run_state.pt").unlink()
    write_manifest(checkpoint)
    assert train(values).result.steps == 8
    assert "has no run_state.pt: metrics since the last log and the state of the trainer controller" in caplog.text


SYNC = {
    "peft_conf": FULL,
    "training_args.sync_ref_model": True,
    "training_args.ref_model_sync_steps": 2,
    "training_args.ref_model_mixup_alpha": 0.5,
}


def test_a_moving_reference_resumes_where_it_was(
    train: Any, dpo_values: Any, read_tensors: Any, interrupt: Any
) -> None:
    whole, values = interrupt(dpo_values, {**SAVED, **SYNC})
    resumed = train(values)
    assert_equal_runs(whole, resumed, read_tensors)
    references = [dict(run.trainer.ref_model.named_parameters()) for run in (whole, resumed)]
    assert all(torch.equal(weight, references[1][name]) for name, weight in references[0].items())
    initial = read_tensors(Path(values["run_conf"]["model"]))
    assert any(not torch.equal(references[0][name], initial[name]) for name in initial), "the reference has moved"


def test_a_reference_that_is_missing_or_loads_other_weights_stops_the_run(
    train: Any, dpo_values: Any, interrupt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, values = interrupt(dpo_values, {**SAVED, **SYNC})
    checkpoint = Path(values["training_args"]["output_dir"]) / "checkpoint-3"
    copy_, load = torch.Tensor.copy_, RunStateMixin._load_reference

    def load_other_weights(self: Any, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.nn.Parameter, "copy_", lambda self, source: copy_(self, source).add_(1e-3), raising=False
            )
            load(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(RunStateMixin, "_load_reference", load_other_weights)
        with pytest.raises(CheckpointError, match=r"its reference model cannot be loaded \(.* was not loaded as"):
            train(values)
    (checkpoint / "reference" / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"reference/weights\.safetensors is missing"):
        train({**values, "run_conf": {**values["run_conf"], "resume_from_checkpoint": str(checkpoint)}})
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"has no reference/weights\.safetensors: the reference model moves"):
        train(values)


def test_a_reference_that_is_not_written_as_it_is_in_memory_stops_the_run(
    train: Any, dpo_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_other_weights(tensors: dict[str, torch.Tensor], file: Path) -> None:
        name = sorted(tensors)[0]
        save_file(tensors | {name: torch.zeros_like(tensors[name])}, file)

    monkeypatch.setattr(loaded_state, "save_file", save_other_weights)
    with pytest.raises(GuardStopped, match=r"weights\.safetensors: 1 of 20 tensors differ from those in memory"):
        train(dpo_values({**SAVED, **SYNC}))


def test_a_reference_that_does_not_move_is_not_saved(train: Any, dpo_values: Any) -> None:
    run = train(dpo_values({**SAVED, "peft_conf": FULL}))
    assert not (run.output_dir / "checkpoint-3" / "reference").exists()


RULES = {
    "controller_metrics": [{"name": "validation", "class": "EvalMetrics"}, {"name": "log", "class": "Loss"}],
    "controllers": [
        # The validation of step 2 is the only one: a resumed run has its value from the checkpoint.
        {
            "name": "patient",
            "triggers": ["on_step_end"],
            "rule": "validation['eval_loss'] > 0",
            "patience": {"patience_threshold": 3},
            "operations": ["hfcontrols.should_training_stop"],
        }
    ],
}


def test_a_patient_rule_acts_at_the_same_step(train: Any, sft_values: Any, read_tensors: Any, interrupt: Any) -> None:
    changes = {
        **SAVED,
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 2,
        "training_args.eval_delay": 1,
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
        "trainer_controller": RULES,
    }
    whole, values = interrupt(sft_values, changes)
    assert whole.result.steps == 6, "the rule is true from step 3 on, and acts at the fourth time"
    assert_equal_runs(whole, train(values), read_tensors)
    # Killed between that step and the publication of the model: the rule has ended the run, which is published.
    first = read_tensors(whole.final)
    whole.final.rename(whole.output_dir / "aside")
    again = train(sft_values({**copy.deepcopy(changes), "run_conf.resume_from_checkpoint": "auto"}))
    assert again.result.steps == 6
    assert all(torch.equal(first[name], tensor) for name, tensor in read_tensors(again.final).items())


class Counting(Metric):
    """A user's metric with state of its own."""

    events = frozenset({"on_step_end"})
    calls = 0

    def compute(self, event: Event) -> object:
        self.calls += 1
        return self.calls

    def state_dict(self) -> dict[str, object]:
        return {"calls": np.int64(self.calls)}

    def load_state_dict(self, state: Any) -> None:
        self.calls = state["calls"]


class Remembering(Operation):
    """A user's operation with state of its own."""

    calls = 0

    def should_remember(self, event: Event, metrics: Any) -> None:
        self.calls += 1

    def state_dict(self) -> dict[str, object]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        self.calls = state["calls"]


def test_metrics_and_operations_of_the_user_keep_their_state() -> None:
    section = TrainerController.model_validate(
        {
            "controller_metrics": [{"name": "count", "class": f"{__name__}.Counting"}],
            "operations": [{"name": "own", "class": f"{__name__}.Remembering"}],
            "controllers": [
                {
                    "name": "rule",
                    "triggers": ["on_step_end"],
                    "rule": "count > 1",
                    "operations": ["own.should_remember"],
                }
            ],
        }
    )
    first, second = make_controllers(section), make_controllers(section)
    event: Any = type("Event", (), {"name": "on_step_end", "args": type("A", (), {"world_size": 1}), "state": None})
    event.state = type("S", (), {"global_step": 1})
    for _ in range(3):
        first.handle(event)
    state = first.state_dict()
    assert state["values"] == {"count": 3}
    assert state["components"] == {"count": {"calls": 3}, "own": {"calls": 2}}
    second.load_state_dict(state)
    assert second.state_dict() == state


def test_the_guard_knows_the_spike_that_the_checkpoint_was_saved_in(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    losses = [2.0] * 10 + [90.0]
    state = TrainerState(global_step=11, max_steps=20)
    state.log_history = [{"loss": loss, "step": step} for step, loss in enumerate(losses, 1)]
    guard, control = LossGuardCallback(LossGuardConfig()), TrainerControl(should_save=True)
    guard.on_train_begin(args, state, control)
    guard.on_step_end(args, state, control)
    assert not control.should_save


def test_a_split_after_running_out_of_memory_is_kept(
    train: Any, sft_values: Any, read_tensors: Any, interrupt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("finetuning.trainer.oom_retry.OOMRetryMixin.num_splits", 2)
        whole, values = interrupt(sft_values, {**SAVED, "peft_conf": LORA})
    resumed = train(values)
    assert resumed.trainer.num_splits == 2
    assert_equal_runs(whole, resumed, read_tensors)


@pytest.mark.parametrize("peft_conf", [FULL, LORA], ids=["full", "lora"])
def test_a_run_that_has_taken_all_its_steps_takes_no_more(
    train: Any, sft_values: Any, read_tensors: Any, interrupt: Any, peft_conf: dict[str, Any]
) -> None:
    whole, values = interrupt(
        sft_values,
        {**SAVED, "peft_conf": peft_conf, "training_args.max_steps": 3, "training_args.logging_steps": 1},
        step=3,
    )
    resumed = train(values)
    assert resumed.result.steps == 3 and resumed.losses == whole.losses
    first, second = read_tensors(whole.final), read_tensors(resumed.final)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "changes",
    [
        {"training_args.num_iterations": 2},
        {"training_args.num_iterations": 1, "training_args.steps_per_generation": 8},
        {"training_args.beta": 0.1, "peft_conf": FULL, "training_args.sync_ref_model": True,
         "training_args.ref_model_sync_steps": 2},
    ],
    ids=["two iterations", "four steps a generation", "moving reference"],
)  # fmt: skip
def test_grpo_trains_on_the_completions_that_it_had_sampled(
    train: Any, grpo_values: Any, read_tensors: Any, interrupt: Any, changes: dict[str, Any]
) -> None:
    base = {**SAVED, "training_args.max_steps": 6, "training_args.logging_steps": 1, "peft_conf": LORA}
    whole, values = interrupt(grpo_values, {**base, **changes}, ALGORITHMS["grpo"])
    assert_equal_runs(whole, train(values, ALGORITHMS["grpo"]), read_tensors)
