"""Signs that stand for a place: rendered with the text of a conversation, they show where each part of it went.

They are characters for private use, which no tokenizer's template writes by itself.

What a proof says: the spans of a text, or why there are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from finetuning.data.samples import Message

_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE
_KINDS = 3


@dataclass(frozen=True)
class StrippedText:
    """A text without its signs, and the position of each sign in it; signs that came up twice are left out."""

    text: str
    positions: dict[str, int]

    def after(self, sign: str) -> str:
        return self.text[self.positions[sign] :]


@dataclass(frozen=True)
class Markers:
    """One set of signs; with `first` None there are none, and every text stays as it is."""

    first: int | None

    @staticmethod
    def absent_from(text: str, count: int) -> Markers | None:
        """Signs for so many messages, none of which is in the text; None when there are no such."""
        for signs in _ALL:
            if count <= _PLANE_SIZE // _KINDS and (text.isascii() or not signs._any.search(text)):
                return signs
        return None

    def opening(self, index: int) -> str:
        """The sign before the content of a message."""
        return self._sign(index, 0)

    def closing(self, index: int) -> str:
        """The sign after it."""
        return self._sign(index, 1)

    def calling(self, index: int) -> str:
        """The sign after the name of the last function that a message calls."""
        return self._sign(index, 2)

    def mark(self, messages: Sequence[Message], *, openings: bool = True) -> list[Message]:
        """The messages with signs round each content, inside its outer white space: what trims it trims the same."""
        if self.first is None:
            return list(messages)
        return [self._mark_one(message, index, openings) for index, message in enumerate(messages)]

    def unmark(self, marked: str) -> StrippedText:
        """The text without signs, and where they stood."""
        if self.first is None:
            return StrippedText(marked, {})
        positions: dict[str, int] = {}
        repeated = set()
        for removed, match in enumerate(self._any.finditer(marked)):
            sign = match.group()
            if sign in positions:
                repeated.add(sign)
            positions[sign] = match.start() - removed
        for sign in repeated:
            del positions[sign]
        return StrippedText(self._any.sub("", marked), positions)

    def _sign(self, index: int, kind: int) -> str:
        return "" if self.first is None else chr(self.first + _KINDS * index + kind)

    @cached_property
    def _any(self) -> re.Pattern[str]:
        return re.compile(f"[{chr(self.first)}-{chr(self.first + _PLANE_SIZE - 1)}]")

    def _mark_one(self, message: Message, index: int, openings: bool) -> Message:
        marked = dict(message)
        content = message.get("content")
        core = content.strip() if isinstance(content, str) else ""
        if core:
            start = content.index(core[0])
            before = self.opening(index) if openings and message["role"] == "assistant" else ""
            marked["content"] = content[:start] + before + core + self.closing(index) + content[start + len(core) :]
        calls = message.get("tool_calls")
        if calls and message["role"] == "assistant":
            call = calls[-1]
            function = dict(call.get("function", call))
            function["name"] += self.calling(index)
            marked["tool_calls"] = [*calls[:-1], {**call, "function": function} if "function" in call else function]
        return marked


_ALL = tuple(Markers(first) for first in _PLANES)
SIGNS = _ALL[0]
"""Signs for texts that are known to hold none."""
NO_SIGNS = Markers(None)


Span = tuple[int, int]
HOLDS_MORE = "the generation prompt holds more than the turn begins with"
BEGINS_DIFFERENTLY = "the generation prompt and the turn begin differently"
NOT_TAKEN = "the chat template does not take this conversation"


@dataclass(slots=True)
class MaskedText:
    """A rendered conversation, the character spans to train on, in order, and how they were proven."""

    text: str
    spans: tuple[Span, ...]
    method: str
    notes: frozenset[str] = frozenset()
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


def holds_all(message: Message, text: str, turn: int) -> bool:
    """Whether a turn's text holds all that the message says; False when it leaves out what came before an answer.

    Raises:
        NotShown: the answer itself is not there, or a tool call.
    """
    names = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    if any(name not in text for name in names):
        raise MaskNotFound("the template leaves out its tool calls", turn)
    content = (message.get("content") or "").strip()
    if not content or content in text:
        return True
    answer = content.rpartition("</think>")[2].strip()
    if answer and answer not in text and not names:
        raise MaskNotFound("the template leaves out its content", turn)
    return False
