"""The trainer controller: evaluates the user's rules at the trainer's events and runs their operations."""

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
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_Base = TypeVar("_Base", Metric, Operation)


class PatienceCounter:
    """Counts how often a rule was true, and decides whether its controller acts.

    >>> counter = PatienceCounter(Patience(patience_threshold=2))
    >>> [counter.update(is_true) for is_true in (True, True, False, True, True, True, True)]
    [False, False, False, False, False, True, False]
    """

    def __init__(self, patience: Patience | None):
        self._threshold = patience.patience_threshold if patience else 0
        self._resets = patience is None or patience.mode == "reset_on_failure"
        self.count = 0
        """How often the rule was true since the controller last acted."""

    def update(self, is_true: bool) -> bool:
        """Add a result of the rule. Return whether it has now been true more often than the threshold."""
        if is_true:
            self.count += 1
        elif self._resets:
            self.count = 0
        if self.count > self._threshold:
            self.count = 0
            return True
        return False


@dataclass(frozen=True)
class LoadedController:
    """One controller with its rule parsed and its operations created."""

    name: str
    triggers: frozenset[str]
    rule: Expression
    actions: tuple[tuple[str, Operation, str], ...]
    """For each action: its full name, its operation, and the method's name."""
    log_level: int
    counter: PatienceCounter

    @property
    def affects_training(self) -> bool:
        """Whether an action changes what the trainer does."""
        return any(operation.affects_training for _, operation, _ in self.actions)


@dataclass(frozen=True)
class LoadedControllers:
    """All metrics and controllers of a section."""

    metrics: tuple[Metric, ...]
    controllers: tuple[LoadedController, ...]


def build_controllers(section: TrainerController) -> LoadedControllers:
    """Create the metrics, operations and controllers of a section. Import the user's classes.

    Raises:
        ConfigError: a class cannot be imported or created, or has no such action.
    """
    metrics = tuple(_create(component, METRICS, Metric) for component in section.controller_metrics)
    operations: dict[str, Operation] = {HF_CONTROLS: HFControls(HF_CONTROLS)}
    operations |= {component.name: _create(component, OPERATIONS, Operation) for component in section.operations}
    return LoadedControllers(metrics, tuple(_load_controller(item, operations) for item in section.controllers))


def _load_controller(controller: Controller, operations: Mapping[str, Operation]) -> LoadedController:
    actions = []
    for full_name in controller.operations:
        name, _, action = full_name.partition(".")
        if name not in operations:
            raise ConfigError(f'Invalid operation "{full_name}" for controller "{controller.name}"')
        operations[name].action(action)
        actions.append((full_name, operations[name], action))
    return LoadedController(
        name=controller.name,
        triggers=frozenset(controller.triggers),
        rule=Expression(controller.rule, controller.name),
        actions=tuple(actions),
        log_level=getattr(logging, controller.config.trigger_log_level.upper()),
        counter=PatienceCounter(controller.patience),
    )


def _create(component: Component, classes: Mapping[str, type[_Base]], base: type[_Base]) -> _Base:
    component_class = classes.get(component.class_name) or _import_class(component, base)
    try:
        return component_class(component.name, **component.arguments)
    except TypeError as error:
        raise ConfigError(f'"{component.name}" ({component.class_name}) cannot be created: {error}') from error


def _import_class(component: Component, base: type[_Base]) -> type[_Base]:
    path = component.class_name.replace(":", ".")
    module, _, name = path.rpartition(".")
    try:
        result: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'"{component.name}": {component.class_name} cannot be imported: {error}') from error
    if not (isinstance(result, type) and issubclass(result, base)):
        raise ConfigError(
            f'"{component.name}": {component.class_name} is not a subclass of {base.__module__}.{base.__name__}'
        )
    return result


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Action:
    """An action that a controller has run."""

    step: int
    controller: str
    action: str
    event: str

    def __str__(self) -> str:
        return f'step {self.step}: rule "{self.controller}" ran {self.action} at {self.event}'


class ControllerSet:
    """Evaluates rules at the trainer's events and runs the actions of those that are true.

    All processes act alike: a rule whose actions affect training counts as true if it is true on any process.
    `actions` are those that this process has run.
    """

    def __init__(self, loaded: LoadedControllers):
        self._metrics = loaded.metrics
        self._controllers = loaded.controllers
        self._operations = {
            operation.name: operation for item in loaded.controllers for _, operation, _ in item.actions
        }
        self._triggers = frozenset[str]().union(*(controller.triggers for controller in loaded.controllers))
        self._values: dict[str, object] = {metric.name: None for metric in loaded.metrics}
        self._reported: set[tuple[str, str]] = set()
        self.actions: list[Action] = []

    def state_dict(self) -> dict[str, object]:
        """Return the counters of patience, the values of metrics, and what metrics and operations keep themselves."""
        components = [*self._metrics, *self._operations.values()]
        return {
            "counts": {controller.name: controller.counter.count for controller in self._controllers},
            "values": {
                metric.name: _plain(self._values[metric.name]) for metric in self._metrics if metric.keeps_value
            },
            "components": {component.name: _plain(component.state_dict()) for component in components},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; controllers and metrics that it does not know start again."""
        for controller in self._controllers:
            controller.counter.count = state["counts"].get(controller.name, 0)
        self._values |= {name: value for name, value in state["values"].items() if name in self._values}
        for component in (*self._metrics, *self._operations.values()):
            if component.name in state["components"]:
                component.load_state_dict(state["components"][component.name])

    def handle(self, event: Event, *, on_all_processes: bool = True) -> None:
        """Compute the metrics of this event, evaluate its rules and run their actions.

        Args:
            on_all_processes: whether every process handles this event, so that they can agree on the rules.
        """
        for metric in self._metrics:
            if event.name in metric.events:
                self._values[metric.name] = metric.compute(event)
        if event.name not in self._triggers:
            return
        triggered = [controller for controller in self._controllers if event.name in controller.triggers]
        results = [self._evaluate(controller) for controller in triggered]
        if on_all_processes and event.args.world_size > 1:
            results = _agree(triggered, results, event)
        for controller, is_true in zip(triggered, results, strict=True):
            if controller.counter.update(is_true):
                self._act(controller, event)

    def _evaluate(self, controller: LoadedController) -> bool:
        try:
            return controller.rule.evaluate(self._values)
        except MetricUnavailable as missing:
            self._warn_once(controller, str(missing))
            return False

    def _warn_once(self, controller: LoadedController, metric: str) -> None:
        if (controller.name, metric) not in self._reported:
            self._reported.add((controller.name, metric))
            logger.warning(
                'Ignoring the rule of controller "%s" because the metric "%s" is not available', controller.name, metric
            )

    def _act(self, controller: LoadedController, event: Event) -> None:
        metrics = {**self._values, "control_name": controller.name}
        for full_name, operation, action in controller.actions:
            logger.log(
                controller.log_level,
                "Taking [%s] action in controller [%s] triggered at event [%s]",
                full_name,
                controller.name,
                event.name,
            )
            operation.action(action)(event, metrics)
            self.actions.append(Action(event.state.global_step, controller.name, full_name, event.name))


def _agree(controllers: list[LoadedController], results: list[bool], event: Event) -> list[bool]:
    """Return whether each rule is true on any process. Controllers that only write logs keep their own result."""
    shared = [index for index, controller in enumerate(controllers) if controller.affects_training]
    if not shared:
        return results
    import torch

    flags = torch.tensor([results[index] for index in shared], dtype=torch.uint8, device=event.args.device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    agreed = {index: bool(flag) for index, flag in zip(shared, flags, strict=True)}
    return [agreed.get(index, result) for index, result in enumerate(results)]


def _plain(value: object) -> object:
    """Return a value in the types that a checkpoint can hold; numbers of numpy and tensors become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, str | bytes | bool | int | float | None):
        return value
    item = getattr(value, "item", None)
    if not callable(item):
        raise ConfigError(f"trainer_controller: a {type(value).__name__} cannot be saved in a checkpoint: {value!r}")
    return item()


def make_controllers(section: TrainerController) -> ControllerSet:
    """Create the controllers of a section.

    Raises:
        ConfigError: one cannot be created.
    """
    try:
        return ControllerSet(build_controllers(section))
    except ConfigError as error:
        raise ConfigError(f"trainer_controller: {error}") from error


def controller_callback(controllers: ControllerSet) -> TrainerCallback:
    """Return a callback that passes all of a trainer's events to the controllers."""
    from transformers import TrainerCallback

    # transformers looks handlers up by name: define one per event that a rule may use.
    def handler(name: str) -> Callable[..., None]:
        def handle(
            self: object, args: TrainingArguments, state: TrainerState, control: TrainerControl, **extra: object
        ) -> None:
            details = {key: extra[key] for key in ("metrics", "logs") if key in extra}
            if name == "on_save":
                details |= {"path": f"{args.output_dir}/checkpoint-{state.global_step}", "is_final": False}
            controllers.handle(Event(name, args, state, control, details))

        return handle

    methods: dict[str, Callable[..., object]] = {name: handler(name) for name in get_args(TriggerName)}
    methods["state_dict"] = lambda self: controllers.state_dict()
    methods["load_state_dict"] = lambda self, state: controllers.load_state_dict(state)
    return type("ControllerCallback", (TrainerCallback,), methods)()
