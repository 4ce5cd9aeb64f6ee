"""Marks that stand for a place: rendered with the text of a conversation, they show where each part of it went."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetuning.data.rows import Message

_FIRST, _LAST = 0xF0000, 0xFFFFD
_ANY = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_KINDS = 3
_MOST_MESSAGES = (_LAST - _FIRST) // _KINDS


def opening(index: int) -> str:
    """The character, for private use, that stands before the content of a message."""
    return chr(_FIRST + _KINDS * index)


def closing(index: int) -> str:
    """The one after it."""
    return chr(_FIRST + _KINDS * index + 1)


def calling(index: int) -> str:
    """The one after the name of the last function that a message calls."""
    return chr(_FIRST + _KINDS * index + 2)


def can_mark(text: str, count: int) -> bool:
    """Whether none of the characters is in the text itself, and there are enough of them for all messages."""
    return count <= _MOST_MESSAGES and (text.isascii() or not _ANY.search(text))


def mark(messages: Sequence[Message], *, openings: bool = True) -> list[Message]:
    """The messages with marks inside the outer white space of each content: a template that trims trims the same."""
    return [_mark_one(message, index, openings) for index, message in enumerate(messages)]


def _mark_one(message: Message, index: int, openings: bool) -> Message:
    marked = dict(message)
    content = message.get("content")
    core = content.strip() if isinstance(content, str) else ""
    if core:
        start = content.index(core[0])
        before = opening(index) if openings and message["role"] == "assistant" else ""
        marked["content"] = content[:start] + before + core + closing(index) + content[start + len(core) :]
    calls = message.get("tool_calls")
    if calls and message["role"] == "assistant":
        call = calls[-1]
        function = dict(call.get("function", call))
        function["name"] += calling(index)
        marked["tool_calls"] = [*calls[:-1], {**call, "function": function} if "function" in call else function]
    return marked


@dataclass(frozen=True)
class Unmarked:
    """A text without its marks, and the position of each mark in it; marks that came up twice are left out."""

    text: str
    positions: dict[str, int]

    def after(self, sign: str) -> str:
        return self.text[self.positions[sign] :]


def unmark(marked: str) -> Unmarked:
    """The text without marks, and where they stood."""
    positions: dict[str, int] = {}
    repeated = set()
    for removed, match in enumerate(_ANY.finditer(marked)):
        sign = match.group()
        if sign in positions:
            repeated.add(sign)
        positions[sign] = match.start() - removed
    for sign in repeated:
        del positions[sign]
    return Unmarked(_ANY.sub("", marked), positions)
