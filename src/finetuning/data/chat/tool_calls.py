"""Tool calls as inference servers pass them to a chat template.

Rows hold the arguments of a call as an object or, as the OpenAI API returns them, as JSON text. Servers make objects
of them, which most templates print with `tojson`: a text would be encoded twice. Some templates expect a text instead.
Which of both a template prints is found by rendering a short example. So is whether it needs the content of a message
that only calls a tool, which is null in most rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetuning.data.samples import JsonObject, JsonValue, Message
from finetuning.errors import unique_keys


class Renderer(Protocol):
    """What renders conversations: `TemplateRenderer`."""

    def text(self, messages: Sequence[Message], *, tools: list[JsonObject] | None = None) -> str:
        """Render messages. Raises a ValueError if the template fails on them."""
        ...


_NAME = "example_call"
_ARGUMENTS = {"key": "value"}
EXAMPLE_TOOLS: list[JsonObject] = [
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "An example.",
            "parameters": {
                "type": "object",
                "properties": {"key": {"type": "string", "description": "A key."}},
                "required": ["key"],
            },
        },
    }
]
_QUESTION: Message = {"role": "user", "content": "question"}
_ANSWER: list[Message] = [
    {"role": "tool", "name": _NAME, "tool_call_id": "abc123456", "content": "result"},
    {"role": "assistant", "content": "answer"},
]


@dataclass(frozen=True)
class ToolCallStyle:
    """How a chat template expects tool calls."""

    takes_text: bool
    """Whether it prints arguments that are JSON text, and fails on objects or prints them as Python does."""
    needs_content: bool
    """Whether it fails on a message without a content."""

    def apply(self, messages: list[Message]) -> list[Message]:
        """Return the messages with their tool calls in this style."""
        return [self._message(message) if message.get("tool_calls") else message for message in messages]

    def _message(self, message: Message) -> Message:
        content = {"content": ""} if self.needs_content and message.get("content") is None else {}
        return {**message, "tool_calls": [self._call(call) for call in message["tool_calls"]], **content}

    def _call(self, call: JsonObject) -> JsonObject:
        # A call without its wrapper is one of a template's own format, or of a short form of the API's.
        wrapper: JsonObject = call if isinstance(call.get("function"), dict) else {"type": "function", "function": call}
        function: JsonObject = wrapper["function"]
        return {**wrapper, "function": {**function, "arguments": self._arguments(function.get("arguments"))}}

    def _arguments(self, arguments: JsonValue) -> JsonValue:
        if self.takes_text:
            return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        if not isinstance(arguments, str):
            return {} if arguments is None else arguments
        value: JsonValue = _parsed(arguments)
        return value if isinstance(value, dict) else arguments


def has_invalid_arguments(messages: Sequence[Message]) -> bool:
    """Return whether a call has arguments that are neither an object nor the JSON text of one."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments: JsonValue = call.get("function", call).get("arguments")
            value: JsonValue = _parsed(arguments) if isinstance(arguments, str) else arguments
            if arguments is not None and not isinstance(value, dict):
                return True
    return False


ANSWERING_ROLES = ("tool", "function", "ipython")


def broken_links(messages: Sequence[Message]) -> set[str]:
    """Return by which of `tool_call_id` and `name` an answer of a tool names no call before it."""
    ids: set[str] = set()
    names: set[str] = set()
    broken: set[str] = set()
    for message in messages:
        for call in message.get("tool_calls") or ():
            ids.add(str(call.get("id")))
            names.add(str(call.get("function", call).get("name")))
        if message["role"] in ANSWERING_ROLES:
            for key, called in (("tool_call_id", ids), ("name", names)):
                if message.get(key) and str(message[key]) not in called:
                    broken.add(key)
    return broken


def _parsed(text: str) -> JsonValue:
    """Return the value of a JSON text, an object for an empty one; None for any other text."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys) if text.strip() else {}
    except (ValueError, RecursionError):
        return None


def detect_style(renderer: Renderer) -> ToolCallStyle:
    """Return how a template expects tool calls, by rendering an example in each way."""
    for content in (None, ""):
        as_object = _first_text(renderer, dict(_ARGUMENTS), content)
        # A template that prints the object itself prints it as Python does, which no server parses.
        if as_object is not None and str(_ARGUMENTS) not in as_object:
            return ToolCallStyle(takes_text=False, needs_content=content is not None)
        if _first_text(renderer, json.dumps(_ARGUMENTS), content) is not None:
            return ToolCallStyle(takes_text=True, needs_content=content is not None)
    # It prints no calls. With a content it renders them, and the loss mask says what is missing.
    return ToolCallStyle(takes_text=False, needs_content=True)


def _first_text(renderer: Renderer, arguments: JsonValue, content: str | None) -> str | None:
    """Return the text of an example in which the template prints the call; None if it prints it in none."""
    for messages in _examples(arguments, content):
        try:
            text = renderer.text(messages, tools=EXAMPLE_TOOLS)
        except ValueError:
            continue
        if _NAME in text.rpartition("question")[2]:
            return text
    return None


def _examples(arguments: JsonValue, content: str | None) -> tuple[list[Message], list[Message]]:
    call = {"id": "abc123456", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    calling = [_QUESTION, {"role": "assistant", "content": content, "tool_calls": [call]}]
    # Some templates accept a call only where its result follows.
    return calling, [*calling, *_ANSWER]


def examples(style: ToolCallStyle) -> tuple[list[Message], list[Message]]:
    """Return a question with a call as its answer, and the same with the call's result and an answer in text."""
    calling, answered = _examples(dict(_ARGUMENTS), None)
    return style.apply(calling), style.apply(answered)
