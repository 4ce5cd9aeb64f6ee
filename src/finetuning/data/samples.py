"""The values that flow through this room: one or several a row, so they are made cheaply, and not frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from finetuning.errors import Location

Message = dict[str, Any]
"""One chat message, whole: `role`, `content`, and whatever else the row gave it (`tool_calls`, `name`, …)."""


@dataclass(slots=True)
class Row:
    """One row as it stands in its file."""

    values: dict[str, Any]
    place: Location


@dataclass(slots=True)
class Conversation:
    """A chat to train on."""

    messages: list[Message]
    place: Location
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    turns: tuple[int, ...] | Literal["all"] | None = None
    """Indices of the messages to train on, or all of the text; None for what the run says of chats."""


@dataclass(slots=True)
class Text:
    """One text to train on: the spans of it, or all of it. With `add_eos` it ends with the end-of-sequence token, which
    is trained where the text's end is."""

    text: str
    place: Location
    spans: tuple[tuple[int, int], ...] | None = None
    add_eos: bool = True
    notes: frozenset[str] = frozenset()
    fault: str | None = None
    """Why nothing of it can be trained."""


@dataclass(slots=True)
class TokenIds:
    """Token ids with their labels, ready; -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]
    place: Location
    notes: frozenset[str] = frozenset()


@dataclass(slots=True)
class SkippedRow:
    """A row that was left out as asked for, and why."""

    place: Location
    reason: str


@dataclass(slots=True)
class Preference:
    """A prompt with a chosen and a rejected continuation; with `is_text`, texts that no template frames."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    place: Location
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    is_text: bool = False


@dataclass(slots=True)
class UnpairedPreference:
    """A prompt with one continuation, which is desirable or not."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    place: Location
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    is_text: bool = False


@dataclass(slots=True)
class Prompt:
    """A prompt that the model itself continues, and the other columns of its row, which rewards may look at."""

    messages: list[Message]
    columns: dict[str, Any]
    place: Location
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def json_type(value: Any) -> str:
    """What a JSON value is called in a message to people."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
