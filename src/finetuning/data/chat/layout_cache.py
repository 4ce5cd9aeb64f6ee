"""Conversations of one shape: the same roles in the same order, and nothing but a role and words in each message.

What a template writes around the words is learned from the first conversation of a shape that was proven in full.
Where the words answer no to all that the template asks of them (see `opaque`), the text and the spans of all others
follow, and one row of each batch is rendered as a check. Where it looks further, a row is rendered once, as it is: when
it is the pieces of its shape with its own words between them, character for character, its spans lie where they lay in
the row that was proven; when it is not, it goes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

from finetuning.data.chat.markers import BEGINS_DIFFERENTLY, HOLDS_MORE, MaskedText, Span
from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.opaque import Plain, PlainTemplate
from finetuning.data.samples import Conversation
from finetuning.errors import InternalError

Key = tuple[tuple[str, ...], tuple[int, ...], bool]
"""The roles, the turns that are wanted, and whether the template writes all such conversations alike."""
_MOST_SHAPES = 4096
_SHOWN_BY_ONE = {HOLDS_MORE, BEGINS_DIFFERENTLY}


@dataclass(frozen=True)
class _Layout:
    pieces: tuple[str, ...]
    spans: tuple[tuple[int, int, int], ...]
    """Of each span: its message, how far before its content it begins, how far after it ends."""
    heads: tuple[str, ...]
    is_plain: bool
    unsaid: tuple[tuple[int, str], ...]
    """Of some messages, what they do not begin with."""
    notes: frozenset[str]

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
    """The shapes that one template has shown so far."""

    def __init__(self, renderer: TemplateRenderer):
        self._renderer = renderer
        self._known: dict[Key, _Layout] = {}
        self._plain: dict[tuple[str, ...], Plain | None] = {}
        self._shown: set[tuple[str, ...]] = set()

    def key_of(self, conversation: Conversation, turns: Sequence[int]) -> Key | None:
        """The shape of a conversation whose given turns are wanted; None where it has none."""
        roles = _roles_of(conversation)
        return None if roles is None else (roles, tuple(turns), self._plain_of(roles, conversation) is not None)

    def fill(self, keys: Sequence[Key | None], conversations: Sequence[Conversation]) -> list[MaskedText | None]:
        """The text and spans of each conversation whose shape is known and holds for it.

        Raises:
            InternalError: a plain template wrote a row in another way than its shape.
        """
        filled: list[MaskedText | None] = []
        checked = False
        unsure = []
        for index, (key, conversation) in enumerate(zip(keys, conversations, strict=True)):
            shape = self._known.get(key) if key is not None else None
            one = _fill(shape, conversation) if shape is not None else None
            filled.append(one)
            if one is None:
                continue
            if not shape.is_plain:
                unsure.append(index)
            elif not checked:
                checked = True
                self._check(one.text, conversation)
        texts = self._renderer.texts([conversations[index] for index in unsure])
        for index, text in zip(unsure, texts, strict=True):
            if filled[index].text != text:
                filled[index] = None
        return filled

    def unknown(self, keys: Sequence[Key | None]) -> list[int]:
        """The first of each shape that is not known yet, and all that have none."""
        new: set[Key] = set()
        found = []
        for index, key in enumerate(keys):
            if key is None or (key not in self._known and key not in new):
                found.append(index)
                if key is not None:
                    new.add(key)
        return found

    def learn(self, key: Key | None, conversation: Conversation, found: MaskedText, ends: Sequence[int | None]) -> None:
        """Keeps the shape of a conversation that was proven; `ends` are where its contents end in the text.

        A prompt that ends with <think> is followed by words that begin with it, or do not: the shape is that of words
        that do not. What a template leaves out of a turn shows nothing of others.
        """
        if key is None or not found.notes <= _SHOWN_BY_ONE or key in self._known or len(self._known) >= _MOST_SHAPES:
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
            plain = self._plain_of(key[0], conversation)
            unsaid = tuple((turn, text) for (turn, _, _), text in zip(spans, found.unsaid, strict=True) if text)
            is_plain = plain is not None and plain.pieces == pieces
            if is_plain or not found.notes:
                self._known[key] = _Layout(pieces, spans, heads, is_plain, unsaid, found.notes)

    def texts(self, conversations: Sequence[Conversation]) -> list[str | TemplateRenderError]:
        """The text of each conversation, or what the template says against it; by shape where the template is plain."""
        roles = map(_roles_of, conversations)
        plain = [one and self._plain_of(one, row) for one, row in zip(roles, conversations, strict=True)]
        left = [index for index, one in enumerate(plain) if one is None]
        rendered = iter(self._renderer.texts([conversations[index] for index in left]))
        texts = [
            next(rendered) if one is None else _join(one.pieces, conversation)
            for one, conversation in zip(plain, conversations, strict=True)
        ]
        for text, one, conversation in zip(texts, plain, conversations, strict=True):
            if one is not None:
                self._check(text, conversation)
                break
        return texts

    @cached_property
    def _template(self) -> PlainTemplate | None:
        return PlainTemplate.of(self._renderer.tokenizer.get_chat_template(None, None))

    def _plain_of(self, roles: tuple[str, ...], conversation: Conversation) -> Plain | None:
        """What the template writes around the words of all conversations of these roles that answer its questions as
        this one does; None where it is not known to write them alike."""
        if roles not in self._plain:
            if self._template is None or len(self._plain) >= _MOST_SHAPES:
                return None
            self._plain[roles] = self._template.around(roles, self._renderer.tokenizer.special_tokens_map)
        plain = self._plain[roles]
        if plain is None or (plain.questions and not plain.holds_for(_contents(conversation))):
            return None
        if roles not in self._shown:
            if self._renderer.texts([conversation]) != [_join(plain.pieces, conversation)]:
                self._plain[roles] = None
                return None
            self._shown.add(roles)
        return plain

    def _check(self, text: str, conversation: Conversation) -> None:
        if self._renderer.texts([conversation]) != [text]:
            raise InternalError(
                f"{conversation.place}: the chat template writes this row in another way than rows of the same roles,"
                " though it was shown to look at no content"
            )


def _contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def _join(pieces: Sequence[str], conversation: Conversation) -> str:
    contents = _contents(conversation)
    return "".join([pieces[0], *chain.from_iterable(zip(contents, pieces[1:], strict=True))])


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
    return MaskedText("".join(parts), spans, "shape", shape.notes, shape.heads)


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
