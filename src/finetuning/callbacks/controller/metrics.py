"""The metrics that rules can use, and the trainer events that they are computed from.

Adding a metric is a class here and an entry in `METRICS`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

LogEntry: TypeAlias = dict[str, float]
"""An entry of the trainer's `log_history`."""


@dataclass(frozen=True)
class Event:
    """One event of the trainer. `extra` holds its `metrics`, `logs`, `path` and `is_final`, where it has them."""

    name: str
    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    extra: Mapping[str, object] = field(default_factory=dict[str, object])


class Metric:
    """A value that is computed at some of the trainer's events and kept until the next of them.

    Subclass this for a metric of your own; `arguments` of the config are passed as keyword arguments.
    """

    events: frozenset[str] = frozenset()
    keeps_value = True
    """Whether checkpoints hold the value: until the next of its events a resumed run has no other."""

    def __init__(self, name: str):
        self.name = name

    def state_dict(self) -> Mapping[str, object]:
        """Return what a resumed run needs: numbers, texts, and lists and dictionaries of them. By default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""

    def compute(self, event: Event) -> object:
        """Return the value after this event; None while it is not available."""
        raise NotImplementedError


class Loss(Metric):
    """The latest training log: `loss`, `epoch`, `learning_rate`, `grad_norm`, `step`, …"""

    events = frozenset({"on_log"})

    def compute(self, event: Event) -> dict[str, object] | None:
        return next((dict(entry) for entry in reversed(event.state.log_history) if "loss" in entry), None)


class TrainingState(Metric):
    """The trainer's state, field by field, and `is_final`: whether the final model was saved."""

    events = frozenset(
        {
            *("on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin"),
            *("on_step_end", "on_substep_end", "on_optimizer_step", "on_log", "on_evaluate", "on_predict"),
            *("on_prediction_step", "on_save"),
        }
    )
    keeps_value = False

    def compute(self, event: Event) -> dict[str, object]:
        state = event.state
        values = {field.name: getattr(state, field.name, None) for field in dataclasses.fields(state)}
        return {**values, "is_final": bool(event.extra.get("is_final", False))}


class EvalMetrics(Metric):
    """The metrics of the last evaluation: `eval_loss` and others."""

    def __init__(self, name: str, source_event: str = "on_evaluate"):
        super().__init__(name)
        if source_event not in ("on_evaluate", "on_predict"):
            raise ConfigError(f"Specified source event [{source_event}] is invalid for EvalMetrics")
        self.events = frozenset({source_event})

    def compute(self, event: Event) -> dict[str, object] | None:
        metrics = event.extra.get("metrics")
        return dict(metrics) if isinstance(metrics, Mapping) else None


class HistoryBasedMetric(Metric):
    """The last `window_size` training losses and evaluations, in two dictionaries of lists.

    `training_loss` has `loss`, `steps` and `epoch`; `metrics` has every key that evaluations log, and `steps` and
    `epoch`. `global_step` is an alias of `steps`. Both are empty until the first log. A window below 0 keeps all.
    The source is the trainer's log, so that a resumed run has its earlier values.
    """

    events = frozenset({"on_log", "on_evaluate"})

    def __init__(self, name: str, window_size: int = 1):
        super().__init__(name)
        self._window_size = window_size
        length = window_size if window_size > 0 else None
        self._losses: deque[LogEntry] = deque(maxlen=length)
        self._evaluations: deque[LogEntry] = deque(maxlen=length)
        self._entries_read = 0

    def compute(self, event: Event) -> dict[str, object]:
        history = event.state.log_history
        for entry in history[self._entries_read :]:
            if "loss" in entry:
                self._add_loss(entry)
            elif any(key.startswith("eval_") for key in entry):
                self._evaluations.append(entry)
        self._entries_read = len(history)
        return {
            "training_loss": _columns([self._only_loss(entry) for entry in self._losses]),
            "metrics": _columns(list(self._evaluations)),
            "window_size": self._window_size,
        }

    def _add_loss(self, entry: LogEntry) -> None:
        last = self._losses[-1] if self._losses else {}
        if (entry["loss"], entry.get("epoch")) != (last.get("loss"), last.get("epoch")):
            self._losses.append(entry)

    @staticmethod
    def _only_loss(entry: LogEntry) -> LogEntry:
        return {key: entry[key] for key in ("loss", "step", "epoch") if key in entry}


class PerProcessState(Metric):
    """`rank` of this process."""

    events = frozenset({"on_init_end"})

    def compute(self, event: Event) -> dict[str, int]:
        return {"rank": event.args.process_index}


METRICS: dict[str, type[Metric]] = {
    "Loss": Loss,
    "TrainingState": TrainingState,
    "EvalMetrics": EvalMetrics,
    "HistoryBasedMetric": HistoryBasedMetric,
    "PerProcessState": PerProcessState,
}
"""The metrics by the names of their classes in the YAML."""


def _columns(entries: list[LogEntry]) -> dict[str, list[float | None]]:
    """Return a list per key with one item per entry, None where an entry lacks the key."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    columns = {("steps" if key == "step" else key): [entry.get(key) for entry in entries] for key in keys}
    return {**columns, "global_step": columns["steps"]} if "steps" in columns else columns
