"""The operations that a controller can run. Adding one is a class here and an entry in `OPERATIONS`."""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Mapping, Sequence

from finetuning.callbacks.controller.metrics import Event
from finetuning.errors import ConfigError

logger = logging.getLogger(__name__)

_MAX_WIDTH = 100


class Operation:
    """A group of actions: the methods that begin with `should_`.

    Subclass this for an operation of your own; `arguments` of the config are passed as keyword arguments.
    `affects_training` says whether its actions change what the trainer does: all processes must then run them.
    """

    affects_training = True

    def __init__(self, name: str):
        self.name = name

    def state_dict(self) -> Mapping[str, object]:
        """Return what a resumed run needs: numbers, texts, and lists and dictionaries of them. By default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""

    def action(self, name: str) -> Callable[[Event, Mapping[str, object]], None]:
        """Return the action of this name: a function of the event and of the metrics by name.

        Raises:
            ConfigError: there is no such action.
        """
        action = getattr(self, name, None) if name.startswith("should_") else None
        if not callable(action):
            raise ConfigError(f'operation "{self.name}" has no action "{name}"')
        return action  # pyright: ignore[reportReturnType]


class HFControls(Operation):
    """Sets the flags of `TrainerControl`: the trainer stops, saves, evaluates or logs at its next check."""

    def should_training_stop(self, event: Event, metrics: Mapping[str, object]) -> None:
        event.control.should_training_stop = True

    def should_epoch_stop(self, event: Event, metrics: Mapping[str, object]) -> None:
        event.control.should_epoch_stop = True

    def should_save(self, event: Event, metrics: Mapping[str, object]) -> None:
        event.control.should_save = True

    def should_evaluate(self, event: Event, metrics: Mapping[str, object]) -> None:
        event.control.should_evaluate = True

    def should_log(self, event: Event, metrics: Mapping[str, object]) -> None:
        event.control.should_log = True


class LogControl(Operation):
    """Writes a log line in the user's format, with `{event_name}`, `{control_name}`, `{args}`, `{state}`, the metrics
    by name, and the event's `{metrics}`, `{logs}` or `{path}`."""

    affects_training = False

    def __init__(self, name: str, log_format: str, log_level: str):
        super().__init__(name)
        level = getattr(logging, str(log_level).upper(), None)
        if not isinstance(level, int):
            raise ConfigError(f'operation "{name}": "{log_level}" is not a log level')
        self._level = level
        self._format = log_format

    def should_log(self, event: Event, metrics: Mapping[str, object]) -> None:
        values = {"event_name": event.name, "args": event.args, "state": event.state, **event.extra, **metrics}
        try:
            text = _PublicFormatter().vformat(self._format, (), values)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            text = f'operation "{self.name}" cannot format its message: {type(error).__name__}: {error}'
        logger.log(self._level, "%s", text)


class _PublicFormatter(string.Formatter):
    """Python's format strings, without private attributes and large widths."""

    def get_field(self, field_name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        if any(part.startswith("_") for part in field_name.replace("[", ".").split(".")):
            raise ValueError(f'"{field_name}" is private')
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: object, format_spec: str) -> str:
        digits = "".join(character if character.isdigit() else " " for character in format_spec).split()
        if any(len(number) > 3 or int(number) > _MAX_WIDTH for number in digits):
            raise ValueError(f'the width of "{format_spec}" is above {_MAX_WIDTH}')
        return super().format_field(value, format_spec)


OPERATIONS: dict[str, type[Operation]] = {"HFControls": HFControls, "LogControl": LogControl}
"""The operations by the names of their classes in the YAML."""
