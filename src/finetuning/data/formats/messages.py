"""The row format `messages`, `{"messages": [{"role": ..., "content": ...}, ...]}`, and its other spellings.

Columns may also be called `conversations`, `dialog` and so on, and messages may have `from` and `value`, as in
ShareGPT. `choose_turns` decides for all formats of chats which messages are trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from finetuning.data.formats.row_format import (
    DEFAULT_OPTIONS,
    FieldError,
    Options,
    RowFormat,
    TrainOn,
    check_messages,
    is_plain,
    list_field,
    only_text,
    other_fields,
    problem_of,
    require_columns,
    truth_value,
)
from finetuning.data.samples import Conversation, JsonObject, JsonValue, Message, Row, json_type
from finetuning.errors import Problem, unique_keys

_FLAGS = frozenset({"train", "weight", "training", "loss", "masked"})
"""Keys of a message that say whether it is trained: ours and OpenAI's, axolotl's, ms-swift's and torchtune's."""
_UNKNOWN_FLAGS = {
    "mask": "which may mean either",
    "loss_mask": "which may mean either",
    "trainable": "",
    "loss_scale": "",
    "loss_weight": "",
    "train_detail": "parts of a message",
    "training_detail": "parts of a message",
}
_FLAG_NAMES = _FLAGS | _UNKNOWN_FLAGS.keys()


def choose_turns(
    messages: Sequence[Message], key: str, train_on: TrainOn, prompt_length: int = 0
) -> tuple[list[Message], tuple[int, ...] | Literal["all"]]:
    """Choose the messages to train on.

    Args:
        messages: the messages; a flag such as `train` or `weight` of a message takes precedence over `train_on`.
        key: the name of the messages in errors.
        train_on: which messages without a flag are trained.
        prompt_length: number of messages that are a prompt; without a flag, they are not trained.

    Returns:
        The messages without flags, and the indices of those that are trained, or "all" for the whole text.
    """
    # Nearly all messages have a role and a content only.
    if not any([len(message) > 2 and not _FLAG_NAMES.isdisjoint(message) for message in messages]):
        return list(messages), "all" if train_on == "all" else _turns(messages, train_on, prompt_length)
    flags = [_flag(message, f"{key}[{index}]") for index, message in enumerate(messages)]
    if all(flag is None for flag in flags):
        return _without_flags(messages), "all" if train_on == "all" else _turns(messages, train_on, prompt_length)
    if train_on == "all" and False in flags:
        raise FieldError(
            f"{key}[{flags.index(False)}]",
            "is not to be trained, but the run trains on every token; set sft_args.train_on: assistant, which trains"
            " on the assistant's messages that have no flag",
        )
    selected: set[int] = set() if train_on == "all" else set(_turns(messages, train_on, prompt_length))
    for index, flag in enumerate(flags):
        if flag and messages[index]["role"] != "assistant" and train_on != "all":
            raise FieldError(
                f"{key}[{index}]", f'cannot be trained: its role is "{messages[index]["role"]}", not "assistant"'
            )
        if flag is not None:
            (selected.add if flag else selected.discard)(index)
    return _without_flags(messages), "all" if train_on == "all" else tuple(sorted(selected))


def _turns(messages: Sequence[Message], train_on: TrainOn, prompt_length: int) -> tuple[int, ...]:
    """Return the indices of the assistant's messages: all, the last one, or those after the last user message."""
    turns = [
        index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= prompt_length
    ]
    if train_on == "last":
        return tuple(turns[-1:])
    if train_on == "completions" and not prompt_length:
        last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return tuple(index for index in turns if index > last_user)
    return tuple(turns)


def _without_flags(messages: Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in message.items() if name not in _FLAGS} for message in messages]


def _flag(message: Message, key: str) -> bool | None:
    """Return whether a message is trained, by its flags; None if it has none."""
    for name, meaning in _UNKNOWN_FLAGS.items():
        if message.get(name) is not None:
            ignored = f"ignore_columns: [{key.partition('[')[0]}.{name}]"
            reason = f"is not read, {meaning}" if meaning else "is not read"
            raise FieldError(f"{key}.{name}", f"{reason}: use train: true or false, or {ignored}")
    first: tuple[str, bool] | None = None
    for name in ("train", *sorted(_FLAGS - {"train"})):
        value: JsonValue = message.get(name)
        if value is None:
            continue
        is_trained = truth_value(value, f"{key}.{name}") != (name == "masked")
        if first is not None and first[1] != is_trained:
            said = json.dumps(value) if isinstance(value, str | bool) else f"{value:g}"
            raise FieldError(f"{key}.{name}", f"is {said}, but {first[0]} is {json.dumps(message[first[0]])}")
        first = first or (name, is_trained)
    return first[1] if first else None


MESSAGES_COLUMNS = ("messages",)
MESSAGE_COLUMN_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
_ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


_PLAIN_PARTS = ("text", "input_text", "output_text", "image", "image_url", "audio", "input_audio", "video")
_PAIRS = (("human", "assistant"), ("input", "output"))
"""Keys of a question and its answer in one object, as in Firefly and XTuner."""
_CALLING_ROLES = ("function_call", "tool_call")


def has_messages(values: Mapping[str, object]) -> bool:
    """Return whether a row has a column of messages."""
    return messages_column(values) is not None


def messages_column(values: Mapping[str, object]) -> str | None:
    """Return the first column with one of the known names that holds a list, or the JSON text of one."""
    for name in MESSAGE_COLUMN_NAMES:
        value = values.get(name)
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[")):
            return name
    return None


def parse_messages(row: Row, options: Options = DEFAULT_OPTIONS) -> Conversation | Problem:
    """Return the conversation of a row, or what is wrong with it; a column `system` becomes its first message."""
    try:
        column = messages_column(row.values) or "messages"
        if column == "messages":
            require_columns(row, MESSAGES_COLUMNS, "messages")
        messages = with_system(row, chat_field(row, column))
        messages, turns = choose_turns(messages, column, options.chats)
        return Conversation(messages, turns=turns, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Return the messages with the column `system` of the row as the first one, unless they begin with such a message.

    A row that says it twice keeps its message, and reports the column as unused.
    """
    system: JsonValue = row.values.get("system") if not messages or messages[0]["role"] != "system" else None
    if isinstance(system, list) and all(isinstance(part, dict) for part in system):
        system = only_text(system, "system") if system else None
    if system is None:
        return messages
    if not isinstance(system, str):
        raise FieldError("system", f"expected text, got {json_type(system)}")
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def chat_field(row: Row, column: str) -> list[Message]:
    """Return the messages of a column, with `role` and `content` however other engines spell them."""
    value = list_field(row, column)
    if value and isinstance(value, list):
        items = cast("list[JsonValue]", value)
        if all(map(is_plain, items)):
            return cast("list[Message]", items)
        messages: list[JsonValue] = []
        is_legacy = any(isinstance(message, dict) and bool(message.get("function_call")) for message in items)
        for index, message in enumerate(items):
            messages += _spelled_out(message, f"{column}[{index}]")
        # Where calls become tool calls, their results become those of tools: few templates print the role `function`.
        value = [_as_tool(message) for message in messages] if is_legacy else messages
    return check_messages(value, column)


def _as_tool(message: JsonValue) -> JsonValue:
    return {**message, "role": "tool"} if isinstance(message, dict) and message.get("role") == "function" else message


def _spelled_out(message: JsonValue, key: str) -> list[JsonValue]:
    """Return a message with `role`, `content` and `tool_calls`; a pair of question and answer becomes two or three."""
    if not isinstance(message, dict):
        return [message]
    pair = next((names for names in _PAIRS if message.keys() >= {*names} and "role" not in message), None)
    if pair is not None:
        question, answer = pair
        extra = {name: value for name, value in message.items() if name not in (*pair, "system")}
        system = [{"role": "system", "content": message["system"]}] if message.get("system") else []
        return [
            *system,
            {"role": "user", "content": message[question]},
            {"role": "assistant", "content": message[answer], **extra},
        ]
    if _is_sharegpt(message):
        return [_from_sharegpt(message, key)]
    role: JsonValue = message.get("role")
    if role in _CALLING_ROLES:
        extra = {name: value for name, value in message.items() if name not in ("role", "content", "tool_calls")}
        _refuse_both(message, "content", "tool_calls", key)
        calls = _tool_calls(message.get("content"), f"{key}.content")
        return [{"role": "assistant", "content": None, "tool_calls": calls, **extra}]
    if isinstance(role, str) and role in _ROLE_ALIASES:
        message = {**message, "role": _ROLE_ALIASES[role]}
    if _has_blocks(message.get("content")):
        from finetuning.data.formats.content_blocks import from_blocks

        return from_blocks(message, key)
    if message.get("function_call") is not None:
        _refuse_both(message, "function_call", "tool_calls", key)
        extra = {name: value for name, value in message.items() if name != "function_call"}
        return [{**extra, "tool_calls": _tool_calls(message["function_call"], f"{key}.function_call")}]
    return [message]


def _has_blocks(content: JsonValue) -> bool:
    """Return whether a content has blocks of the Anthropic API, or other parts than text that belong into messages."""
    parts = cast("list[JsonValue]", content) if isinstance(content, list) else []
    return any(isinstance(part, dict) and part.get("type", "text") not in _PLAIN_PARTS for part in parts)


def _is_sharegpt(message: JsonValue) -> bool:
    return isinstance(message, dict) and "from" in message and "role" not in message


def _from_sharegpt(message: JsonValue, key: str) -> JsonValue:
    """Return a message with `role` and `content`; a function call becomes one of the assistant."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    role: JsonValue = message["from"]
    _refuse_both(message, "value", "content", key)
    content: JsonValue = message.get("content") if message.get("value") is None else message["value"]
    extra = {name: value for name, value in message.items() if name not in ("from", "value", "content")}
    if role in _CALLING_ROLES:
        _refuse_both(message, "value", "tool_calls", key)
        extra.pop("tool_calls", None)
        return {"role": "assistant", "content": None, "tool_calls": _tool_calls(content, f"{key}.value"), **extra}
    return {
        "role": _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role,
        "content": content,
        **extra,
    }


def _refuse_both(message: JsonObject, first: str, second: str, key: str) -> None:
    """Raise FieldError if a message has two keys of which only one can be meant."""
    if message.get(first) and message.get(second):
        raise FieldError(key, f"has both {first} and {second}: remove one of them")


def _tool_calls(content: JsonValue, key: str) -> list[JsonObject]:
    try:
        value: JsonValue = json.loads(content, object_pairs_hook=unique_keys) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
        raise FieldError(key, f"expected a function call as JSON: {error}") from None
    calls: list[Any] = value if isinstance(value, list) else [value]
    calls = [call["function"] if isinstance(call, dict) and "function" in call else call for call in calls]
    if not all(_is_call(call) for call in calls):
        raise FieldError(key, "expected a function call: an object with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _is_call(value: JsonValue) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


MESSAGES = RowFormat("messages", MESSAGES_COLUMNS, parse_messages, has_messages)
