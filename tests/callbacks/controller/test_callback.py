"""The controller on a real trainer: events, metrics, operations, and the ready-made rules."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ForkServer, wait_all

from finetuning.callbacks.controller.callback import ControllerSet, controller_callback, make_controllers
from finetuning.callbacks.controller.metrics import METRICS, Event, Metric
from finetuning.callbacks.controller.operations import OPERATIONS, Operation
from finetuning.config.sections.controller import METRIC_CLASSES, OPERATION_CLASSES, TrainerController
from finetuning.config.validation.validate import read_controllers
from finetuning.errors import ConfigError

READY_MADE = Path(__file__).resolve().parents[3] / "configs" / "controllers"


def controllers(text: str) -> ControllerSet:
    return make_controllers(TrainerController.model_validate(yaml.safe_load(text)))


def action_steps(controllers: ControllerSet) -> list[int]:
    return [action.step for action in controllers.actions]


def test_the_tables_of_config_and_code_agree() -> None:
    assert METRICS.keys() == METRIC_CLASSES.keys()
    assert OPERATIONS.keys() == OPERATION_CLASSES.keys()
    for operation, actions in OPERATION_CLASSES.items():
        assert {name for name in dir(OPERATIONS[operation]) if name.startswith("should_")} == set(actions)


@pytest.mark.parametrize(
    ("name", "losses", "validation", "last_step"),
    [
        ("stop-on-nan", [1.0] * 6, [1.0, math.nan, 1.0, 1.0, 1.0, 1.0], 2),
        ("stop-on-nan", [1.0] * 6, [1.0] * 6, 6),
        ("stop-on-rising-loss", [2.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [], 6),
        ("stop-on-rising-loss", [2.0, 1.0, 1.1, 1.2, 1.1, 1.2, 1.3], [], 7),
        ("stop-on-target", [1.0] * 5, [0.9, 0.7, 0.5, 0.4, 0.3], 3),
        ("stop-on-target", [1.0] * 5, [0.9, 0.8, 0.7, 0.6, 0.55], 5),
        ("stop-on-plateau", [1.0] * 9, [2.0, 1.5, 1.0, 0.9, 0.899, 0.898, 0.897, 0.897, 0.897], 7),
        ("stop-on-plateau", [1.0] * 8, [2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6], 8),
    ],
)
def test_ready_made_rules(
    name: str, losses: list[float], validation: list[float], last_step: int, scripted_run: Callable
) -> None:
    made = make_controllers(read_controllers(str(READY_MADE / f"{name}.yaml")))
    run = scripted_run(losses, [controller_callback(made)], validation=validation)
    assert run.error is None
    assert run.state.global_step == last_step
    assert bool(made.actions) == (last_step < len(losses))


def test_every_ready_made_rule_is_tested() -> None:
    tested = {mark.args[1][index][0] for mark in test_ready_made_rules.pytestmark for index in range(8)}
    assert tested == {path.stem for path in READY_MADE.glob("*.yaml")}


def test_a_rule_that_stops_can_save(scripted_run: Callable) -> None:
    made = controllers("""
        controller_metrics: [{name: loss, class: Loss}]
        controllers:
        - {name: low, triggers: [on_log], rule: "loss['loss'] < 1", operations: [hfcontrols.should_save,
            hfcontrols.should_training_stop]}
    """)
    run = scripted_run([3.0, 2.0, 0.5, 0.4], [controller_callback(made)])
    assert run.state.global_step == 3
    assert run.checkpoints == ["checkpoint-3"]
    assert str(made.actions[-1]) == 'step 3: rule "low" ran hfcontrols.should_training_stop at on_log'


def test_patience_counts_events_of_a_real_run(scripted_run: Callable) -> None:
    made = controllers("""
        controller_metrics: [{name: loss, class: Loss}]
        controllers:
        - {name: low, triggers: [on_log], rule: "loss.loss < 1", operations: [hfcontrols.should_log],
            patience: {patience_threshold: 2}}
    """)
    scripted_run([3.0, 0.9, 0.8, 2.0, 0.5, 0.4, 0.3, 0.2], [controller_callback(made)])
    assert action_steps(made) == [7]


def test_an_unavailable_metric_is_one_warning(scripted_run: Callable, caplog: Any) -> None:
    made = controllers("""
        controller_metrics: [{name: evaluation, class: EvalMetrics}, {name: h, class: HistoryBasedMetric}]
        controllers:
        - {name: a, triggers: [on_step_end], rule: "evaluation['eval_loss'] < 9", operations: [hfcontrols.should_save]}
        - {name: b, triggers: [on_log], rule: "h['metrics']['eval_loss'][-1] < 9", operations: [hfcontrols.should_save]}
    """)
    with caplog.at_level(logging.WARNING, logger="finetuning"):
        run = scripted_run([1.0] * 4, [controller_callback(made)])
    assert run.error is None and run.state.global_step == 4 and not made.actions
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("finetuning")]
    assert texts == [
        f'Ignoring the rule of controller "{name}" because the metric "{metric}" is not available'
        for name, metric in (("a", "evaluation"), ("b", "h"))
    ]


class Seen(Metric):
    """The step of the last event; loaded by import path."""

    events = frozenset({"on_log", "on_save"})

    def __init__(self, name: str, factor: float = 1.0):
        super().__init__(name)
        self._factor = factor

    def compute(self, event: Event) -> float:
        return event.state.global_step * self._factor


class Notes(Operation):
    """Keeps the events it was called with; loaded by import path."""

    def __init__(self, name: str):
        super().__init__(name)
        self.notes: list[Any] = []

    def should_note(self, event: Event, metrics: Any) -> None:
        self.notes.append((event.name, event.state.global_step, event.extra.get("path")))
        if len(self.notes) == 2:
            event.control.should_training_stop = True


@pytest.fixture
def custom_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of custom classes on the import path."""
    source = Path(__file__).read_text()
    start, end = source.index("class Seen"), source.index("@pytest.fixture\ndef custom_classes")
    head = (
        "from __future__ import annotations\nfrom typing import Any\n"
        "from finetuning.callbacks.controller.metrics import Event\n"
        "from finetuning.callbacks.controller.metrics import Metric\n"
        "from finetuning.callbacks.controller.operations import Operation\n\n"
    )
    (tmp_path / "my_rules.py").write_text(head + source[start:end])
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rules"


def test_custom_metrics_and_operations(custom_classes: str, scripted_run: Callable) -> None:
    made = controllers(f"""
        controller_metrics: [{{name: seen, class: {custom_classes}.Seen, arguments: {{factor: 10}}}}]
        operations: [{{name: notes, class: "{custom_classes}:Notes"}}]
        controllers:
        - {{name: note, triggers: [on_save], rule: "seen >= 20", operations: [notes.should_note]}}
    """)
    run = scripted_run([1.0] * 6, [controller_callback(made)], save_strategy="steps", save_steps=1)
    assert run.state.global_step == 3
    assert action_steps(made) == [2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("controller_metrics: [{name: a, class: no.such.Thing}]", "no.such.Thing cannot be imported"),
        ("controller_metrics: [{name: a, class: pathlib.Path}]", "pathlib.Path is not a subclass of"),
        ("controller_metrics: [{name: a, class: Loss, arguments: {x: 1}}]", r'"a" \(Loss\) cannot be created'),
    ],
)
def test_a_component_that_cannot_be_created_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        controllers(text)


def test_log_control_formats_its_message(scripted_run: Callable, caplog: Any) -> None:
    made = controllers("""
        controller_metrics: [{name: loss, class: Loss}, {name: process, class: PerProcessState}]
        operations:
        - name: say
          class: LogControl
          arguments: {log_level: warning, log_format: "{event_name} {control_name} {loss[loss]:.2f} {process[rank]}"}
        - name: bad
          class: LogControl
          arguments: {log_level: warning, log_format: "{nothing} {args._n_gpu}"}
        controllers:
        - {name: talk, triggers: [on_log], rule: "True", operations: [say.should_log, bad.should_log]}
    """)
    with caplog.at_level(logging.WARNING, logger="finetuning"):
        run = scripted_run([1.25], [controller_callback(made)])
    assert run.error is None
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("finetuning")]
    assert texts[0] == "on_log talk 1.25 0"
    assert texts[1].startswith('operation "bad" cannot format its message: KeyError')


def test_history_keeps_its_window_and_does_not_change_the_trainers_log(scripted_run: Callable) -> None:
    metric = METRICS["HistoryBasedMetric"]("h", window_size=2)
    everything = METRICS["HistoryBasedMetric"]("h", window_size=-1)
    run = scripted_run([3.0, 2.0, 2.0, 1.0], [], validation=[1.5, 1.4, 1.3, 1.2])
    event = Event("on_log", None, run.state, None)
    value = metric.compute(event)
    assert value["training_loss"] == {
        "loss": [2.0, 1.0],
        "steps": [3, 4],
        "epoch": [0.75, 1.0],
        "global_step": [3, 4],
    }
    assert value["metrics"]["eval_loss"] == pytest.approx([1.3, 1.2])
    assert value["metrics"]["steps"] == [3, 4]
    assert everything.compute(event)["training_loss"]["loss"] == [3.0, 2.0, 2.0, 1.0]
    assert metric.compute(event) == value, "an event without a new log adds nothing"
    assert all("steps" not in entry for entry in run.state.log_history)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "controller_metrics:\n- {name: loss, class: Los}\ncontrollers:\n- name: a\n  triggers: [on_log]\n"
            "  rule: lost.loss < 1\n  operations: [hfcontrols.should_stop]\n",
            [
                ':2:16: controller_metrics.0.class: unknown metric class "Los"; one of: Loss, ',
                'Did you mean "Loss"?',
                ':6:3: controllers.0.rule: rule of controller "a" is invalid: "lost" is not defined. Did you mean',
                ':7:16: controllers.0.operations.0: invalid operation "hfcontrols.should_stop" for controller "a".',
            ],
        ),
        (
            "controllers:\n- {name: a, triggers: [on_lg], rule: 'True', operations: [hfcontrols.should_save]}\n",
            [":2:24: controllers.0.triggers.0: must be one of", 'Did you mean "on_log"?'],
        ),
        ("controller-metrics: []\n", [":1:1: controller-metrics: unknown key.", 'Did you mean "controller_metrics"?']),
        ("- a\n", ["expected sections"]),
    ],
)
def test_errors_in_a_file_have_their_location(text: str, messages: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_controllers(str(path))
    for message in messages:
        assert message in str(raised.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_controllers(str(tmp_path / "none.yaml"))


def test_all_processes_act_alike(fork_server: ForkServer, tmp_path: Path) -> None:
    """A rule that is true on one process stops both at the same step; log lines are per process."""
    script = Path(__file__).with_name("agree.py")
    ranks = fork_server.start_all([tmp_path], ["", ""], program=str(script))
    assert wait_all(ranks) == [0, 0], "".join(rank.output for rank in ranks)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results == [{"stops": [False, True, True], "talked": 3}, {"stops": [False, True, True], "talked": 0}]
