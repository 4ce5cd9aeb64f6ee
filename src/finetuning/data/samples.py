"""Parsed rows, one class per kind. Not frozen: a run makes one or several per input row, and frozen ones cost twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from finetuning.errors import Location

Message = dict[str, Any]
"""One chat message: `role`, `content`, and all other fields of the row (`tool_calls`, `name`, ...)."""


@dataclass(slots=True)
class Row:
    """One input row as it was read."""

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
    """Indices of the messages to train on, or `all` for the whole text; None for the setting of the run."""


@dataclass(slots=True)
class Text:
    """A text to train on: its spans, or all of it.

    With `add_eos` the end-of-sequence token is appended; it is trained if the end of the text is.
    """

    text: str
    place: Location
    spans: tuple[tuple[int, int], ...] | None = None
    add_eos: bool = True
    warnings: frozenset[str] = frozenset()
    fault: str | None = None
    """Why no part of it can be trained."""


@dataclass(slots=True)
class TokenIds:
    """A row that is tokenized already: token ids and labels, -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    place: Location
    warnings: frozenset[str] = frozenset()


@dataclass(slots=True)
class SkippedRow:
    """A row that was filtered out as configured, and why."""

    place: Location
    reason: str


@dataclass(slots=True)
class Preference:
    """A prompt with a chosen and a rejected answer; with `is_text` plain texts, without a chat template."""

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
    """A prompt with one answer, which is desirable or not."""

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
    """A prompt for generation, and the other columns of its row, which reward functions may read."""

    messages: list[Message]
    columns: dict[str, Any]
    place: Location
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Span = tuple[int, int]
HOLDS_MORE = "the generation prompt holds more than the turn begins with"
BEGINS_DIFFERENTLY = "the generation prompt and the turn begin differently"
RENDER_ERROR = "the chat template does not take this conversation"


@dataclass(slots=True)
class MaskedText:
    """A rendered conversation, the character spans to train on, in order, and how they were proven."""

    text: str
    spans: tuple[Span, ...]
    method: str
    warnings: frozenset[str] = frozenset()
    heads: tuple[str, ...] = ()
    """What stands before each span, back to the content before it, where that is the same in many conversations."""
    unsaid: tuple[str, ...] = ()
    """What each turn would have to begin with for its span to begin later: the prompt would hold that much of it."""


@dataclass(frozen=True)
class MaskError:
    """Why no mask could be shown for a conversation; `turn` is the index of the message, where one is to blame."""

    reason: str
    turn: int | None = None

    def __str__(self) -> str:
        return self.reason if self.turn is None else f"messages[{self.turn}]: {self.reason}"


class MaskNotFound(Exception):
    """A span could not be shown to be right; caught in `masking`, never seen by users."""

    def __init__(self, reason: str, turn: int | None = None):
        super().__init__(reason)
        self.turn = turn


def json_type(value: Any) -> str:
    """The name of a JSON value's type in error messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
