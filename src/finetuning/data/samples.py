"""Parsed rows, one class per kind. Not frozen: a run makes one or several per input row, and frozen ones cost twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetuning.errors import Location, Problem

JsonObject = dict[str, Any]
"""A parsed JSON object; its values are checked where they are read."""
JsonValue = str | int | float | bool | list[Any] | dict[str, Any] | None
"""A parsed JSON value."""


Message = JsonObject
"""One chat message: `role`, `content`, and all other fields of the row (`tool_calls`, `name`, ...)."""


@dataclass(slots=True)
class Row:
    """One input row as it was read."""

    values: JsonObject
    location: Location


@dataclass(frozen=True, slots=True)
class ImageReference:
    """Where an image of a row is, and what it was when the row was prepared."""

    path: str | None
    """Its file; None if the row itself holds the image."""
    data: str | None
    """The bytes of its file in base64, if the row holds them."""
    digest: str
    """SHA-256 of its file, in hexadecimal."""
    width: int
    height: int


@dataclass(slots=True)
class Conversation:
    """A chat to train on."""

    messages: list[Message]
    location: Location
    tools: list[JsonObject] | None = None
    template_kwargs: JsonObject = field(default_factory=JsonObject)
    turns: tuple[int, ...] | Literal["all"] | None = None
    """Indices of the messages to train on, or `all` for the whole text; None for the setting of the run."""
    unused: tuple[str, ...] = ()
    """Columns of the row that nothing was made of, here and in the classes below."""
    images: tuple[ImageReference, ...] = ()
    """Images, in the order of their places in the contents."""


@dataclass(slots=True)
class Text:
    """A text to train on: its spans, or all of it.

    With `add_eos` the end-of-sequence token is appended; it is trained if the end of the text is.
    """

    text: str
    location: Location
    spans: tuple[tuple[int, int], ...] | None = None
    add_eos: bool = True
    warnings: frozenset[str] = frozenset()
    fault: str | None = None
    """Why no part of it can be trained."""
    is_templated: bool = False
    """Whether it holds the special tokens of a chat on purpose."""
    unused: tuple[str, ...] = ()
    images: tuple[ImageReference, ...] = ()


@dataclass(slots=True)
class TokenIds:
    """A row that is tokenized already: token ids and labels, -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    location: Location
    warnings: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()


@dataclass(slots=True)
class SkippedRow:
    """A row that was filtered out as configured, and why."""

    location: Location
    reason: str


@dataclass(slots=True)
class Preference:
    """A prompt with a chosen and a rejected answer; with `is_text` plain texts, without a chat template."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    location: Location
    tools: list[JsonObject] | None = None
    template_kwargs: JsonObject = field(default_factory=JsonObject)
    is_text: bool = False
    unused: tuple[str, ...] = ()
    images: tuple[ImageReference, ...] = ()
    """Images of the prompt, in the order of their places."""


@dataclass(slots=True)
class UnpairedPreference:
    """A prompt with one answer, which is desirable or not."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    location: Location
    tools: list[JsonObject] | None = None
    template_kwargs: JsonObject = field(default_factory=JsonObject)
    is_text: bool = False
    unused: tuple[str, ...] = ()


@dataclass(slots=True)
class Prompt:
    """A prompt for generation, and the other columns of its row, which reward functions may read."""

    messages: list[Message]
    columns: JsonObject
    location: Location
    tools: list[JsonObject] | None = None
    template_kwargs: JsonObject = field(default_factory=JsonObject)
    unused: tuple[str, ...] = ()
    images: tuple[ImageReference, ...] = ()


Sample = Conversation | Text | TokenIds | Preference | UnpairedPreference | Prompt
"""A row that was parsed by a row format."""
ParsedRow = Sample | Sequence[Sample] | Problem
"""What a row format makes of a row: some make several samples of one."""
RowToTokenize = Sample | Problem | SkippedRow
"""A sample, or a row that is not trained on."""


Span = tuple[int, int]
"""Start and end of a part of a text, in characters, or of a sequence, in tokens; the end is exclusive."""
MISSING_PROMPT = "the turn does not begin with all of the generation prompt"
DIFFERENT_PROMPT = "the turn begins differently from the generation prompt"
UNTRAINED_END = "an earlier answer ends with a token at which generation does not stop: that token is not trained"
RENDER_ERROR = "the chat template failed on this conversation"


@dataclass(slots=True)
class MaskedText:
    """A rendered conversation, and the character spans to train on, in order."""

    text: str
    spans: tuple[Span, ...]
    method: str
    """How the spans were found: see `chat/loss_mask.py`."""
    warnings: frozenset[str] = frozenset()
    headers: tuple[str, ...] = ()
    """Per span, the text between the content of the previous message and the span; empty if it is not cached.

    Headers are the same in many conversations, which spares tokenizing them again (see `tokenization/labels.py`)."""
    missing_prompts: tuple[str, ...] = ()
    """Per span, the end of the generation prompt that the turn does not begin with, such as `<think>`; mostly empty."""
    appended: str = ""
    """The end of the last turn, where the template writes none: the role of the next message ends a turn."""


@dataclass(frozen=True)
class MaskError:
    """Why no loss mask could be verified for a conversation; `turn` is the index of the message at fault, if any."""

    reason: str
    turn: int | None = None

    def __str__(self) -> str:
        return self.reason if self.turn is None else f"messages[{self.turn}]: {self.reason}"


class MaskNotFound(Exception):
    """A span could not be verified. Caught in `chat/loss_mask.py`; users see a `MaskError`."""

    def __init__(self, reason: str, turn: int | None = None):
        super().__init__(reason)
        self.turn = turn


_JSON_TYPES: dict[type, str] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def json_type(value: object) -> str:
    """The name of a JSON value's type in error messages."""
    if value is None:
        return "null"
    return _JSON_TYPES.get(type(value), type(value).__name__)
