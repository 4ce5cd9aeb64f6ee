"""`RowFormat`, and the helpers that all row formats use to read and check the fields of a row.

A field that is wrong raises `FieldError` with its key, such as `messages[2].role`; each format's `parse` turns that
into a `Problem` with file, line and key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, cast

from finetuning.data.samples import (
    ImageReference,
    JsonObject,
    JsonValue,
    Message,
    ParsedRow,
    Row,
    json_type,
)
from finetuning.data.text_template import TextTemplate
from finetuning.errors import Location, Problem, unique_keys

TakeImages = Callable[[Row, str], tuple[Row, tuple[ImageReference, ...]]]
"""From a row, and the name of its column of text, to a row without its images, and the images."""
TrainOn = Literal["all", "assistant", "last", "completions"]


@dataclass(frozen=True)
class Options:
    """How the rows of one dataset are parsed, and what of them is trained."""

    chats: TrainOn = "all"
    """What is trained of chats."""
    completions: TrainOn = "completions"
    """What is trained of rows with separate prompt and completion."""
    text_field: str = "text"
    formatter: TextTemplate | None = None
    """Makes the text of a row from its columns, instead of `text_field`."""
    response_template: str | None = None
    instruction_template: str | None = None
    add_eos: bool = True
    input_separator: str = "\n\n"
    """Between an instruction and its input, in rows with both."""
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    """The tokenizer's special tokens by the names that Jinja templates use, such as `eos_token`."""
    has_system: bool | None = None
    """Whether the first rows of the dataset have a column `system`; None if each row decides for itself.

    Next to it texts are messages, as a text has no place for it. All rows of a dataset are treated alike."""
    images: TakeImages | str = "on which the engine does not train yet"
    """Takes the images out of a row, or why rows with images are refused."""


DEFAULT_OPTIONS = Options()


@dataclass(frozen=True)
class RowFormat:
    """A format of rows: its name, the columns that it requires, and the function that parses a row."""

    name: str
    columns: tuple[str, ...]
    parse: Callable[..., ParsedRow]
    """From a row, and Options, to one typed row, a list of them, or a Problem if the row has another format."""
    has_format: Callable[[Mapping[str, object]], bool] | None = None
    """Whether values look like this format; by default they do if all columns are present."""

    def matches(self, row: Row) -> bool:
        """Return whether a row looks like this format; it may still have errors."""
        if self.has_format is not None:
            return self.has_format(row.values)
        return all(column in row.values for column in self.columns)


class ReadValues(JsonObject):
    """The values of a row, and the names of those that were read one by one.

    Copying, listing and looking for a name do not count. That is how a run knows which columns nothing was made of.
    """

    __slots__ = ("read",)

    def __init__(self, values: Mapping[str, Any], read: set[str] | None = None):
        super().__init__(values)
        self.read: set[str] = set() if read is None else read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def unread(self) -> tuple[str, ...]:
        """Return the names of values that are neither read nor empty."""
        # A list, not a generator: this runs for nearly every row.
        return tuple([name for name, value in self.items() if name not in self.read and value not in _EMPTY])


_EMPTY: tuple[object, ...] = (None, "", [], {})


class FieldError(ValueError):
    """A field is wrong. Turned into a Problem by each format's `parse`; users never see it."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


_MEDIA_KINDS = {"image": "images", "audio": "sound", "video": "video"}
MEDIA = {name: kind for single, kind in _MEDIA_KINDS.items() for name in (single, f"{single}s")}
"""Columns, and keys of messages, that hold something else than text, and what it is."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ROLES = frozenset(ROLES)
_RECOGNIZED_COLUMNS = {
    "messages": ("`messages`: chats, for `finetuning sft`", {"messages"}),
    "preference": ("preferences: run `finetuning dpo`", {"prompt_messages", "chosen_messages", "rejected_messages"}),
    "unpaired": ("unpaired preferences: run `finetuning kto`", {"prompt_messages", "completion_messages", "label"}),
    "chosen_rejected": ("preferences: run `finetuning dpo`", {"chosen", "rejected"}),
    "completion_label": ("unpaired preferences: run `finetuning kto`", {"prompt", "completion", "label"}),
    "conversations": ("chats, for `finetuning sft`", {"conversations"}),
    "alpaca": ("`alpaca`, for `finetuning sft`", {"instruction", "output"}),
    "prompt_completion": ("`prompt_completion`, for `finetuning sft`", {"prompt", "completion"}),
    "input_output": ("`input_output`, for `finetuning sft`", {"input", "output"}),
    "text": ("`text`, for `finetuning sft`", {"text"}),
}
"""What to say of rows with these columns where another format is expected."""


def problem_of(row: Row, error: FieldError) -> Problem:
    """Return a field's error as a Problem of its row."""
    return Problem(str(error), replace(row.location, key=error.key or None))


def require_columns(row: Row, columns: tuple[str, ...], format_name: str) -> None:
    """Raise FieldError unless the row has all columns. The message says which format the row looks like instead."""
    missing = [column for column in columns if column not in row.values]
    if not missing:
        return
    present = ", ".join(sorted(row.values)) or "none"
    text = f"expected {', '.join(columns)}; found {present}."
    for name, (advice, recognized) in _RECOGNIZED_COLUMNS.items():
        if name != format_name and recognized <= set(row.values):
            raise FieldError("", f"{text} These rows look like {advice}")
    if proposed := propose_columns(row.values, format_name):
        pairs = ", ".join(f"{yaml_name(column)}: {name}" for column, name in proposed.items())
        raise FieldError("", f"{text} Rename them in the config, below the path of the dataset: columns: {{{pairs}}}")
    rows = next((name for name in row.values if _holds_rows(JsonObject.get(row.values, name))), None)
    if rows is not None and len(row.values) <= _MAX_WRAPPER_KEYS:
        raise FieldError("", f"{text} The rows seem to be in {rows}: write them alone, with jq -c '.{rows}[]'")
    raise FieldError("", text.rstrip("."))


def yaml_name(name: str) -> str:
    """Return a name as it is written in a list or mapping of YAML.

    >>> yaml_name("question"), yaml_name(" a: b")
    ('question', '" a: b"')
    """
    return name if re.fullmatch(r"[^\W\d][\w.-]*", name) else json.dumps(name, ensure_ascii=False)


_MAX_WRAPPER_KEYS = 4
"""Keys that an object around the rows of a file may have, such as a version next to `data`."""


def _holds_rows(value: object) -> bool:
    """Return whether a value is a list of objects that are no messages."""
    if not _is_list_of_objects(value):
        return False
    items = cast("list[JsonObject]", value)
    return all(not item.keys() & {"role", "from"} for item in items)


def _is_list_of_objects(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return bool(items) and all(isinstance(item, dict) for item in items)


def is_chat(value: object) -> bool:
    """Return whether a value is a list, or the text of a list of messages, which CSV files have in their cells."""
    if not isinstance(value, str):
        return isinstance(value, list)
    start = value[:_CHAT_START].replace(" ", "").replace("'", '"')
    return start.startswith("[{") and ('"role"' in start or '"from"' in start)


_CHAT_START = 200
"""Characters in which the text of a list of messages names the role of the first."""


_OTHER_NAMES = {
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns", "items"),
    "prompt": (
        *("question", "query", "instruction", "input", "user", "problem", "source", "request"),
        *("dialogue", "article", "document", "context"),
    ),
    "completion": (*("answer", "response", "output", "reply", "solution", "target", "assistant", "label", "summary"),),
    "text": ("content", "body", "document", "passage"),
    "chosen": ("preferred", "accepted", "better", "win", "winner", "positive", "response_chosen"),
    "rejected": ("dispreferred", "declined", "worse", "lose", "loser", "negative", "response_rejected"),
    "label": ("liked", "thumbs_up", "is_good", "good", "rating", "feedback"),
}
_ALTERNATIVES = {
    "messages": (("messages",), ("prompt", "completion"), ("text",)),
    "alpaca": (("prompt", "completion"),),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "chosen_rejected": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"),),
    "completion_label": (("prompt", "completion", "label"),),
    "prompt": (("prompt",),),
}
"""For each format that rows do not have: the columns that they could have under other names, best first."""


def propose_columns(values: Mapping[str, object], format_name: str) -> dict[str, str]:
    """Return which columns to rename to which, so that rows have a format; {} if no similar names are among them.

    >>> propose_columns({"question": "a", "answer": "b"}, "messages")
    {'question': 'prompt', 'answer': 'completion'}
    """
    for names in _ALTERNATIVES.get(format_name, ()):
        renamed: dict[str, str] = {}
        for name in names:
            column = name if name in values else _similar(name, values, {*renamed, *names})
            if column is None or (name == "messages" and not is_chat(values.get(column))):
                break
            renamed[column] = name
        else:
            return {column: name for column, name in renamed.items() if column != name}
    return {}


def is_like_prompt(column: str) -> bool:
    """Return whether a column has one of the names that prompts have elsewhere."""
    return column.lower() in _OTHER_NAMES["prompt"]


def _similar(name: str, values: Mapping[str, object], used: Collection[str]) -> str | None:
    free = {
        column.lower(): column
        for column, value in JsonObject.items(dict(values))
        if column not in used
        and (name == "label" or isinstance(value, str) or value == [] or _is_list_of_objects(value))
    }
    alternative = next((free[alias] for alias in _OTHER_NAMES.get(name, ()) if alias in free), None)
    if alternative is not None:
        return alternative
    close = difflib.get_close_matches(name, free, n=1, cutoff=0.7)
    return free[close[0]] if close else None


def text_field(row: Row, key: str) -> str:
    """Return a text."""
    value: JsonValue = row.values[key]
    if not isinstance(value, str):
        raise FieldError(key, f"expected text, got {json_type(value)}")
    return value


def messages_field(row: Row, key: str) -> list[Message]:
    """Return the messages of a column, a list or its JSON text, with all fields of each.

    `content` may be null or missing where an assistant's message has tool calls, and a list with one part, a text.
    """
    return check_messages(list_field(row, key), key)


def list_field(row: Row, key: str) -> JsonValue:
    """Return a column that may hold the JSON text of a list."""
    value: JsonValue = row.values[key]
    if isinstance(value, str) and value.lstrip().startswith("["):
        return _from_json(key, value, "a list of messages")
    return value


def check_messages(value: JsonValue, key: str) -> list[Message]:
    """Return the messages; raise FieldError unless the value is a list of messages with at least one."""
    if not isinstance(value, list):
        raise FieldError(key, f"expected a list of messages, got {json_type(value)}")
    if not value:
        raise FieldError(key, "needs at least one message, got an empty list")
    return [
        message if is_plain(message) else _read_message(message, f"{key}[{index}]")
        for index, message in enumerate(value)
    ]


def is_plain(message: object) -> bool:
    """Return whether a message has a known role, a text, and nothing else, as nearly all do."""
    if type(message) is not dict or len(message) != 2:  # pyright: ignore[reportUnknownArgumentType]
        return False
    role: object = message.get("role")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return type(role) is str and role in _ROLES and type(message.get("content")) is str  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _read_message(message: JsonValue, key: str) -> Message:
    return check_message(_with_text(message, key), key)


_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of parts that hold a text: of the usual chats, and of OpenAI's Responses API."""


def _with_text(message: JsonValue, key: str) -> JsonValue:
    """Return the message with the text of its only part as content."""
    if not isinstance(message, dict):
        return message
    content: JsonValue = message.get("content")
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return message
    return {**message, **other_keys(content), "content": only_text(content, f"{key}.content")}


def other_keys(parts: Iterable[JsonObject], used: Collection[str] = ("type", "text")) -> JsonObject:
    """Return the keys of content parts that nothing is made of, as keys of their message: no template reads them.

    So they are reported like other keys of messages that are not used.
    """
    result: JsonObject = {}
    for part in parts:
        names = {*used, *(() if "text" in part else ("value",))}
        result |= {f"content.{name}": value for name, value in part.items() if name not in names and value}
    return result


def only_text(parts: list[JsonObject], key: str) -> str:
    """Return the text of the only part of a content. Joining several parts would be a guess."""
    texts: list[str] = []
    for part in parts:
        kind: JsonValue = part.get("type", "text")
        text: JsonValue = part.get("text", part.get("value"))
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise FieldError(
                key, f"expected text, got a part of type {kind if kind not in _TEXT_PARTS else 'text without text'}"
            )
        texts.append(text)
    if len(texts) != 1:
        raise FieldError(key, f"expected text, got {len(texts)} parts of text: join them into one")
    return texts[0]


def check_message(message: JsonValue, key: str) -> Message:
    """Return the message; raise FieldError if it is not an object with a known role and a content of that role."""
    if not isinstance(message, dict):
        raise FieldError(key, f"expected an object with role and content, got {json_type(message)}")
    role: JsonValue = message.get("role")
    if not isinstance(role, str):
        raise FieldError(f"{key}.role", f"expected text, got {json_type(role) if 'role' in message else 'nothing'}")
    if role not in ROLES:
        close = difflib.get_close_matches(role.lower(), ROLES, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else f" Known roles: {', '.join(ROLES)}."
        raise FieldError(f"{key}.role", f'unknown role "{role}".{hint}')
    if isinstance(message.get("tool_calls"), str):
        message = {**message, "tool_calls": _from_json(f"{key}.tool_calls", message["tool_calls"], "a list of calls")}
    _check_tool_calls(message, key)
    if media := next((name for name in message if name in MEDIA and message[name]), None):
        raise FieldError(
            f"{key}.{media}",
            f"holds {MEDIA[media]}, which is not read from here. Move it to the column {media}, or train on the text"
            f" alone with ignore_columns: [{key.partition('[')[0]}.{media}] for this dataset",
        )
    content: JsonValue = message.get("content")
    if not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
        actual = json_type(content) if "content" in message else "nothing"
        if isinstance(message.get("refusal"), str) and content is None:
            actual += ": the text is in refusal; write it as content to train on it"
        raise FieldError(f"{key}.content", f"expected text, got {actual}")
    for name in ("reasoning_content", "thinking"):
        if message.get(name) is not None and not isinstance(message[name], str):
            raise FieldError(f"{key}.{name}", f"expected text, got {json_type(message[name])}")
    return message


def _check_tool_calls(message: Message, key: str) -> None:
    calls: JsonValue = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise FieldError(f"{key}.tool_calls", f"expected a list, got {json_type(calls)}")
    call: JsonValue
    for index, call in enumerate(calls):
        function: JsonValue = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FieldError(f"{key}.tool_calls[{index}]", "expected an object whose function has a name")
        if "arguments" not in function and (name := next((name for name in _ARGUMENTS if function.get(name)), None)):
            raise FieldError(
                f"{key}.tool_calls[{index}].{name}",
                "is not read: the arguments of a call belong in arguments; without it, the call has none",
            )


_ARGUMENTS = ("parameters", "args", "input", "kwargs", "params")
"""Names that the arguments of a call have elsewhere."""


def tools_field(row: Row) -> list[JsonObject] | None:
    """Return the row's tools as servers pass them to chat templates; None if it has none.

    They may be a list of objects, the JSON text of one, or a list of JSON texts, and, as in the legacy OpenAI API, may
    be called `functions`.
    """
    column = "functions" if "functions" in row.values and "tools" not in row.values else "tools"
    value: JsonValue = row.values.get(column)
    if isinstance(value, str):
        value = _from_json(column, value, "a list of tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise FieldError(column, f"expected a list of objects, got {json_type(value)}")
    return [_wrapped_tool(tool, f"{column}[{index}]") for index, tool in enumerate(value)]


def _wrapped_tool(tool: JsonValue, key: str) -> JsonObject:
    """Return a tool as `{"type": "function", "function": {...}}`, which is how servers pass it to chat templates.

    A schema without that wrapper is wrapped, and Anthropic's `input_schema` are its parameters.
    """
    if isinstance(tool, str):
        tool = _from_json(key, tool, "a tool")
    if not isinstance(tool, dict):
        raise FieldError(key, f"expected an object, got {json_type(tool)}")
    if isinstance(tool.get("function"), dict):
        return tool if "type" in tool else {"type": "function", **tool}
    if not isinstance(tool.get("name"), str):
        return tool
    function = {name: value for name, value in tool.items() if not (name == "type" and value in ("function", "custom"))}
    if "input_schema" in function and "parameters" not in function:
        function["parameters"] = function.pop("input_schema")
    return {"type": "function", "function": function}


def _from_json(key: str, text: str, expected: str) -> JsonValue:
    try:
        return json.loads(text, object_pairs_hook=unique_keys) if text.strip() else None
    except (ValueError, RecursionError) as error:
        message = f"expected {expected}, got text that is not valid JSON: {error}"
        if re.match(r"\s*[\[{]+\s*'", text):
            message += ". It is Python's notation: write the column with json.dumps, or the file as Parquet"
        raise FieldError(key, message) from None


def template_kwargs_field(row: Row) -> JsonObject:
    """Return the row's arguments of the chat template: `chat_template_kwargs`, and `documents`."""
    kwargs: JsonValue = row.values.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise FieldError("chat_template_kwargs", f"expected an object, got {json_type(kwargs)}")
    documents: JsonValue = row.values.get("documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        raise FieldError("documents", f"expected a list of objects, got {json_type(documents)}")
    return {**kwargs, "documents": documents} if documents else dict(kwargs)


class OtherFields(TypedDict):
    """The fields that typed rows of messages have in addition to their messages."""

    location: Location
    tools: list[JsonObject] | None
    template_kwargs: JsonObject


_OTHER_COLUMNS = frozenset({"tools", "functions", "chat_template_kwargs", "documents"})


def other_fields(row: Row) -> OtherFields:
    """Return what a row has in addition to its messages, by the field names of its type."""
    # Most rows have none of these columns.
    if _OTHER_COLUMNS.isdisjoint(row.values):
        return {"location": row.location, "tools": None, "template_kwargs": {}}
    return {
        "location": row.location,
        "tools": tools_field(row),
        "template_kwargs": template_kwargs_field(row),
    }


def label_field(row: Row, column: str = "label") -> bool:
    """Return whether the row's completion is desirable."""
    return truth_value(row.values[column], column)


def truth_value(value: JsonValue, key: str) -> bool:
    """Return a truth value that is written as a boolean, as 0 or 1, or as the text of one of these."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if value in (0, 1):
            return bool(value)
        reason = ": fractional weights are not supported" if 0 < value < 1 else ""
        raise FieldError(key, f"expected 0 or 1, got {value:g}{reason}")
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false", "0", "1"):
            return text in ("true", "1")
        raise FieldError(key, f"expected true or false, got {value!r}")
    raise FieldError(key, f"expected true or false, got {json_type(value)}")


def with_columns(row: Row, removed: Iterable[str], new: JsonObject) -> Row:
    """Return the row with new columns, made of others that are removed and count as read."""
    names = {name for name in removed if row.values.get(name) is not None}
    values = {name: value for name, value in row.values.items() if name not in names} | new
    read = row.values.read if isinstance(row.values, ReadValues) else None
    return Row(ReadValues(values, read), row.location)


def is_chat_of_texts(row: Row, options: Options) -> bool:
    """Return whether the texts of a row are messages, because its dataset has a column `system`.

    Raises:
        FieldError: the row has that column, and the first rows of the dataset have not.
    """
    if options.has_system is False and JsonObject.get(row.values, "system"):
        raise FieldError(
            "system",
            "the first rows of this dataset have no such column and are plain texts, and this row would be a chat:"
            " write system in each row, or leave it out with ignore_columns: [system]",
        )
    return bool(options.has_system) or "system" in row.values


def refuse_in_text(row: Row) -> None:
    """Raise FieldError if a row of texts has tools or documents: no chat template prints them there."""
    for name in ("tools", "functions", "documents"):
        if JsonObject.get(row.values, name):
            raise FieldError(
                name,
                "has no place in a text, to which no chat template is applied: write the row as messages, or leave it"
                f" out with ignore_columns: [{name}]",
            )


def check_completion(row: Row, column: str, messages: list[Message]) -> None:
    """Raise FieldError unless all messages of a completion are the assistant's: the loss is taken over all of it.

    `messages` is the end of the column, which may start with the prompt.
    """
    if not messages:
        raise FieldError(column, "has no messages after the prompt")
    value: JsonValue = row.values[column]
    first = len(value) - len(messages) if isinstance(value, list) else 0
    for index, message in enumerate(messages, start=first):
        if message["role"] != "assistant":
            raise FieldError(f"{column}[{index}].role", f'expected "assistant", got "{message["role"]}"')
