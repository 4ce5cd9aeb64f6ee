"""What a row format is made of.

What the row formats share: the fields of a row, checked, with the exact key of what is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetuning.data.samples import Message, Row, json_type
from finetuning.data.text_template import TextTemplate
from finetuning.errors import Location, Problem

TrainOn = Literal["all", "assistant", "last", "completions"]


@dataclass(frozen=True)
class Options:
    """How the rows of one dataset are read, and what of them is trained."""

    chats: TrainOn = "all"
    """What of chats is trained."""
    completions: TrainOn = "completions"
    """What is trained of rows whose prompt stands apart."""
    text_field: str = "text"
    formatter: TextTemplate | None = None
    """Makes the text of a row, where no column holds it."""
    response_template: str | None = None
    instruction_template: str | None = None
    add_eos: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """The tokenizer's, by the names that Jinja templates call them."""


PLAIN = Options()


@dataclass(frozen=True)
class RowFormat:
    """One shape of rows: its name, the columns that it needs, and what makes a typed value of a row, or several.

    `parse` gives a Problem for a row that is not of this shape.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[..., Any]
    fits: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a row's values look like this format; by default they do when all columns are there."""

    def is_of(self, row: Row) -> bool:
        if self.fits is not None:
            return self.fits(row.values)
        return all(column in row.values for column in self.columns)


class FieldError(ValueError):
    """A field is wrong; turned into a Problem by each format's `parse`, never seen by users."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ROLES = frozenset(ROLES)
_META = ("dataset", "id", "tags", "labels")
_KNOWN_SHAPES = {
    "messages": ("`messages`: chats for supervised fine-tuning", {"messages"}),
    "preference": ("preferences: run `finetuning dpo`", {"prompt_messages", "chosen_messages", "rejected_messages"}),
    "unpaired": ("rated answers: run `finetuning kto`", {"prompt_messages", "completion_messages", "label"}),
    "chosen_rejected": ("preferences: run `finetuning dpo`", {"chosen", "rejected"}),
    "completion_label": ("rated answers: run `finetuning kto`", {"prompt", "completion", "label"}),
    "conversations": ("chats for supervised fine-tuning", {"conversations"}),
    "alpaca": ("`alpaca`, for supervised fine-tuning", {"instruction", "output"}),
    "prompt_completion": ("`prompt_completion`, for supervised fine-tuning", {"prompt", "completion"}),
    "input_output": ("`input_output`, for supervised fine-tuning", {"input", "output"}),
    "text": ("`text`: texts for supervised fine-tuning", {"text"}),
}


def problem_of(row: Row, error: FieldError) -> Problem:
    return Problem(str(error), Location(file=row.place.file, line=row.place.line, key=error.key or None))


def require_columns(row: Row, columns: tuple[str, ...], format_name: str) -> None:
    """Nothing, when the row has all columns; else a FieldError that says which format the row looks like."""
    missing = [column for column in columns if column not in row.values]
    if not missing:
        return
    found = ", ".join(sorted(row.values)) or "none"
    text = f"expected {', '.join(columns)}; found {found}."
    for name, (advice, shape) in _KNOWN_SHAPES.items():
        if name != format_name and shape <= set(row.values):
            raise FieldError("", f"{text} These rows look like {advice}")
    close = difflib.get_close_matches(missing[0], row.values, n=1, cutoff=0.7)
    raise FieldError("", f'{text} Did you mean "{missing[0]}" by "{close[0]}"?' if close else text.rstrip("."))


def text_field(row: Row, key: str) -> str:
    value = row.values[key]
    if not isinstance(value, str):
        raise FieldError(key, f"expected text, got {json_type(value)}")
    return value


def messages_field(row: Row, key: str) -> list[Message]:
    """The messages under a key, each kept whole, checked; also where they stand there as JSON text.

    `content` may be null or missing where an assistant's message has tool calls, and a list of one part that is text.
    """
    value = row.values[key]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(key, value, "a list of messages")
    if not isinstance(value, list):
        raise FieldError(key, f"expected a list of messages, got {json_type(value)}")
    if not value:
        raise FieldError(key, "needs at least one message, got an empty list")
    return [one if is_plain(one) else _read_message(one, f"{key}[{index}]") for index, one in enumerate(value)]


def _read_message(message: Any, key: str) -> Message:
    message = _with_text(message, key)
    check_message(message, key)
    return message


def _with_text(message: Any, key: str) -> Any:
    """The message with the text of its one part as content; several would be joined by a guess."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        return message
    other = next((part.get("type") for part in parts if part.get("type") != "text"), None)
    if other is not None or any(not isinstance(part.get("text"), str) for part in parts):
        raise FieldError(f"{key}.content", f"expected text, got a part of type {other or 'text without text'}")
    if len(parts) > 1:
        raise FieldError(f"{key}.content", f"expected text, got {len(parts)} parts of text: join them to one")
    return {**message, "content": parts[0]["text"]}


def is_plain(message: Any) -> bool:
    """Whether a message has a known role, words, and nothing else, as nearly all do."""
    return (
        isinstance(message, dict)
        and len(message) == 2
        and isinstance(message.get("content"), str)
        and isinstance(message.get("role"), str)
        and message["role"] in _ROLES
    )


def check_message(message: Any, key: str) -> None:
    if not isinstance(message, dict):
        raise FieldError(key, f"expected an object with role and content, got {json_type(message)}")
    role = message.get("role")
    if not isinstance(role, str):
        raise FieldError(f"{key}.role", f"expected text, got {json_type(role) if 'role' in message else 'nothing'}")
    if role not in ROLES:
        close = difflib.get_close_matches(role.lower(), ROLES, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else f" Known roles: {', '.join(ROLES)}."
        raise FieldError(f"{key}.role", f'unknown role "{role}".{hint}')
    _check_tool_calls(message, key)
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
        got = json_type(content) if "content" in message else "nothing"
        raise FieldError(f"{key}.content", f"expected text, got {got}")
    for name in ("reasoning_content", "thinking"):
        if message.get(name) is not None and not isinstance(message[name], str):
            raise FieldError(f"{key}.{name}", f"expected text, got {json_type(message[name])}")


def _check_tool_calls(message: Message, key: str) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise FieldError(f"{key}.tool_calls", f"expected a list, got {json_type(calls)}")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FieldError(f"{key}.tool_calls[{index}]", "expected an object whose function has a name")


def tools_field(row: Row) -> list[dict[str, Any]] | None:
    """The row's tools: a list of objects, or the same as a JSON string; None without any."""
    value = row.values.get("tools")
    if isinstance(value, str):
        value = _from_json("tools", value, "a list of tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise FieldError("tools", f"expected a list of objects, got {json_type(value)}")
    return value


def _from_json(key: str, text: str, expected: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise FieldError(key, f"expected {expected}, got text that is no JSON: {error}") from None


def template_kwargs_field(row: Row) -> dict[str, Any]:
    """Arguments of the chat template that the row brings: `chat_template_kwargs`, and `documents`."""
    kwargs = row.values.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise FieldError("chat_template_kwargs", f"expected an object, got {json_type(kwargs)}")
    documents = row.values.get("documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        raise FieldError("documents", f"expected a list of objects, got {json_type(documents)}")
    return {**kwargs, "documents": documents} if documents else dict(kwargs)


def meta_fields(row: Row) -> dict[str, Any]:
    return {key: row.values[key] for key in _META if key in row.values}


def other_fields(row: Row) -> dict[str, Any]:
    """What a row of messages may bring besides them, by the fields of its type: where it stands, tools, arguments of
    the chat template, and what it says of itself."""
    return {
        "place": row.place,
        "tools": tools_field(row),
        "template_kwargs": template_kwargs_field(row),
        "meta": meta_fields(row),
    }


def label_field(row: Row) -> bool:
    """Whether the row's answer is a desirable one."""
    label = row.values["label"]
    if not isinstance(label, bool):
        raise FieldError("label", f"expected true or false, got {json_type(label)}")
    return label


def check_answer(row: Row, column: str, messages: list[Message]) -> None:
    """Nothing, when all messages of an answer are the assistant's: the loss is taken over all of it.

    An answer is the end of its column, which may begin with the prompt.
    """
    if not messages:
        raise FieldError(column, "holds nothing beside the prompt")
    value = row.values[column]
    first = len(value) - len(messages) if isinstance(value, list) else 0
    for index, message in enumerate(messages, start=first):
        if message["role"] != "assistant":
            raise FieldError(f"{column}[{index}].role", f'expected "assistant", got "{message["role"]}"')
