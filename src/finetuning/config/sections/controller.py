"""`trainer_controller` and `guard`: rules that act on a run while it trains, and the guard against divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

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
"""The events of `transformers.TrainerCallback` that can trigger a rule."""

HF_CONTROLS = "hfcontrols"
"""The name of the operations that are always available."""

METRIC_CLASSES: dict[str, frozenset[str]] = {
    "Loss": frozenset(),
    "TrainingState": frozenset(),
    "EvalMetrics": frozenset({"source_event"}),
    "HistoryBasedMetric": frozenset({"window_size"}),
    "PerProcessState": frozenset(),
}
"""The built-in metric classes and the names of their arguments."""

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
"""The built-in operation classes and the names of their actions."""

NonEmpty = Annotated[str, Field(min_length=1)]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]


class Component(ConfigSection):
    """A metric or an operation: a class, its arguments, and the name that rules refer to it by."""

    name: NonEmpty
    """Name used in rules and controllers."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""

    @property
    def class_name(self) -> str:
        """The key `class`, which is a reserved word in Python."""
        return getattr(self, "class")


# `class` cannot be declared in a class body, so these two sections are created by call. To a type checker they are
# their base class.
if TYPE_CHECKING:
    ControllerMetric = Component
    ControllerOperation = Component
else:
    ControllerMetric = create_model(
        "ControllerMetric",
        __base__=Component,
        __module__=__name__,
        __doc__="A metric that rules can use.",
        **{
            "class": (
                NonEmpty,
                Field(
                    description=f"Metric class: one of {', '.join(METRIC_CLASSES)}, or the import path"
                    " `package.module.Class` of your own."
                ),
            )
        },
    )
    ControllerOperation = create_model(
        "ControllerOperation",
        __base__=Component,
        __module__=__name__,
        __doc__="An operation that controllers can run.",
        **{
            "class": (
                NonEmpty,
                Field(
                    description=f"Operation class: one of {', '.join(OPERATION_CLASSES)}, or the import path"
                    " `package.module.Class` of your own."
                ),
            )
        },
    )


class Patience(ConfigSection):
    """How many times a rule must be true before it acts."""

    patience_threshold: int = Field(default=1, ge=0)
    """The rule acts once it has been true more often than this. The count then restarts at 0."""
    mode: Literal["reset_on_failure", "no_reset_on_failure"] = "reset_on_failure"
    """`reset_on_failure` resets the count to 0 whenever the rule is false."""


class ControllerConfig(ConfigSection):
    """Logging of a controller."""

    trigger_log_level: LogLevel = "debug"
    """Level of the log message written each time the controller acts."""


class Controller(ConfigSection):
    """A rule, the events that evaluate it, and the operations to run when it is true."""

    name: NonEmpty
    """Name of the controller in log messages."""
    triggers: list[TriggerName] = Field(min_length=1)
    """Trainer events at which the rule is evaluated."""
    rule: str = Field(min_length=1, max_length=2000)
    """Boolean expression over the metrics, such as `loss["loss"] < 0.5`."""
    operations: list[NonEmpty] = Field(min_length=1)
    """Actions to run when the rule is true: `operation.action`, such as `hfcontrols.should_training_stop`."""
    config: ControllerConfig = ControllerConfig()
    """Logging of the controller."""
    patience: Patience | None = None
    """How many times the rule must be true before it acts. By default it acts every time."""


class TrainerController(ConfigSection):
    """Rules that are evaluated while the model trains, and the operations that they run."""

    controller_metrics: list[ControllerMetric] = Field(default_factory=list[Component])
    """Metrics that rules can use."""
    operations: list[ControllerOperation] = Field(default_factory=list[Component])
    """Operations that controllers can run, in addition to `hfcontrols`, which is always available."""
    controllers: list[Controller] = Field(default_factory=list[Controller])
    """Controllers: rules with their triggers and operations."""


class LossGuardConfig(ConfigSection):
    """Stop a run whose loss diverges. A non-finite loss or gradient norm always stops the run."""

    enabled: bool = True
    """Stop the run when the loss explodes."""
    explode_factor: float = Field(default=3.0, gt=1)
    """A logged loss counts as exploded if it exceeds each of the last 50 logged losses, their median times this factor,
    and their median plus 1."""
    patience: int = Field(default=5, ge=1)
    """Number of consecutive exploded losses after which the run stops."""
