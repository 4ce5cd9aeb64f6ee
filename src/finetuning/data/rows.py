"""The values that flow through this room."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetuning.errors import Place

Message = dict[str, Any]
"""One chat message, whole: `role`, `content`, and whatever else the row gave it (`tool_calls`, `name`, …)."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file."""

    values: dict[str, Any]
    place: Place


@dataclass(frozen=True)
class Conversation:
    """A chat to train on."""

    messages: list[Message]
    place: Place
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected continuation."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    place: Place
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rated:
    """A prompt with one continuation, which is desirable or not."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    place: Place
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model itself continues, and the other columns of its row, which rewards may look at."""

    messages: list[Message]
    columns: dict[str, Any]
    place: Place
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def json_type(value: Any) -> str:
    """What a JSON value is called in a message to people."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
