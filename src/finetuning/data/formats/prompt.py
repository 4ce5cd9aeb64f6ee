"""Prompts that the model continues itself: `prompt_messages`, or `messages` or `prompt`, without a last answer."""

from __future__ import annotations

from finetuning.data.formats.fields import (
    problem_of,
    require_columns,
    template_kwargs_field,
    tools_field,
)
from finetuning.data.formats.messages import chat_field
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Prompt, Row
from finetuning.errors import Problem

COLUMNS = ("prompt_messages",)
_NOT_FOR_REWARDS = ("prompt_messages", "messages", "tools", "chat_template_kwargs", "documents")
_SPELLINGS = ("prompt_messages", "messages", "prompt")
RESERVED = (
    "prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
    "environments", "image", "images",
)  # fmt: skip
"""Names that the trainer gives to rewards itself, so that no column can have them."""


def parse(row: Row, options: Options = PLAIN) -> Prompt | Problem:
    """The row's prompt, or what is wrong with it."""
    try:
        key = next((name for name in _SPELLINGS if name in row.values), "prompt_messages")
        require_columns(row, (key,), "prompt")
        messages = chat_field(row, key)
        if messages[-1]["role"] == "assistant":
            raise FieldError(
                f"{key}[{len(messages) - 1}]", "is an answer, and the model is to write the answer: leave it out"
            )
        taken = [name for name in RESERVED if name in row.values and name != key]
        if taken:
            raise FieldError(taken[0], "rewards are given something else by that name: rename the column")
        return Prompt(
            messages=messages,
            columns={name: value for name, value in row.values.items() if name not in (*_NOT_FOR_REWARDS, key)},
            place=row.place,
            tools=tools_field(row),
            template_kwargs=template_kwargs_field(row),
        )
    except FieldError as error:
        return problem_of(row, error)


FORMAT = RowFormat("prompt", COLUMNS, parse)
