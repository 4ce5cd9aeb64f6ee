"""The trainer's events, answered by rules.

A trainer controller's YAML to metrics, operations and rules."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from finetuning.callbacks.controller.expressions import Expression, MetricUnavailable
from finetuning.callbacks.controller.metrics import METRICS, Event, Metric
from finetuning.callbacks.controller.operations import OPERATIONS, HFControls, Operation
from finetuning.config.sections.controller import (
    HF_CONTROLS,
    Component,
    Controller,
    Patience,
    TrainerController,
    TriggerName,
)
from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainerCallback

Made = TypeVar("Made")


class PatienceCounter:
    """Counts how often a rule held.

    >>> counter = PatienceCounter(Patience(patience_threshold=2))
    >>> [counter.acts(held) for held in (True, True, False, True, True, True, True)]
    [False, False, False, False, False, True, False]
    """

    def __init__(self, patience: Patience | None):
        self._threshold = patience.patience_threshold if patience else 0
        self._resets = patience is None or patience.mode == "reset_on_failure"
        self._count = 0

    def acts(self, held: bool) -> bool:
        """Whether the controller acts now: the rule has held more often than the threshold."""
        if held:
            self._count += 1
        elif self._resets:
            self._count = 0
        if self._count > self._threshold:
            self._count = 0
            return True
        return False


@dataclass(frozen=True)
class LoadedController:
    """One controller, ready to be looked at."""

    name: str
    triggers: frozenset[str]
    rule: Expression
    actions: tuple[tuple[str, Operation, str], ...]
    """Each action: its full name, its operation, and its own name."""
    log_level: int
    counter: PatienceCounter

    @property
    def steers(self) -> bool:
        return any(operation.steers for _, operation, _ in self.actions)


@dataclass(frozen=True)
class LoadedComponent:
    """All of a trainer controller."""

    metrics: tuple[Metric, ...]
    controllers: tuple[LoadedController, ...]


def build_controllers(section: TrainerController) -> LoadedComponent:
    """What the section describes, classes of the user's own imported.

    Raises:
        ConfigError: a class cannot be imported or made, or has no such action.
    """
    metrics = tuple(_make(one, METRICS, Metric) for one in section.controller_metrics)
    operations: dict[str, Operation] = {HF_CONTROLS: HFControls(HF_CONTROLS)}
    operations |= {one.name: _make(one, OPERATIONS, Operation) for one in section.operations}
    return LoadedComponent(metrics, tuple(_controller(one, operations) for one in section.controllers))


def _controller(controller: Controller, operations: Mapping[str, Operation]) -> LoadedController:
    actions = []
    for full in controller.operations:
        name, _, action = full.partition(".")
        if name not in operations:
            raise ConfigError(f'Invalid operation "{full}" for controller "{controller.name}"')
        operations[name].action(action)
        actions.append((full, operations[name], action))
    return LoadedController(
        name=controller.name,
        triggers=frozenset(controller.triggers),
        rule=Expression(controller.rule, controller.name),
        actions=tuple(actions),
        log_level=getattr(logging, controller.config.trigger_log_level.upper()),
        counter=PatienceCounter(controller.patience),
    )


def _make(component: Component, known: Mapping[str, type[Made]], base: type[Made]) -> Made:
    made = known.get(component.class_name) or _imported(component, base)
    try:
        return made(component.name, **component.arguments)
    except TypeError as error:
        raise ConfigError(f'"{component.name}" ({component.class_name}) cannot be made: {error}') from error


def _imported(component: Component, base: type[Made]) -> Any:
    path = component.class_name.replace(":", ".")
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'"{component.name}": {component.class_name} cannot be imported: {error}') from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f'"{component.name}": {component.class_name} is not a subclass of {base.__module__}.{base.__name__}'
        )
    return found


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Action:
    """What a controller did, and when."""

    step: int
    controller: str
    action: str
    event: str

    def __str__(self) -> str:
        return f'step {self.step}: rule "{self.controller}" did {self.action} at {self.event}'


class ControllerSet:
    """Looks at rules as events come, and does what they say. All processes of a run act alike.

    A rule that steers training holds when it holds on any process. `taken` is what was done, by this process.
    """

    def __init__(self, built: LoadedComponent):
        self._metrics = built.metrics
        self._controllers = built.controllers
        self._triggers = frozenset[str]().union(*(one.triggers for one in built.controllers))
        self._values: dict[str, Any] = {metric.name: None for metric in built.metrics}
        self._told: set[tuple[str, str]] = set()
        self.taken: list[Action] = []

    def happened(self, event: Event, *, agree: bool = True) -> None:
        """Works out the metrics of this event and looks at its rules.

        Args:
            agree: whether the other processes see this event, too.
        """
        for metric in self._metrics:
            if event.name in metric.events:
                self._values[metric.name] = metric.compute(event)
        if event.name not in self._triggers:
            return
        looked_at = [one for one in self._controllers if event.name in one.triggers]
        held = [self._holds(one) for one in looked_at]
        if agree and event.args.world_size > 1:
            held = _agreed(looked_at, held, event)
        for controller, holds in zip(looked_at, held, strict=True):
            if controller.counter.acts(bool(holds)):
                self._act(controller, event)

    def _holds(self, controller: LoadedController) -> bool:
        try:
            return controller.rule.verdict(self._values)
        except MetricUnavailable as missing:
            self._tell_once(controller, str(missing))
            return False

    def _tell_once(self, controller: LoadedController, metric: str) -> None:
        if (controller.name, metric) not in self._told:
            self._told.add((controller.name, metric))
            logger.warning(
                'Ignoring the rule of controller "%s" because the metric "%s" is not available', controller.name, metric
            )

    def _act(self, controller: LoadedController, event: Event) -> None:
        metrics = {**self._values, "control_name": controller.name}
        for full, operation, action in controller.actions:
            logger.log(
                controller.log_level,
                "Taking [%s] action in controller [%s] triggered at event [%s]",
                full,
                controller.name,
                event.name,
            )
            operation.action(action)(event, metrics)
            self.taken.append(Action(event.state.global_step, controller.name, full, event.name))


def _agreed(looked_at: list[LoadedController], held: list[bool], event: Event) -> list[bool]:
    """What holds on any process, for those that steer training; the others' logs are each process's own."""
    steering = [index for index, one in enumerate(looked_at) if one.steers]
    if not steering:
        return held
    import torch

    flags = torch.tensor([held[index] for index in steering], dtype=torch.uint8, device=event.args.device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flags[steering.index(index)]) if index in steering else one for index, one in enumerate(held)]


def make_controllers(section: TrainerController) -> ControllerSet:
    """The controllers of a section.

    Raises:
        ConfigError: one cannot be made.
    """
    try:
        return ControllerSet(build_controllers(section))
    except ConfigError as error:
        raise ConfigError(f"trainer_controller: {error}") from error


def controller_callback(controllers: ControllerSet) -> TrainerCallback:
    """The callback that tells the controllers all of a trainer's events."""
    from transformers import TrainerCallback

    def handler(name: str) -> Callable[..., None]:
        def handle(self: Any, args: Any, state: Any, control: Any, **extra: Any) -> None:
            kept = {key: extra[key] for key in ("metrics", "logs") if key in extra}
            if name == "on_save":
                kept |= {"path": f"{args.output_dir}/checkpoint-{state.global_step}", "is_final": False}
            controllers.happened(Event(name, args, state, control, kept))

        return handle

    return type("ControllerCallback", (TrainerCallback,), {name: handler(name) for name in get_args(TriggerName)})()
