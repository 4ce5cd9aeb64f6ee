"""Chats: `{"messages": [{"role": …, "content": …}, …]}`, and the other names that they go by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetuning.data.formats.choice import choose_turns
from finetuning.data.formats.fields import (
    besides_messages,
    is_plain,
    messages_field,
    problem_of,
    require_columns,
    text_field,
)
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Conversation, Message, Row
from finetuning.errors import Problem

COLUMNS = ("messages",)
SPELLINGS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


def fits(values: Mapping[str, Any]) -> bool:
    """Whether a column has one of the names, and a list in it, or the JSON text of one."""
    return spelling(values) is not None


def spelling(values: Mapping[str, Any]) -> str | None:
    """The column that holds the messages."""
    for name in SPELLINGS:
        value = values.get(name)
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[")):
            return name
    return None


def parse(row: Row, options: Options = PLAIN) -> Conversation | Problem:
    """The row's conversation, or what is wrong with it."""
    try:
        column = spelling(row.values) or "messages"
        if column == "messages":
            require_columns(row, COLUMNS, "messages")
        found = chat_field(row, column)
        if isinstance(row.values.get("system"), str) and found[0]["role"] != "system" and row.values["system"].strip():
            found = [{"role": "system", "content": text_field(row, "system")}, *found]
        messages, turns = choose_turns(found, column, options.chats)
        return Conversation(messages, turns=turns, **besides_messages(row))
    except FieldError as error:
        return problem_of(row, error)


def chat_field(row: Row, column: str) -> list[Message]:
    """The messages of a column, also where they are spelt `from` and `value`."""
    value = row.values[column]
    if value and isinstance(value, list) and all(map(is_plain, value)):
        return value
    if isinstance(value, list) and any(isinstance(one, dict) and "from" in one and "role" not in one for one in value):
        spelt = [_respell(one, f"{column}[{index}]") for index, one in enumerate(value)]
        row = Row({**row.values, column: spelt}, row.place)
    return messages_field(row, column)


def _respell(message: Any, key: str) -> Any:
    """A message with `role` and `content`; the call of a function becomes the assistant's."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    role, content = message["from"], message.get("value")
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    if role in ("function_call", "tool_call"):
        return {"role": "assistant", "content": None, "tool_calls": _calls(content, key), **others}
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content, **others}


def _calls(content: Any, key: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except json.JSONDecodeError as error:
        raise FieldError(f"{key}.value", f"expected the call of a function as JSON: {error}") from None
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise FieldError(f"{key}.value", "expected the call of a function: an object with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


FORMAT = RowFormat("messages", COLUMNS, parse, fits)
