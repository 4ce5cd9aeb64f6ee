"""The trainer's events, answered by rules."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from finetuning.callbacks.controller.build import Built, BuiltController, build
from finetuning.callbacks.controller.event import Event
from finetuning.callbacks.controller.expressions import Unavailable
from finetuning.config.sections.controller import TrainerController, TriggerName
from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainerCallback

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


class Controllers:
    """Looks at rules as events come, and does what they say. All processes of a run act alike.

    A rule that steers training holds when it holds on any process. `taken` is what was done, by this process.
    """

    def __init__(self, built: Built):
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

    def _holds(self, controller: BuiltController) -> bool:
        try:
            return controller.rule.verdict(self._values)
        except Unavailable as missing:
            self._tell_once(controller, str(missing))
            return False

    def _tell_once(self, controller: BuiltController, metric: str) -> None:
        if (controller.name, metric) not in self._told:
            self._told.add((controller.name, metric))
            logger.warning(
                'Ignoring the rule of controller "%s" because the metric "%s" is not available', controller.name, metric
            )

    def _act(self, controller: BuiltController, event: Event) -> None:
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


def _agreed(looked_at: list[BuiltController], held: list[bool], event: Event) -> list[bool]:
    """What holds on any process, for those that steer training; the others' logs are each process's own."""
    steering = [index for index, one in enumerate(looked_at) if one.steers]
    if not steering:
        return held
    import torch

    flags = torch.tensor([held[index] for index in steering], dtype=torch.uint8, device=event.args.device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flags[steering.index(index)]) if index in steering else one for index, one in enumerate(held)]


def make_controllers(section: TrainerController) -> Controllers:
    """The controllers of a section.

    Raises:
        ConfigError: one cannot be made.
    """
    try:
        return Controllers(build(section))
    except ConfigError as error:
        raise ConfigError(f"trainer_controller: {error}") from error


def controller_callback(controllers: Controllers) -> TrainerCallback:
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
