"""Row formats of plain text, token ids and prompts.

- `text`: a column, or what a template makes of several columns; all of it is trained.
- `response_template`: the same, but only what comes after a given text, such as `### Response:`, is trained.
- `segments`: parts of one text, each with a label that says whether it is trained; with all special tokens written out.
- `tokens`: `input_ids` and `labels` of a dataset that is already tokenized.
- `prompt`: messages without a last answer, which the model generates, as in GRPO.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from finetuning.data.formats.messages import chat_field, with_system
from finetuning.data.formats.row_format import (
    DEFAULT_OPTIONS,
    FieldError,
    Options,
    RowFormat,
    problem_of,
    require_columns,
    template_kwargs_field,
    text_field,
    tools_field,
    truth_value,
)
from finetuning.data.samples import JsonValue, Prompt, Row, Text, TokenIds, json_type
from finetuning.data.text_template import TextTemplateError
from finetuning.errors import Problem

TEXT_COLUMNS = ("text",)


def parse_text(row: Row, options: Options = DEFAULT_OPTIONS) -> Text | Problem:
    """Return the text of a row, all of it trained."""
    try:
        return Text(text_of(row, options), row.location, None, options.add_eos)
    except FieldError as error:
        return problem_of(row, error)


def text_of(row: Row, options: Options) -> str:
    """Return the text of a row, from its column or from the template."""
    if options.formatter is None:
        require_columns(row, (options.text_field,), "text")
        return text_field(row, options.text_field)
    try:
        return options.formatter(row.values, options.special_tokens)
    except TextTemplateError as error:
        raise FieldError("", str(error)) from None


TEXT = RowFormat("text", TEXT_COLUMNS, parse_text)


NO_RESPONSE_TEMPLATE = "the response template is not in the text"
EMPTY_RESPONSE = "nothing comes after the response template"
SEVERAL_RESPONSES = "the response template is in the text more than once: the last one counts"


def parse_response_template(row: Row, options: Options = DEFAULT_OPTIONS) -> Text | Problem:
    """Return the text of a row, with its responses to train on.

    Templates are searched in the text and not in its tokens, which may differ from those of the template alone.
    """
    try:
        text = text_of(row, options)
    except FieldError as error:
        return problem_of(row, error)
    template = options.response_template or ""
    if options.instruction_template:
        spans, has_several = _responses(text, template, options.instruction_template), False
    else:
        start = text.rfind(template)
        spans = ((start + len(template), len(text)),) if start >= 0 else ()
        has_several = text.count(template) > 1
    fault = None
    if not spans:
        fault = f"{NO_RESPONSE_TEMPLATE}: {template!r}"
    elif not any(text[start:end].strip() for start, end in spans):
        fault = EMPTY_RESPONSE
    if options.completions == "all" and fault is None:
        return Text(text, row.location, None, options.add_eos)
    if options.completions == "last":
        spans = spans[-1:]
    return Text(
        text, row.location, spans, options.add_eos, frozenset({SEVERAL_RESPONSES} if has_several else ()), fault
    )


def _responses(text: str, response: str, instruction: str) -> tuple[tuple[int, int], ...]:
    """Return the responses: each from the end of a response template to the next instruction template or the end.

    There is none if either template does not occur. A response template inside a response is part of it.
    """
    pattern = re.compile(f"(?P<response>{re.escape(response)})|{re.escape(instruction)}")
    # Alternatives are tried in order: of two templates where one begins with the other, the longer comes first.
    if len(instruction) > len(response) and instruction.startswith(response):
        pattern = re.compile(f"{re.escape(instruction)}|(?P<response>{re.escape(response)})")
    spans: list[tuple[int, int]] = []
    start: int | None = None
    num_instructions = 0
    for match in pattern.finditer(text):
        if match["response"]:
            start = match.end() if start is None else start
            continue
        num_instructions += 1
        if start is not None:
            spans.append((start, match.start()))
        start = None
    if start is not None and start < len(text):
        spans.append((start, len(text)))
    return tuple(spans) if num_instructions else ()


RESPONSE_TEMPLATE = RowFormat("response_template", TEXT_COLUMNS, parse_response_template)


SEGMENTS_COLUMNS = ("segments",)


def has_segments(values: Mapping[str, object]) -> bool:
    """Return whether a row has a list of parts of a text."""
    parts = values.get("segments")
    first = cast("list[object]", parts)[0] if isinstance(parts, list) and parts else None
    return isinstance(first, dict) and "text" in first


def parse_segments(row: Row, options: Options = DEFAULT_OPTIONS) -> Text | Problem:
    """Return the parts of a row as one text, of which those with a true `label` are trained. Nothing is added to it."""
    try:
        require_columns(row, SEGMENTS_COLUMNS, "segments")
        parts: JsonValue = row.values["segments"]
        if not isinstance(parts, list):
            raise FieldError("segments", f"expected a list, got {json_type(parts)}")
        texts: list[str] = []
        spans: list[tuple[int, int]] = []
        size = 0
        part: JsonValue
        for index, part in enumerate(parts):
            key = f"segments[{index}]"
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.keys() - {"text", "label"}:
                raise FieldError(key, "expected an object with a text and a label")
            text: str = part["text"]
            if truth_value(part.get("label"), f"{key}.label") and text:
                spans.append((size, size + len(text)))
            texts.append(text)
            size += len(text)
        trained = (
            None if options.completions == "all" else tuple(spans[-1:] if options.completions == "last" else spans)
        )
        fault = None if trained is None or trained else "no segment has a true label"
        return Text("".join(texts), row.location, trained, add_eos=False, fault=fault, is_templated=True)
    except FieldError as error:
        return problem_of(row, error)


SEGMENTS = RowFormat("segments", SEGMENTS_COLUMNS, parse_segments, has_segments)


TOKENS_COLUMNS = ("input_ids", "labels")


def parse_tokens(row: Row, options: Options = DEFAULT_OPTIONS) -> TokenIds | Problem:
    """Return the token ids and labels of a row; every label must be -100 or the id at its position."""
    try:
        require_columns(row, TOKENS_COLUMNS, "tokens")
        ids, labels = (_ids(row, column) for column in TOKENS_COLUMNS)
        if len(ids) != len(labels):
            raise FieldError("labels", f"has {len(labels)} items, input_ids has {len(ids)}")
        for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (-100, token):
                raise FieldError(
                    f"labels[{index}]", f"is {label}; expected -100 or {token}, the token at this position"
                )
        return TokenIds(ids, labels, row.location)
    except FieldError as error:
        return problem_of(row, error)


def _ids(row: Row, column: str) -> list[int]:
    value: JsonValue = row.values[column]
    if not isinstance(value, list):
        raise FieldError(column, f"expected a list of numbers, got {json_type(value)}")
    if not value:
        raise FieldError(column, "needs at least one token, got an empty list")
    for index, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int):
            raise FieldError(f"{column}[{index}]", f"expected an integer, got {json_type(token)}")
    return value


TOKENS = RowFormat("tokens", TOKENS_COLUMNS, parse_tokens)


PROMPT_COLUMNS = ("prompt_messages",)
_PROMPT_FIELDS = ("prompt_messages", "messages", "tools", "chat_template_kwargs", "documents")
_COLUMN_NAMES = ("prompt_messages", "messages", "prompt")
RESERVED = (
    "prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
    "environments", "image", "images",
)  # fmt: skip
"""Arguments with which the trainer calls reward functions; no column can have one of these names."""


def parse_prompt(row: Row, options: Options = DEFAULT_OPTIONS) -> Prompt | Problem:
    """Return the prompt of a row with its other columns, which reward functions can read, or what is wrong with it."""
    try:
        key = next((name for name in _COLUMN_NAMES if name in row.values), "prompt_messages")
        require_columns(row, (key,), "prompt")
        messages = with_system(row, chat_field(row, key))
        if messages[-1]["role"] == "assistant":
            raise FieldError(
                f"{key}[{len(messages) - 1}]", "is an answer, but the model generates the answer: remove it"
            )
        reserved = [name for name in RESERVED if name in row.values and name != key]
        if reserved:
            raise FieldError(reserved[0], "is the name of another argument of reward functions: rename the column")
        return Prompt(
            messages=messages,
            columns={name: row.values[name] for name in row.values if name not in (*_PROMPT_FIELDS, key)},
            location=row.location,
            tools=tools_field(row),
            template_kwargs=template_kwargs_field(row),
        )
    except FieldError as error:
        return problem_of(row, error)


def _has_prompt(values: Mapping[str, object]) -> bool:
    return any(isinstance(values.get(name), list) for name in _COLUMN_NAMES)


PROMPT = RowFormat("prompt", PROMPT_COLUMNS, parse_prompt, _has_prompt)
