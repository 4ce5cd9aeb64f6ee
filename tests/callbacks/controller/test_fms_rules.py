"""The rules that fms-hf-tuning shows, for each of its metrics and operations, on a real trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from finetuning.callbacks.controller.callback import controller_callback, make_controllers
from finetuning.config.sections.controller import METRIC_CLASSES, OPERATION_CLASSES, TrainerController

LOSSES = [3.0, 2.0, 2.5, 2.6, 0.5, 0.4]
VALIDATION = [3.0, 2.4, 2.2, 2.1, 2.3, 2.0]
RISING = (
    "len(m['training_loss']['loss']) > 2 and m['training_loss']['loss'][0] < m['training_loss']['loss'][1]"
    " and m['training_loss']['loss'][1] < m['training_loss']['loss'][2]"
)
METRICS: dict[str, list[tuple[dict[str, Any], str, str, int]]] = {
    "Loss": [({}, "on_log", "m['loss'] < 1.0", 5), ({}, "on_log", "m['epoch'] > 0.4 and m['learning_rate'] > 0", 3)],
    "TrainingState": [
        ({}, "on_step_end", "m['global_step'] == 4 and m['epoch'] >= 0.5", 4),
        ({}, "on_step_end", "m['is_final']", 6),
        ({}, "on_epoch_end", "m['epoch'] >= 0.5", 6),
    ],
    "EvalMetrics": [
        ({}, "on_evaluate", "m['eval_loss'] < 2.25", 3),
        ({"source_event": "on_predict"}, "on_evaluate", "m['test_loss'] < 2.25", 6),
    ],
    "HistoryBasedMetric": [
        ({"window_size": 3}, "on_log", RISING, 4),
        ({"window_size": 1}, "on_evaluate", "len(m['metrics']) > 0 and m['metrics']['eval_loss'][-1] < 2.15", 4),
        ({"window_size": -1}, "on_log", "len(m['training_loss']['steps']) == 2", 2),
        ({"window_size": 2}, "on_log", "m['training_loss']['global_step'][-1] == 3", 3),
    ],
    "PerProcessState": [({}, "on_step_begin", "m['rank'] == 0", 1), ({}, "on_step_begin", "m['rank'] == 1", 6)],
}
"""Of each metric: its arguments, a trigger, a rule that stops, and the step at which it has stopped; 6 is the end."""
OPERATIONS: dict[str, Callable[[Any], bool]] = {
    "should_training_stop": lambda run: run.state.global_step == 2,
    "should_epoch_stop": lambda run: run.state.global_step == 2,
    "should_save": lambda run: "checkpoint-2" in run.checkpoints,
    "should_evaluate": lambda run: [row["step"] for row in run.state.log_history if "eval_loss" in row] == [2, 5],
    "should_log": lambda run: [row["step"] for row in run.state.log_history if "loss" in row] == [2],
}
"""Of each action of `hfcontrols`: how a run ends in which it was taken after step 2. But for it that run logs and
evaluates only at its end, after step 5."""


def section(metric: dict[str, Any], trigger: str, rule: str, operation: str, **more: Any) -> Any:
    controller = {"name": "c", "triggers": [trigger], "rule": rule, "operations": [operation]}
    values = {"controller_metrics": [{"name": "m", **metric}], "controllers": [controller], **more}
    return make_controllers(TrainerController.model_validate(values))


@pytest.mark.parametrize(
    ("name", "arguments", "trigger", "rule", "last"),
    [(name, *row) for name, rows in METRICS.items() for row in rows],
)
def test_metrics(name: str, arguments: dict[str, Any], trigger: str, rule: str, last: int, scripted_run: Any) -> None:
    stop = "hfcontrols.should_training_stop"
    made = section({"class": name, "arguments": arguments}, trigger, rule, stop)
    run = scripted_run(LOSSES, [controller_callback(made)], validation=VALIDATION)
    assert run.error is None
    assert run.state.global_step == last


@pytest.mark.parametrize("action", OPERATIONS)
def test_operations(action: str, scripted_run: Any) -> None:
    made = section({"class": "TrainingState"}, "on_step_end", "m.global_step == 2", f"hfcontrols.{action}")
    quiet = {"logging_steps": 100, "eval_steps": 100}
    run = scripted_run(LOSSES[:5], [controller_callback(made)], validation=VALIDATION, **quiet)
    assert run.error is None
    assert OPERATIONS[action](run), (run.state.global_step, run.checkpoints, run.state.log_history)


def test_a_log_line_of_ones_own(scripted_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"log_format": "{event_name} of {control_name}: loss {m[loss]}", "log_level": "warning"}
    say = [{"name": "say", "class": "LogControl", "arguments": arguments}]
    made = section({"class": "Loss"}, "on_log", "m['loss'] < 1", "say.should_log", operations=say)
    with caplog.at_level(logging.WARNING):
        scripted_run(LOSSES, [controller_callback(made)])
    assert "on_log of c: loss 0.5" in caplog.text


def test_nothing_is_left_out() -> None:
    assert METRICS.keys() == METRIC_CLASSES.keys()
    assert OPERATIONS.keys() == set(OPERATION_CLASSES["HFControls"])
    assert OPERATION_CLASSES.keys() == {"HFControls", "LogControl"}
