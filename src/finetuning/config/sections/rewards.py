"""`grpo_args`: how GRPO rewards completions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from finetuning.config.sections.section import ConfigSection


def _check_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a valid regular expression: {error}") from None
    return value


Pattern = Annotated[str, AfterValidator(_check_pattern)]


class _Reward(ConfigSection):
    weight: float = 1.0
    """Weight of this reward in the sum of all rewards."""


class ExactMatchReward(_Reward):
    """1 if the completion equals a correct answer, ignoring surrounding whitespace; otherwise 0."""

    type: Literal["exact_match"]
    column: str = "correct_answers"
    """Column with the correct answer, or with a list of correct answers."""
    pattern: Pattern | None = None
    """Regular expression that extracts the answer from the completion: the first group of its last match, or the whole
    match if there is no group."""
    ignore_case: bool = False
    """Ignore upper and lower case."""


class RegexReward(_Reward):
    """1 if a regular expression matches anywhere in the completion; otherwise 0."""

    type: Literal["regex"]
    pattern: Pattern
    """Regular expression. A dot also matches line breaks. Start it with `^` and end it with `$` to match the whole
    completion."""


class JsonReward(_Reward):
    """1 if the completion is valid JSON and has the required keys; otherwise 0."""

    type: Literal["json_valid"]
    keys: list[str] = Field(default_factory=list)
    """Required keys. If there are any, the completion must be a JSON object."""


class LengthReward(_Reward):
    """1 for a completion of `target` tokens, decreasing linearly to 0 at no tokens and at twice as many."""

    type: Literal["length"]
    target: int = Field(gt=0)
    """Target number of tokens, including the end-of-turn token."""


class FunctionReward(_Reward):
    """The return value of a Python function: one number per completion, or None to skip a completion."""

    type: Literal["function"]
    path: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """`package.module:function` or `path/to/file.py:function`. Running the config runs this code."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Additional keyword arguments of the function."""


Reward = Annotated[
    ExactMatchReward | RegexReward | JsonReward | LengthReward | FunctionReward, Field(discriminator="type")
]


class GRPOArgs(ConfigSection):
    """Reward functions and prompt length."""

    rewards: Annotated[list[Reward], Field(min_length=1)]
    """Reward functions. Training maximizes their weighted sum."""
    max_prompt_length: int | None = Field(default=2048, gt=0)
    """Maximum number of tokens of a prompt. Rows with longer prompts are dropped."""
