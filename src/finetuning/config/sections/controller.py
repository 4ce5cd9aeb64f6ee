"""`trainer_controller` and `guard`: what steers a run while it trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model

from finetuning.config.sections.section import ConfigSection

TriggerName = Literal[
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_step_end",
    "on_substep_end",
    "on_optimizer_step",
    "on_log",
    "on_evaluate",
    "on_predict",
    "on_prediction_step",
    "on_save",
]
"""The trainer's events, at any of which rules can be looked at."""

HF_CONTROLS = "hfcontrols"
"""The name of the operations that are there without being listed."""

METRIC_CLASSES: dict[str, frozenset[str]] = {
    "Loss": frozenset(),
    "TrainingState": frozenset(),
    "EvalMetrics": frozenset({"source_event"}),
    "HistoryBasedMetric": frozenset({"window_size"}),
    "PerProcessState": frozenset(),
}
"""The metrics that have a name, and the arguments of each."""

OPERATION_CLASSES: dict[str, tuple[str, ...]] = {
    "HFControls": (
        "should_training_stop",
        "should_epoch_stop",
        "should_save",
        "should_evaluate",
        "should_log",
    ),
    "LogControl": ("should_log",),
}
"""The operations that have a name, and the actions of each."""

NonEmpty = Annotated[str, Field(min_length=1)]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]


class Component(ConfigSection):
    """A metric or an operation: its name in rules, and what makes it."""

    name: NonEmpty
    """The name that rules and controllers use."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """The class's arguments."""

    @property
    def class_name(self) -> str:
        """The key `class`, which is no name in Python."""
        return getattr(self, "class")


def _component(name: str, text: str, description: str) -> type[Component]:
    fields: dict[str, Any] = {"class": (NonEmpty, Field(description=description))}
    return create_model(name, __base__=Component, __module__=__name__, __doc__=text, **fields)


ControllerMetric = _component(
    "ControllerMetric",
    "A value that rules can look at.",
    f"One of {', '.join(METRIC_CLASSES)}, or the import path `package.module.Class` of your own.",
)
ControllerOperation = _component(
    "ControllerOperation",
    "Something that a controller can do.",
    f"One of {', '.join(OPERATION_CLASSES)}, or the import path `package.module.Class` of your own.",
)


class Patience(ConfigSection):
    """How often a rule must hold before it acts."""

    patience_threshold: int = Field(default=1, ge=0)
    """The rule acts when it has held more often than this; then counting begins anew."""
    mode: Literal["reset_on_failure", "no_reset_on_failure"] = "reset_on_failure"
    """Whether a rule that does not hold sets the count back to 0."""


class ControllerConfig(ConfigSection):
    """How a controller speaks."""

    trigger_log_level: LogLevel = "debug"
    """Level of the log line that is written when the controller acts."""


class Controller(ConfigSection):
    """One rule: when it is looked at, what it says, and what is done when it holds."""

    name: NonEmpty
    """The controller's name, for log lines."""
    triggers: list[TriggerName] = Field(min_length=1)
    """The trainer's events at which the rule is looked at."""
    rule: str = Field(min_length=1, max_length=2000)
    """An expression of metrics that is true or false."""
    operations: list[NonEmpty] = Field(min_length=1)
    """What is done when the rule holds: `operation.action`, such as `hfcontrols.should_training_stop`."""
    config: ControllerConfig = ControllerConfig()
    """How the controller speaks."""
    patience: Patience | None = None
    """How often the rule must hold before it acts; by default once."""


class TrainerController(ConfigSection):
    """Rules that are looked at while a run trains, and what is done when one holds."""

    controller_metrics: list[ControllerMetric] = Field(default_factory=list)
    """The values that rules look at."""
    operations: list[ControllerOperation] = Field(default_factory=list)
    """What controllers can do besides `hfcontrols`, which is always there."""
    controllers: list[Controller] = Field(default_factory=list)
    """The rules."""


class LossGuardConfig(ConfigSection):
    """What stops a run that has gone wrong. A loss or gradient that is not finite always stops it."""

    enabled: bool = True
    """Whether a loss that has exploded stops the run."""
    explode_factor: float = Field(default=3.0, gt=1)
    """A logged loss has exploded when it is above all of the last 50, above their median times this factor, and above
    that median plus 1."""
    patience: int = Field(default=5, ge=1)
    """So many exploded losses in a row stop the run."""
