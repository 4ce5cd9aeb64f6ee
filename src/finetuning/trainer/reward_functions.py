"""Reward functions of GRPO: a small built-in set, and user functions by import path."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from finetuning.config.sections.rewards import (
    ExactMatchReward,
    FunctionReward,
    GRPOArgs,
    JsonReward,
    LengthReward,
    RegexReward,
)
from finetuning.errors import ConfigError, Location
from finetuning.trainer.user_code import UserErrors, load_object

Completion = list[dict[str, str]]
"""A completion as chat messages: a single message of the assistant."""
Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]


@runtime_checkable
class _Array(Protocol):
    """A NumPy array or a tensor."""

    def tolist(self) -> object: ...


@dataclass
class NamedReward:
    """A reward function that checks what the function returns, and has a name for logs and error messages."""

    name: str
    location: Location
    function: Callable[..., object]
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])
    has_judged: bool = False
    """Whether it has returned a reward for any completion."""

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, prompts: list[object], completions: list[Completion], **kwargs: object) -> Rewards:
        """Return one reward per completion, None for a completion that is not judged.

        `kwargs` holds `completion_ids`, the rows' columns as lists, and what the trainer adds to them. The function
        gets the keywords that its signature names, or all of them if it accepts `**kwargs`.

        Raises:
            ConfigError: the function raises, or returns something else.
        """
        available = {"prompts": prompts, "completions": completions, **kwargs}
        with UserErrors(self.error):
            returned = self.function(**_accepted(self.function, available), **self.arguments)
        if not isinstance(returned, Sequence | _Array):
            raise self.error(f"returned {type(returned).__name__}, not a list of numbers")
        values: object = returned.tolist() if isinstance(returned, _Array) else list(returned)
        if not isinstance(values, list) or len(values) != len(completions):
            count = len(values) if isinstance(values, list) else 1
            raise self.error(f"returned {count} rewards for {len(completions)} completions")
        rewards = [self._number(value, index) for index, value in enumerate(values)]
        self.has_judged = self.has_judged or any(reward is not None for reward in rewards)
        return rewards

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

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"the reward function {self.name} {message}", location=self.location)


def _accepted(function: Callable[..., object], available: dict[str, object]) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return available
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in available.items() if name in names}


def build_rewards(args: GRPOArgs) -> list[NamedReward]:
    """Return the reward functions of a config.

    Raises:
        ConfigError: a function cannot be imported.
    """
    rewards = []
    for index, conf in enumerate(args.rewards):
        location = Location(key=f"grpo_args.rewards[{index}]")
        if isinstance(conf, FunctionReward):
            rewards.append(NamedReward(conf.path, location, load_function(conf.path, location), dict(conf.arguments)))
        else:
            rewards.append(NamedReward(conf.type, location, _BUILT_IN[type(conf)](conf)))
    return _with_unique_names(rewards)


def _with_unique_names(rewards: list[NamedReward]) -> list[NamedReward]:
    """Number the rewards that share a name, because TRL logs their means by name."""
    names = [reward.name for reward in rewards]
    return [
        NamedReward(f"{reward.name}-{index}", reward.location, reward.function, reward.arguments)
        if names.count(reward.name) > 1
        else reward
        for index, reward in enumerate(rewards)
    ]


def needed_columns(args: GRPOArgs) -> dict[str, str]:
    """Return the columns that rows must have, each with what needs it for error messages."""
    return {conf.column: f"the reward {conf.type}" for conf in args.rewards if isinstance(conf, ExactMatchReward)}


def read_columns(args: GRPOArgs) -> frozenset[str] | None:
    """Return the columns that the rewards of a config may read; None for all, where a function takes any.

    Raises:
        ConfigError: a function cannot be imported.
    """
    names = set(needed_columns(args))
    for index, conf in enumerate(args.rewards):
        if isinstance(conf, FunctionReward):
            function = load_function(conf.path, Location(key=f"grpo_args.rewards[{index}]"))
            parameters = inspect.signature(function).parameters.values()
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return None
            names |= {parameter.name for parameter in parameters}
    return frozenset(names)


def load_function(path: str, location: Location) -> Callable[..., object]:
    """Return the function at `package.module:function` or `path/to/file.py:function`.

    Raises:
        ConfigError: it does not exist, cannot be imported, or is asynchronous.
    """
    function = load_object(path, location, "reward function")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"the reward function {path} is async; async functions are not supported", location=location)
    return function


def completion_text(completion: Completion) -> str:
    """Return the text of a completion."""
    return completion[0].get("content") or ""


def exact_match(conf: ExactMatchReward) -> RewardFunction:
    """Return a function that gives 1.0 where the answer equals one in the row's column, else 0.0."""

    def normalize(text: str) -> str:
        return text.strip().lower() if conf.ignore_case else text.strip()

    def extract_answer(text: str) -> str | None:
        """Return the last match of the pattern, or its first group if it has one."""
        if conf.pattern is None:
            return normalize(text)
        matches = list(re.finditer(conf.pattern, text, re.DOTALL))
        return normalize(matches[-1][min(1, matches[-1].re.groups)] or "") if matches else None

    def reward(completions: list[Completion], **columns: list[object]) -> Rewards:
        values: Rewards = []
        for completion, expected in zip(completions, columns[conf.column], strict=True):
            answers = expected if isinstance(expected, list) else [expected]
            texts = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in answers]
            is_correct = extract_answer(completion_text(completion)) in [normalize(text) for text in texts]
            values.append(float(is_correct))
        return values

    return reward


def regex_match(conf: RegexReward) -> RewardFunction:
    """Return a function that gives 1.0 where the pattern occurs in the completion, else 0.0."""
    pattern = re.compile(conf.pattern, re.DOTALL)

    def reward(completions: list[Completion]) -> Rewards:
        return [float(pattern.search(completion_text(completion)) is not None) for completion in completions]

    return reward


def json_valid(conf: JsonReward) -> RewardFunction:
    """Return a function that gives 1.0 where the completion is JSON with the configured keys, else 0.0."""

    def is_valid(text: str) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return not conf.keys or (isinstance(value, dict) and set(conf.keys) <= set(value))

    def reward(completions: list[Completion]) -> Rewards:
        return [float(is_valid(completion_text(completion))) for completion in completions]

    return reward


def target_length(conf: LengthReward) -> RewardFunction:
    """Return a function that gives 1.0 at the target number of tokens, falling linearly to 0.0 at 0 and twice that."""

    def reward(completion_ids: list[list[int]]) -> Rewards:
        return [max(0.0, 1 - abs(len(ids) - conf.target) / conf.target) for ids in completion_ids]

    return reward


_BUILT_IN: dict[type, Callable[[Any], RewardFunction]] = {
    ExactMatchReward: exact_match,
    RegexReward: regex_match,
    JsonReward: json_valid,
    LengthReward: target_length,
}
