"""Cache of the layouts that a chat template gives to conversations with the same sequence of roles.

Most templates write the same text around the contents of every conversation with the same roles. The spans of the
first such conversation are found in full by `loss_mask.py`, and its layout is kept: the fixed pieces of text before,
between and after the contents, and each span relative to the content of its message.

A later conversation is still rendered by the template. If its text equals, character for character, the fixed pieces
with its own contents between them, the template did the same as before, and the spans have the same distances from
the contents. Any other text, for example of a template that reads a content and reacts to it, gets no spans here: the
caller finds them in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from finetuning.data.chat.template import TemplateRenderer
from finetuning.data.samples import DIFFERENT_PROMPT, MISSING_PROMPT, UNTRAINED_END, Conversation, MaskedText, Span

LayoutKey = tuple[tuple[str, ...], tuple[int, ...]]
"""The roles of a conversation and the turns to train on."""
_MAX_LAYOUTS = 4096
_CACHEABLE_WARNINGS = {MISSING_PROMPT, DIFFERENT_PROMPT, UNTRAINED_END}
"""Warnings about the template. Those about a content, such as one that is partly omitted, say nothing of others."""


@dataclass(frozen=True)
class _Layout:
    """The fixed text of a role sequence, and its spans relative to the contents."""

    pieces: tuple[str, ...]
    """The text before the first content, between two contents, and after the last."""
    spans: tuple[tuple[int, int, int], ...]
    """Per span: its message, the characters from its start to the content, and from the content to its end."""
    headers: tuple[str, ...]
    missing_prompts: tuple[tuple[int, str], ...]
    """Messages with the text that they must not begin with, or their span would begin later."""
    warnings: frozenset[str]
    appended: str
    """As in `MaskedText`."""

    @cached_property
    def offsets(self) -> tuple[tuple[int, int, int], ...]:
        """Per span: its message, and its start and end if all contents were empty."""
        fixed = list(accumulate(map(len, self.pieces)))
        return tuple((turn, fixed[turn] - before, fixed[turn] + after) for turn, before, after in self.spans)


def _plain_roles(conversation: Conversation) -> tuple[str, ...] | None:
    """Return the roles of a conversation; None if its text may depend on more than roles and contents.

    Contents with outer white space count as more: templates that trim would change them.
    """
    if conversation.tools or conversation.template_kwargs:
        return None
    roles: list[str] = []
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
        self._layouts: dict[LayoutKey, _Layout] = {}

    def key_of(self, conversation: Conversation, turns: Sequence[int]) -> LayoutKey | None:
        """Return the key of a conversation's layout; None if its messages hold more than a role and a content."""
        roles = _plain_roles(conversation)
        return None if roles is None else (roles, tuple(turns))

    def apply(self, keys: Sequence[LayoutKey | None], conversations: Sequence[Conversation]) -> list[MaskedText | None]:
        """Return the text and spans of each conversation whose rendered text follows the layout of its key."""
        results = [
            _fill(self._layouts[key], conversation) if key in self._layouts else None
            for key, conversation in zip(keys, conversations, strict=True)
        ]
        filled = [(index, result) for index, result in enumerate(results) if result is not None]
        texts = self._renderer.plain_texts([conversations[index] for index, _ in filled])
        for (index, result), text in zip(filled, texts, strict=True):
            key = keys[index]
            appended = self._layouts[key].appended if key is not None else ""
            if text is None or result.text != text + appended:
                results[index] = None
        return results

    def missing(self, keys: Sequence[LayoutKey | None]) -> list[int]:
        """Return the indices of the first conversation of each key without a layout, and of all without a key."""
        new: set[LayoutKey] = set()
        indices: list[int] = []
        for index, key in enumerate(keys):
            if key is None or (key not in self._layouts and key not in new):
                indices.append(index)
                if key is not None:
                    new.add(key)
        return indices

    def add(
        self,
        key: LayoutKey | None,
        conversation: Conversation,
        masked: MaskedText,
        content_ends: Sequence[int | None],
    ) -> None:
        """Keep the layout of a conversation whose spans were found in full; it replaces an earlier one of its key.

        `content_ends` are the positions in the text at which the contents end. No layout is kept if a content is
        missing, changed or out of order in the text, or if a span extends beyond its message.
        """
        if key is None or not masked.warnings <= _CACHEABLE_WARNINGS:
            return
        if key not in self._layouts and len(self._layouts) >= _MAX_LAYOUTS:
            return
        contents: list[Span] = []
        position = 0
        for message, end in zip(conversation.messages, content_ends, strict=True):
            start = -1 if end is None else end - len(message["content"])
            if end is None or start < position or masked.text[start:end] != message["content"]:
                return
            contents.append((start, end))
            position = end
        pieces = _pieces_around(masked.text, contents)
        spans = _relative_spans(masked.spans, key[1], contents, len(masked.text))
        if spans is not None:
            headers = tuple(pieces[turn][: len(pieces[turn]) - before] for turn, before, _ in spans)
            missing_prompts = tuple(
                (turn, text) for (turn, _, _), text in zip(spans, masked.missing_prompts, strict=True) if text
            )
            self._layouts[key] = _Layout(pieces, spans, headers, missing_prompts, masked.warnings, masked.appended)


def _fill(layout: _Layout, conversation: Conversation) -> MaskedText | None:
    """Return the text and spans that a layout predicts; None if a turn begins with the rest of its prompt."""
    pieces = layout.pieces
    contents = [message["content"] for message in conversation.messages]
    parts = [*pieces, *pieces[1:]]
    parts[::2] = pieces
    parts[1::2] = contents
    # A list, not a generator: this runs once per row, and a generator costs more than these few comparisons.
    if any([contents[turn].startswith(text) for turn, text in layout.missing_prompts]):
        return None
    ends = [0, *accumulate(map(len, contents))]
    spans = tuple([(ends[turn] + start, ends[turn + 1] + end) for turn, start, end in layout.offsets])
    return MaskedText("".join(parts), spans, "layout", layout.warnings, layout.headers)


def _pieces_around(text: str, contents: Sequence[Span]) -> tuple[str, ...]:
    borders = [0, *(position for span in contents for position in span), len(text)]
    return tuple(text[borders[index] : borders[index + 1]] for index in range(0, len(borders), 2))


def _relative_spans(
    spans: Sequence[Span], turns: Sequence[int], contents: Sequence[Span], size: int
) -> tuple[tuple[int, int, int], ...] | None:
    """Return the spans relative to their contents; None if one extends into the content of another message."""
    relative: list[tuple[int, int, int]] = []
    for turn, (start, end) in zip(turns, spans, strict=True):
        content_start, content_end = contents[turn]
        previous_end = contents[turn - 1][1] if turn else 0
        next_start = contents[turn + 1][0] if turn + 1 < len(contents) else size
        if not previous_end <= start <= content_start or not content_end <= end <= next_start:
            return None
        relative.append((turn, content_start - start, end - content_end))
    return tuple(relative)
