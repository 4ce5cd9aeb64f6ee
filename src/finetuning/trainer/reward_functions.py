"""What GRPO rewards completions for: a small set, and functions of the user's by import path."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from finetuning.config.sections.rewards import (
    ExactMatchReward,
    FunctionReward,
    GRPOArgs,
    JsonReward,
    LengthReward,
    RegexReward,
)
from finetuning.errors import ConfigError, FinetuningError, Location

Completion = list[dict[str, Any]]
"""One completion as chat messages: a single message of the assistant."""
Values = list[float | None]


@dataclass(frozen=True)
class NamedReward:
    """A reward that checks what its function returns, and names itself where that is wrong."""

    name: str
    place: Location
    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, prompts: list[Any], completions: list[Completion], **told: Any) -> Values:
        """One number a completion, None for one that is not judged.

        `told` holds `completion_ids`, the rows' columns as lists, and what the trainer adds to them. A function is
        given what its signature names; all of it when it takes any keyword.

        Raises:
            ConfigError: the function raises, or returns something else.
        """
        given = {"prompts": prompts, "completions": completions, **told}
        with _Named(self):
            returned = self.function(**_accepted(self.function, given), **self.arguments)
        if not isinstance(returned, Sequence) and not hasattr(returned, "tolist"):
            raise self.error(f"returned {type(returned).__name__}, not a list of numbers")
        values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
        if not isinstance(values, list) or len(values) != len(completions):
            count = len(values) if isinstance(values, list) else 1
            raise self.error(f"returned {count} rewards for {len(completions)} completions, not one for each")
        return [self._number(value, index) for index, value in enumerate(values)]

    def _number(self, value: Any, index: int) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self.error(f"returned {value!r:.60} for completion {index}; a reward is a number or None") from None
        if not math.isfinite(number):
            raise self.error(f"returned {number} for completion {index}; a reward must be finite")
        return number

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"the reward {self.name} {what}", place=self.place)


class _Named(AbstractContextManager["_Named"]):
    """Says of whatever a user's function raises which reward it was, and where. Running out of memory passes."""

    def __init__(self, reward: NamedReward):
        self._reward = reward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, FinetuningError | MemoryError):
            return
        if kind is not None and kind.__name__ == "OutOfMemoryError":
            return
        last = traceback.extract_tb(trace)[-1]
        text = f"raised {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        raise self._reward.error(text) from error


def _accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in given.items() if name in names}


def build_rewards(args: GRPOArgs) -> list[NamedReward]:
    """The rewards of a config, ready to be called.

    Raises:
        ConfigError: a function cannot be imported.
    """
    made = []
    for index, conf in enumerate(args.rewards):
        place = Location(key=f"grpo_args.rewards[{index}]")
        if isinstance(conf, FunctionReward):
            made.append(NamedReward(conf.path, place, load_function(conf.path, place), dict(conf.arguments)))
        else:
            made.append(NamedReward(conf.type, place, _OWN[type(conf)](conf)))
    return _with_names_of_their_own(made)


def _with_names_of_their_own(rewards: list[NamedReward]) -> list[NamedReward]:
    """The rewards, those of one name numbered: their means are logged by name."""
    names = [reward.name for reward in rewards]
    return [
        NamedReward(f"{reward.name}-{index}", reward.place, reward.function, reward.arguments)
        if names.count(reward.name) > 1
        else reward
        for index, reward in enumerate(rewards)
    ]


def needed_columns(args: GRPOArgs) -> dict[str, str]:
    """The columns that rows must have, each with what needs it."""
    return {conf.column: f"the reward {conf.type}" for conf in args.rewards if isinstance(conf, ExactMatchReward)}


def load_function(path: str, place: Location) -> Callable[..., Any]:
    """The function that `package.module:function` or `file.py:function` names.

    Raises:
        ConfigError: it is not there, cannot be imported, or is no plain function.
    """
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ConfigError(f"there is no file {where}", place=place)
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        module = importlib.util.module_from_spec(spec)
        with _Named(NamedReward(path, place, load_function)):
            spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise ConfigError(
                f"the reward {path} cannot be imported: {error}",
                place=place,
                hint=f"Install its package, set PYTHONPATH, or name its file: path/to/rewards.py:{name}.",
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{where} has no function {name}", place=place, hint=f"It has: {', '.join(known) or 'none'}.")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"the reward {path} is async; it must be a plain function", place=place)
    return function


def text_of(completion: Completion) -> str:
    """What the model wrote."""
    return completion[0].get("content") or ""


def exact_match(conf: ExactMatchReward) -> Callable[..., Values]:
    def tidy(text: str) -> str:
        return text.strip().lower() if conf.ignore_case else text.strip()

    def answer(text: str) -> str | None:
        if conf.pattern is None:
            return tidy(text)
        found = list(re.finditer(conf.pattern, text, re.DOTALL))
        return tidy(found[-1][min(1, found[-1].re.groups)] or "") if found else None

    def reward(completions: list[Completion], **columns: list[Any]) -> Values:
        values = []
        for completion, right in zip(completions, columns[conf.column], strict=True):
            answers = right if isinstance(right, list) else [right]
            texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in answers]
            values.append(float(answer(text_of(completion)) in [tidy(text) for text in texts]))
        return values

    return reward


def regex(conf: RegexReward) -> Callable[..., Values]:
    pattern = re.compile(conf.pattern, re.DOTALL)

    def reward(completions: list[Completion]) -> Values:
        return [float(pattern.search(text_of(completion)) is not None) for completion in completions]

    return reward


def json_valid(conf: JsonReward) -> Callable[..., Values]:
    def is_right(text: str) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return not conf.keys or (isinstance(value, dict) and set(conf.keys) <= set(value))

    def reward(completions: list[Completion]) -> Values:
        return [float(is_right(text_of(completion))) for completion in completions]

    return reward


def length(conf: LengthReward) -> Callable[..., Values]:
    def reward(completion_ids: list[list[int]]) -> Values:
        return [max(0.0, 1 - abs(len(ids) - conf.target) / conf.target) for ids in completion_ids]

    return reward


_OWN: dict[type, Callable[[Any], Callable[..., Values]]] = {
    ExactMatchReward: exact_match,
    RegexReward: regex,
    JsonReward: json_valid,
    LengthReward: length,
}
