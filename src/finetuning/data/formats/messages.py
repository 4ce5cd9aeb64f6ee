"""Chats: `{"messages": [{"role": …, "content": …}, …]}`."""

from __future__ import annotations

from finetuning.data.formats.fields import (
    FieldError,
    RowFormat,
    messages_field,
    meta_fields,
    problem_of,
    require_columns,
    template_kwargs_field,
    tools_field,
)
from finetuning.data.rows import Conversation, Row
from finetuning.errors import Problem

COLUMNS = ("messages",)


def parse(row: Row) -> Conversation | Problem:
    """The row's conversation, or what is wrong with it."""
    try:
        require_columns(row, COLUMNS, "messages")
        return Conversation(
            messages=messages_field(row, "messages"),
            place=row.place,
            tools=tools_field(row),
            template_kwargs=template_kwargs_field(row),
            meta=meta_fields(row),
        )
    except FieldError as error:
        return problem_of(row, error)


FORMAT = RowFormat("messages", COLUMNS, parse)
