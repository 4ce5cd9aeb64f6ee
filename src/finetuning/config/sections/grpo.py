"""`training_args` and `grpo_args` of group relative policy optimisation: how completions are made and rewarded."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from finetuning.config.sections.section import Section
from finetuning.config.sections.training import TrainingArgs


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]


class _Reward(Section):
    weight: float = 1.0
    """Factor on this reward in the sum of all."""


class ExactMatch(_Reward):
    """1 for a completion that is a right answer, but for white space around it; 0 for any other."""

    type: Literal["exact_match"]
    column: str = "correct_answers"
    """The rows' column with the right answer, or a list of answers each of which is right."""
    pattern: Pattern | None = None
    """Regular expression of the answer within the completion: its first group, or all of it, of its last match."""
    ignore_case: bool = False
    """Take capital and small letters for the same."""


class RegexMatch(_Reward):
    """1 for a completion in which a regular expression is found; 0 for any other."""

    type: Literal["regex"]
    pattern: Pattern
    """The regular expression; a dot matches line breaks, too. Begin with `^` and end with `$` to match all of it."""


class JsonValid(_Reward):
    """1 for a completion that is JSON, and has the keys asked for; 0 for any other."""

    type: Literal["json_valid"]
    keys: list[str] = Field(default_factory=list)
    """Keys that the completion, an object then, must have."""


class Length(_Reward):
    """1 for a completion of `target` tokens, falling in a line to 0 at none and at twice as many."""

    type: Literal["length"]
    target: int = Field(gt=0)
    """Number of tokens wanted, the end of the turn among them."""


class Function(_Reward):
    """What a function of yours returns: one number a completion, or None for a completion that it does not judge."""

    type: Literal["function"]
    path: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """`package.module:function`, or `path/to/file.py:function`. Running this config runs that code."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the function."""


Reward = Annotated[ExactMatch | RegexMatch | JsonValid | Length | Function, Field(discriminator="type")]


class GRPOArgs(Section):
    """What completions are rewarded for."""

    rewards: Annotated[list[Reward], Field(min_length=1)]
    """The rewards; their weighted sum is what the model learns to raise."""
    max_prompt_length: int | None = Field(default=2048, gt=0)
    """Most tokens of a prompt; longer ones are left out."""


class GRPOTrainingArgs(TrainingArgs):
    """Arguments of the GRPO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    num_generations: int = Field(default=8, gt=1)
    """Completions of each prompt, which are held against each other. `total_train_batch_size` counts completions and
    must be a multiple of it."""
    max_completion_length: int = Field(default=256, gt=0)
    """Most tokens of a completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature that completions are sampled at."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of the probability that completions are sampled from."""
    top_k: int = Field(default=0, ge=0)
    """Number of likeliest tokens that completions are sampled from; 0 for all."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference model; 0 does without one."""
    epsilon: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may move before it is clipped."""
    num_iterations: int = Field(default=1, gt=0)
    """How often each batch of completions is trained on."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How the losses of tokens become one."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Over what the rewards' standard deviation is taken that they are divided by."""
    mask_truncated_completions: bool = False
    """Leave completions out of the loss that did not end by themselves."""
