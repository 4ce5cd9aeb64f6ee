"""Chats: `{"messages": [{"role": …, "content": …}, …]}`, and the other names that they go by.

Which messages of a chat are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from finetuning.data.formats.row_format import (
    PLAIN,
    FieldError,
    Options,
    RowFormat,
    TrainOn,
    is_plain,
    messages_field,
    other_fields,
    problem_of,
    require_columns,
    text_field,
)
from finetuning.data.samples import Conversation, Message, Row, json_type
from finetuning.errors import Problem

_FLAGS = ("train", "weight")


def choose_turns(
    messages: Sequence[Message], key: str, train_on: TrainOn, prompt: int = 0
) -> tuple[list[Message], tuple[int, ...] | Literal["all"]]:
    """The messages without their flags `train` and `weight`, and the indices of those that are trained.

    A flag of a message stands above `train_on`; messages before `prompt` have no say. `key` names the messages.
    """
    if not any(["train" in one or "weight" in one for one in messages]):
        return list(messages), "all" if train_on == "all" else _turns(messages, train_on, prompt)
    flags = [_flag(message, f"{key}[{index}]") for index, message in enumerate(messages)]
    if all(flag is None for flag in flags):
        return _without(messages), "all" if train_on == "all" else _turns(messages, train_on, prompt)
    if train_on == "all" and False in flags:
        raise FieldError(
            f"{key}[{flags.index(False)}]",
            "is not to be trained, but the run trains on every token; set sft_args.train_on: assistant, and messages"
            " that say nothing are trained where they are the assistant's",
        )
    chosen: set[int] = set() if train_on == "all" else set(_turns(messages, train_on, prompt))
    for index, flag in enumerate(flags):
        if flag and messages[index]["role"] != "assistant" and train_on != "all":
            raise FieldError(
                f"{key}[{index}]", f'cannot be trained: its role is "{messages[index]["role"]}", not "assistant"'
            )
        if flag is not None:
            (chosen.add if flag else chosen.discard)(index)
    return _without(messages), "all" if train_on == "all" else tuple(sorted(chosen))


def _turns(messages: Sequence[Message], train_on: TrainOn, prompt: int) -> tuple[int, ...]:
    """The assistant's turns: all, the last one, or those after the last message of the user."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= prompt]
    if train_on == "last":
        return tuple(turns[-1:])
    if train_on == "completions" and not prompt:
        asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return tuple(index for index in turns if index > asked)
    return tuple(turns)


def _without(messages: Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in one.items() if name not in _FLAGS} for one in messages]


def _flag(message: Message, key: str) -> bool | None:
    """What a message says itself: `train: true|false`, or `weight: 0|1`; None when it says nothing."""
    train: Any = message.get("train")
    weight: Any = message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise FieldError(f"{key}.train", f"expected true or false, got {json_type(train)}")
    if weight is None:
        return train
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise FieldError(f"{key}.weight", f"expected 0 or 1, got {json_type(weight)}")
    if weight not in (0, 1):
        raise FieldError(f"{key}.weight", f"expected 0 or 1, got {weight:g}: a message is trained, or it is not")
    if train is not None and train != bool(weight):
        raise FieldError(f"{key}.weight", f"is {weight:g}, but train is {str(train).lower()}")
    return bool(weight)


MESSAGES_COLUMNS = ("messages",)
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


def has_messages(values: Mapping[str, Any]) -> bool:
    """Whether a column has one of the names, and a list in it, or the JSON text of one."""
    return spelling(values) is not None


def spelling(values: Mapping[str, Any]) -> str | None:
    """The column that holds the messages."""
    for name in SPELLINGS:
        value = values.get(name)
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[")):
            return name
    return None


def parse_messages(row: Row, options: Options = PLAIN) -> Conversation | Problem:
    """The row's conversation, or what is wrong with it."""
    try:
        column = spelling(row.values) or "messages"
        if column == "messages":
            require_columns(row, MESSAGES_COLUMNS, "messages")
        found = chat_field(row, column)
        if isinstance(row.values.get("system"), str) and found[0]["role"] != "system" and row.values["system"].strip():
            found = [{"role": "system", "content": text_field(row, "system")}, *found]
        messages, turns = choose_turns(found, column, options.chats)
        return Conversation(messages, turns=turns, **other_fields(row))
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


MESSAGES = RowFormat("messages", MESSAGES_COLUMNS, parse_messages, has_messages)
