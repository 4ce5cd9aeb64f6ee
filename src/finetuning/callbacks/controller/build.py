"""A trainer controller's YAML to metrics, operations and rules."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from finetuning.callbacks.controller.expressions import Rule
from finetuning.callbacks.controller.metrics import METRICS, Metric
from finetuning.callbacks.controller.operations import OPERATIONS, HFControls, Operation
from finetuning.config.sections.controller import HF_CONTROLS, Component, Controller, Patience, TrainerController
from finetuning.errors import ConfigError

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
class BuiltController:
    """One controller, ready to be looked at."""

    name: str
    triggers: frozenset[str]
    rule: Rule
    actions: tuple[tuple[str, Operation, str], ...]
    """Each action: its full name, its operation, and its own name."""
    log_level: int
    counter: PatienceCounter

    @property
    def steers(self) -> bool:
        return any(operation.steers for _, operation, _ in self.actions)


@dataclass(frozen=True)
class Built:
    """All of a trainer controller."""

    metrics: tuple[Metric, ...]
    controllers: tuple[BuiltController, ...]


def build(section: TrainerController) -> Built:
    """What the section describes, classes of the user's own imported.

    Raises:
        ConfigError: a class cannot be imported or made, or has no such action.
    """
    metrics = tuple(_make(one, METRICS, Metric) for one in section.controller_metrics)
    operations: dict[str, Operation] = {HF_CONTROLS: HFControls(HF_CONTROLS)}
    operations |= {one.name: _make(one, OPERATIONS, Operation) for one in section.operations}
    return Built(metrics, tuple(_controller(one, operations) for one in section.controllers))


def _controller(controller: Controller, operations: Mapping[str, Operation]) -> BuiltController:
    actions = []
    for full in controller.operations:
        name, _, action = full.partition(".")
        if name not in operations:
            raise ConfigError(f'Invalid operation "{full}" for controller "{controller.name}"')
        operations[name].action(action)
        actions.append((full, operations[name], action))
    return BuiltController(
        name=controller.name,
        triggers=frozenset(controller.triggers),
        rule=Rule(controller.rule, controller.name),
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
