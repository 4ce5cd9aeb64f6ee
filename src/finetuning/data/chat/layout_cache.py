"""Cache of the layouts that a chat template gives conversations with the same roles and plain contents.

Every conversation is rendered by the template itself. Its mask spans are found in full for the first conversation of
each role sequence (see `masking`). A later one whose rendered text is, character for character, the fixed pieces of
that layout with its own contents between them has its spans at the same distances from its contents. Any other text,
such as that of a template that looks at a content and writes something else, is masked in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from finetuning.data.chat.template import TemplateRenderer
from finetuning.data.samples import BEGINS_DIFFERENTLY, HOLDS_MORE, Conversation, MaskedText, Span

Key = tuple[tuple[str, ...], tuple[int, ...]]
"""The roles of a conversation and the turns to train on."""
_MOST_SHAPES = 4096
_SHOWN_BY_ONE = {HOLDS_MORE, BEGINS_DIFFERENTLY}


@dataclass(frozen=True)
class _Layout:
    pieces: tuple[str, ...]
    spans: tuple[tuple[int, int, int], ...]
    """Of each span: its message, how far before its content it begins, how far after it ends."""
    heads: tuple[str, ...]
    unsaid: tuple[tuple[int, str], ...]
    """Of some messages, what they do not begin with."""
    warnings: frozenset[str]

    @cached_property
    def borders(self) -> tuple[tuple[int, int, int], ...]:
        """Of each span: its message, and where it begins and ends but for the lengths of contents."""
        fixed = list(accumulate(map(len, self.pieces)))
        return tuple((turn, fixed[turn] - before, fixed[turn] + after) for turn, before, after in self.spans)


def _roles_of(conversation: Conversation) -> tuple[str, ...] | None:
    """The roles of a conversation; None where there is more to it than roles and words."""
    if conversation.tools or conversation.template_kwargs:
        return None
    roles = []
    for message in conversation.messages:
        content = message.get("content")
        if len(message) != 2 or type(content) is not str or not content or content.strip() != content:
            return None
        roles.append(message["role"])
    return tuple(roles)


class LayoutCache:
    """The layouts of one chat template, by roles and trained turns."""

    def __init__(self, renderer: TemplateRenderer):
        self._renderer = renderer
        self._known: dict[Key, _Layout] = {}

    def key_of(self, conversation: Conversation, turns: Sequence[int]) -> Key | None:
        """Return the key of a conversation's layout; None if its messages hold more than a role and a content."""
        roles = _roles_of(conversation)
        return None if roles is None else (roles, tuple(turns))

    def fill(self, keys: Sequence[Key | None], conversations: Sequence[Conversation]) -> list[MaskedText | None]:
        """Return the text and spans of each conversation whose rendered text follows the layout of its key."""
        filled = [
            _fill(self._known[key], conversation) if key in self._known else None
            for key, conversation in zip(keys, conversations, strict=True)
        ]
        expected = [index for index, marked in enumerate(filled) if marked is not None]
        texts = self._renderer.texts([conversations[index] for index in expected])
        for index, text in zip(expected, texts, strict=True):
            if filled[index].text != text:
                filled[index] = None
        return filled

    def unknown(self, keys: Sequence[Key | None]) -> list[int]:
        """Return the indices of the first conversation of each unknown key, and of all without a key."""
        new: set[Key] = set()
        indices = []
        for index, key in enumerate(keys):
            if key is None or (key not in self._known and key not in new):
                indices.append(index)
                if key is not None:
                    new.add(key)
        return indices

    def learn(self, key: Key | None, conversation: Conversation, found: MaskedText, ends: Sequence[int | None]) -> None:
        """Keep the layout of a conversation that was masked in full; the latest of a key replaces the one before.

        `ends` are the positions in the text at which the contents end. The layout of a turn whose prompt holds more
        than the turn begins with, such as <think>, is that of contents that do not begin with the rest of the prompt.
        A turn of which the template leaves out a part says nothing about others.
        """
        if key is None or not found.warnings <= _SHOWN_BY_ONE:
            return
        if key not in self._known and len(self._known) >= _MOST_SHAPES:
            return
        places = []
        position = 0
        for message, end in zip(conversation.messages, ends, strict=True):
            start = -1 if end is None else end - len(message["content"])
            if start < position or found.text[start:end] != message["content"]:
                return
            places.append((start, end))
            position = end
        pieces = _between(found.text, places)
        spans = _relative(found.spans, key[1], places, len(found.text))
        if spans is not None:
            heads = tuple(pieces[turn][: len(pieces[turn]) - before] for turn, before, _ in spans)
            unsaid = tuple((turn, text) for (turn, _, _), text in zip(spans, found.unsaid, strict=True) if text)
            self._known[key] = _Layout(pieces, spans, heads, unsaid, found.warnings)


def _contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def _fill(shape: _Layout, conversation: Conversation) -> MaskedText | None:
    """The text and spans of a conversation of a shape; None where a turn begins as its prompt ends."""
    pieces = shape.pieces
    parts = [*pieces, *pieces[1:]]
    parts[::2] = pieces
    parts[1::2] = contents = _contents(conversation)
    if any([contents[turn].startswith(text) for turn, text in shape.unsaid]):
        return None
    ends = [0, *accumulate(map(len, contents))]
    spans = tuple([(ends[turn] + start, ends[turn + 1] + end) for turn, start, end in shape.borders])
    return MaskedText("".join(parts), spans, "shape", shape.warnings, shape.heads)


def _between(text: str, places: Sequence[Span]) -> tuple[str, ...]:
    borders = [0, *(position for place in places for position in place), len(text)]
    return tuple(text[borders[index] : borders[index + 1]] for index in range(0, len(borders), 2))


def _relative(
    spans: Sequence[Span], turns: Sequence[int], places: Sequence[Span], size: int
) -> tuple[tuple[int, int, int], ...] | None:
    """The spans by how far they reach around their contents; None when one does not keep to its own message."""
    relative = []
    for turn, (start, end) in zip(turns, spans, strict=True):
        first, last = places[turn]
        before = places[turn - 1][1] if turn else 0
        after = places[turn + 1][0] if turn + 1 < len(places) else size
        if not before <= start <= first or not last <= end <= after:
            return None
        relative.append((turn, first - start, end - last))
    return tuple(relative)
