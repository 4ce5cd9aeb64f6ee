"""One text: a column of it, or what a template makes of the columns.

One text in which a template tells where the response begins.

Token ids, ready: `input_ids` and `labels`.

Prompts that the model continues itself: `prompt_messages`, or `messages` or `prompt`, without a last answer."""

from __future__ import annotations

import re

from finetuning.data.formats.messages import chat_field
from finetuning.data.formats.row_format import (
    PLAIN,
    FieldError,
    Options,
    RowFormat,
    problem_of,
    require_columns,
    template_kwargs_field,
    text_field,
    tools_field,
)
from finetuning.data.samples import Prompt, Row, Text, TokenIds, json_type
from finetuning.data.text_template import TextTemplateError
from finetuning.errors import Problem

TEXT_COLUMNS = ("text",)


def parse_text(row: Row, options: Options = PLAIN) -> Text | Problem:
    """The text, all of it trained."""
    try:
        return Text(text_of(row, options), row.place, None, options.add_eos)
    except FieldError as error:
        return problem_of(row, error)


def text_of(row: Row, options: Options) -> str:
    """What the row says: through the template, where there is one."""
    if options.formatter is None:
        require_columns(row, (options.text_field,), "text")
        return text_field(row, options.text_field)
    try:
        return options.formatter(row.values, options.special_tokens)
    except TextTemplateError as error:
        raise FieldError("", str(error)) from None


TEXT = RowFormat("text", TEXT_COLUMNS, parse_text)


ABSENT = "the response template is not in the text"
NOTHING_AFTER = "nothing comes after the response template"
SEVERAL = "the response template is in the text more than once: the last counts"


def parse_response_template(row: Row, options: Options = PLAIN) -> Text | Problem:
    """The text, of which the response is trained; templates are looked for in the text, not in its tokens."""
    try:
        text = text_of(row, options)
    except FieldError as error:
        return problem_of(row, error)
    template = options.response_template or ""
    if options.instruction_template:
        spans, several = _responses(text, template, options.instruction_template), False
    else:
        found = text.rfind(template)
        spans = ((found + len(template), len(text)),) if found >= 0 else ()
        several = text.count(template) > 1
    fault = None
    if not spans:
        fault = f"{ABSENT}: {template!r}"
    elif not any(text[start:end].strip() for start, end in spans):
        fault = NOTHING_AFTER
    if options.completions == "all" and fault is None:
        return Text(text, row.place, None, options.add_eos)
    if options.completions == "last":
        spans = spans[-1:]
    return Text(text, row.place, spans, options.add_eos, frozenset({SEVERAL} if several else ()), fault)


def _responses(text: str, response: str, instruction: str) -> tuple[tuple[int, int], ...]:
    """From the end of each response template that follows an instruction, or the beginning, to the next instruction.

    Without any instruction, or any response, there is none; a template inside a response is part of it.
    """
    pattern = re.compile(f"(?P<response>{re.escape(response)})|{re.escape(instruction)}")
    if len(instruction) > len(response) and instruction.startswith(response):
        pattern = re.compile(f"{re.escape(instruction)}|(?P<response>{re.escape(response)})")
    spans: list[tuple[int, int]] = []
    start: int | None = None
    instructions = 0
    for match in pattern.finditer(text):
        if match["response"]:
            start = match.end() if start is None else start
            continue
        instructions += 1
        if start is not None:
            spans.append((start, match.start()))
        start = None
    if start is not None and start < len(text):
        spans.append((start, len(text)))
    return tuple(spans) if instructions else ()


RESPONSE_TEMPLATE = RowFormat("response_template", TEXT_COLUMNS, parse_response_template)


TOKENS_COLUMNS = ("input_ids", "labels")


def parse_tokens(row: Row, options: Options = PLAIN) -> TokenIds | Problem:
    """The ids as they are; every label is -100 or the id at its place."""
    try:
        require_columns(row, TOKENS_COLUMNS, "tokens")
        ids, labels = (_ids(row, column) for column in TOKENS_COLUMNS)
        if len(ids) != len(labels):
            raise FieldError("labels", f"has {len(labels)} items, input_ids has {len(ids)}")
        for index, (one, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (-100, one):
                raise FieldError(f"labels[{index}]", f"is {label}; expected -100 or {one}, the token at its place")
        return TokenIds(ids, labels, row.place)
    except FieldError as error:
        return problem_of(row, error)


def _ids(row: Row, column: str) -> list[int]:
    value = row.values[column]
    if not isinstance(value, list):
        raise FieldError(column, f"expected a list of numbers, got {json_type(value)}")
    if not value:
        raise FieldError(column, "needs at least one token, got an empty list")
    for index, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, int):
            raise FieldError(f"{column}[{index}]", f"expected a whole number, got {json_type(one)}")
    return value


TOKENS = RowFormat("tokens", TOKENS_COLUMNS, parse_tokens)


PROMPT_COLUMNS = ("prompt_messages",)
_NOT_FOR_REWARDS = ("prompt_messages", "messages", "tools", "chat_template_kwargs", "documents")
_SPELLINGS = ("prompt_messages", "messages", "prompt")
RESERVED = (
    "prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
    "environments", "image", "images",
)  # fmt: skip
"""Names that the trainer gives to rewards itself, so that no column can have them."""


def parse_prompt(row: Row, options: Options = PLAIN) -> Prompt | Problem:
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


PROMPT = RowFormat("prompt", PROMPT_COLUMNS, parse_prompt)
