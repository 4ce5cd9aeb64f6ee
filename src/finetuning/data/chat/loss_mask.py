"""Which characters of a rendered conversation are trained: each assistant turn, from the end of the prompt that the
model is given to the end-of-turn marker, proven for any chat template, or refused with the reason.

The conversation is rendered twice: as it is, and with marks around the contents. Without its marks the second text
must equal the first, so the marks show where each message went. From the last mark before a turn, the template's own
generation prompt must follow; after the turn's last mark, the marker that the template ends an answer with. Where a
template looks into the contents, so that marks change its course, fewer marks are tried, then none: the conversation
up to a turn must then be a prefix of the whole. Last come the template's own `{% generation %}` marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetuning.data.chat.end_of_turn import EndOfTurn, EndOfTurnFinder
from finetuning.data.chat.layout_cache import Key, LayoutCache
from finetuning.data.chat.template import NO_SIGNS, Markers, StrippedText, TemplateRenderer, TemplateRenderError
from finetuning.data.samples import (
    BEGINS_DIFFERENTLY,
    HOLDS_MORE,
    RENDER_ERROR,
    Conversation,
    MaskedText,
    MaskError,
    MaskNotFound,
    Message,
    Span,
)


@dataclass(frozen=True)
class _View:
    """One attempt at a conversation: its text with the marks that this attempt makes."""

    conversation: Conversation
    signs: Markers
    marked: Sequence[Message]
    whole: StrippedText


@dataclass(frozen=True)
class _Attempted:
    """A conversation and its text, and both with signs; `rendered` is what the template says when it takes no signs."""

    conversation: Conversation
    text: str
    signs: Markers
    marked: Conversation
    rendered: str | TemplateRenderError


class AssistantMaskBuilder:
    """Finds the trained spans of conversations. Keeps what it learned about a template from one row to the next."""

    def __init__(
        self, renderer: TemplateRenderer, split_tokens: Callable[[str], list[str]], stop_tokens: Iterable[str] = ()
    ):
        """`split_tokens` cuts a text into the texts of its tokens; `stop_tokens` are what the model may stop at,
        besides the tokenizer's end-of-sequence token."""
        self._renderer = renderer
        self._split_tokens = split_tokens
        self._endings = EndOfTurnFinder(renderer, stop_tokens)
        self._shapes = LayoutCache(renderer)
        self._tails: dict[Any, str] = {}

    def find(self, conversations: Sequence[Conversation]) -> list[MaskedText | MaskError]:
        """The rendered texts with the spans of all assistant turns; a conversation without one has none."""
        turns = [
            [index for index, message in enumerate(one.messages) if message["role"] == "assistant"]
            for one in conversations
        ]
        return self.find_turns(conversations, turns)

    def find_turns(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]]
    ) -> list[MaskedText | MaskError]:
        """The rendered texts with the spans of the given turns of each."""
        keys = [self._shapes.key_of(one, wanted) for one, wanted in zip(conversations, turns, strict=True)]
        found: list[MaskedText | MaskError | None] = [None] * len(keys)
        new = self._shapes.unknown(keys)
        self._find_into(found, new, conversations, turns, keys)
        filled = self._shapes.fill(keys, conversations)
        found = [one or like for one, like in zip(found, filled, strict=True)]
        left = [index for index, one in enumerate(found) if one is None]
        self._find_into(found, left, conversations, turns, keys)
        return found

    def texts(self, conversations: Sequence[Conversation]) -> list[str | TemplateRenderError]:
        """The rendered texts, or what the template says against a conversation."""
        return self._renderer.texts(conversations)

    def _find_into(
        self,
        found: list[MaskedText | MaskError | None],
        which: Sequence[int],
        conversations: Sequence[Conversation],
        turns: Sequence[Sequence[int]],
        keys: Sequence[Key | None],
    ) -> None:
        results = self._find_all([conversations[one] for one in which], [turns[one] for one in which])
        for index, (result, ends) in zip(which, results, strict=True):
            found[index] = result
            if ends is not None:
                self._shapes.learn(keys[index], conversations[index], result, ends)

    def _find_all(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]]
    ) -> list[tuple[MaskedText | MaskError, list[int | None] | None]]:
        """What is found, and where each content ends in the text, where marks showed it."""
        texts = self._renderer.texts(conversations)
        signs = [
            Markers.absent_from(text, len(one.messages)) or NO_SIGNS if isinstance(text, str) else NO_SIGNS
            for one, text in zip(conversations, texts, strict=True)
        ]
        marked = [
            replace(one, messages=sign.mark(one.messages)) for one, sign in zip(conversations, signs, strict=True)
        ]
        rendered = self._renderer.texts(marked)
        return [
            (MaskError(f"{RENDER_ERROR}: {text}"), None)
            if isinstance(text, TemplateRenderError)
            else self._find(_Attempted(*one), wanted)
            for one, text, wanted in zip(
                zip(conversations, texts, signs, marked, rendered, strict=True), texts, turns, strict=True
            )
        ]

    def _find(self, tried: _Attempted, turns: Sequence[int]) -> tuple[MaskedText | MaskError, list[int | None] | None]:
        if not turns:
            return MaskedText(tried.text, (), "no turn"), None
        failure: MaskError | None = None
        for name, view in self._attempts(tried):
            if view.whole.text != tried.text:
                continue
            try:
                spans, warnings, unsaid = self._all_spans(view, turns)
                shown = view.whole.positions if name == "marks" else None
                ends = shown and [shown.get(view.signs.closing(one)) for one in range(len(view.marked))]
                return MaskedText(tried.text, spans, name, warnings, unsaid=unsaid), ends
            except MaskNotFound as error:
                failure = failure or MaskError(str(error), error.turn)
        if self._renderer.has_marks:
            return self._by_template(tried.conversation, tried.text, turns, failure), None
        fault = "the chat template writes this conversation differently when it is rendered again"
        return failure or MaskError(fault), None

    def _attempts(self, tried: _Attempted) -> Iterator[tuple[str, _View]]:
        conversation, signs = tried.conversation, tried.signs
        if signs.first is not None and isinstance(tried.rendered, str):
            yield "marks", _View(conversation, signs, tried.marked.messages, signs.unmark(tried.rendered))
        if signs.first is not None:
            marked = signs.mark(conversation.messages, openings=False)
            (rendered,) = self._renderer.texts([replace(conversation, messages=marked)])
            if isinstance(rendered, str):
                yield "end marks", _View(conversation, signs, marked, signs.unmark(rendered))
        yield "prefix", _View(conversation, NO_SIGNS, conversation.messages, StrippedText(tried.text, {}))

    def _render(self, conversation: Conversation, messages: Sequence[Message], prompt: bool = False) -> str:
        return self._renderer.text(
            messages, prompt=prompt, tools=conversation.tools, kwargs=conversation.template_kwargs
        )

    def _all_spans(self, view: _View, turns: Sequence[int]) -> tuple[tuple[Span, ...], frozenset[str], tuple[str, ...]]:
        """The span of each turn, notes on them, and what each turn does not say of its prompt."""
        spans: list[Span] = []
        unsaid: list[str] = []
        warnings: set[str] = set()
        for turn in turns:
            start, rest = self._start(view, turn, warnings)
            end = self._end(view, turn, start)
            if start < (spans[-1][1] if spans else 0) or end <= start:
                raise MaskNotFound("its text overlaps the turn before it", turn)
            self._check_inside(view, turn, (start, end), warnings)
            spans.append((start, end))
            unsaid.append(rest)
        return tuple(spans), frozenset(warnings), tuple(unsaid)

    def _start(self, view: _View, turn: int, warnings: set[str]) -> tuple[int, str]:
        """The position at which the model begins to write the turn, and what of its prompt the turn does not say."""
        position, tail = self._prompt_tail(view, turn)
        limit = view.whole.positions.get(view.signs.opening(turn))
        if view.whole.text.startswith(tail, position):
            return position + len(tail), ""
        before = view.whole.text[position:limit]
        if limit is not None and tail.startswith(before):
            warnings.add(HOLDS_MORE)
            return limit, tail[len(before) :]
        shared = self._shared_tokens(tail, before)
        if shared <= len(tail) - len(self._endings.generation_prompt):
            raise MaskNotFound("the text before it is not what the template prompts the model with", turn)
        warnings.add(BEGINS_DIFFERENTLY)
        return position + shared, ""

    def _prompt_tail(self, view: _View, turn: int) -> tuple[int, str]:
        """The position of the last mark before the turn, and what the generation prompt writes from there on."""
        if turn == 0:
            return self._first_tail(view)
        anchor = self._anchor(view, turn)
        key = self._plain_key(view, turn, anchor)
        if key is not None and key in self._tails:
            return (view.whole.positions[anchor] if anchor else 0), self._tails[key]
        try:
            prompt_view = view.signs.unmark(self._render(view.conversation, view.marked[:turn], prompt=True))
        except TemplateRenderError as error:
            raise MaskNotFound(f"the template does not take the conversation up to it: {error}", turn) from None
        if anchor and anchor not in prompt_view.positions:
            raise MaskNotFound("the template writes the message before it differently in the prompt", turn)
        tail = prompt_view.after(anchor) if anchor else prompt_view.text
        if key is not None:
            self._tails[key] = tail
        return (view.whole.positions[anchor] if anchor else 0), tail

    def _first_tail(self, view: _View) -> tuple[int, str]:
        """The same for a turn that begins the conversation: there is no prompt to ask the template for."""
        text, prompt = view.whole.text, self._endings.generation_prompt
        limit = view.whole.positions.get(view.signs.opening(0))
        if limit is not None and prompt and text.endswith(prompt, 0, limit):
            return limit - len(prompt), prompt
        bos = self._renderer.tokenizer.bos_token or ""
        position = len(bos) if text.startswith(bos) else 0
        if text.startswith(prompt, position) if prompt else limit == position:
            return position, prompt
        if limit is None or not prompt.startswith(text[position:limit]):
            raise MaskNotFound("the conversation begins with it, and its header cannot be told apart", 0)
        return position, prompt

    @staticmethod
    def _anchor(view: _View, turn: int) -> str | None:
        """The last mark of a message before the turn that stands where its message does."""
        highest = -1
        found = None
        for index in range(turn):
            for sign in (view.signs.closing(index), view.signs.calling(index)):
                position = view.whole.positions.get(sign, -1)
                if position > highest:
                    highest, found = position, sign
        return found

    @staticmethod
    def _plain_key(view: _View, turn: int, anchor: str | None) -> Any:
        """What the tail of a prompt depends on, where that is the roles and nothing else."""
        conversation = view.conversation
        if anchor is None or conversation.tools or conversation.template_kwargs:
            return None
        before = conversation.messages[:turn]
        if any(len(message) != 2 or message["content"].strip() != message["content"] for message in before):
            return None
        if not all(message["content"] for message in before):
            return None
        return anchor, tuple(message["role"] for message in before)

    def _shared_tokens(self, left: str, right: str) -> int:
        """The length of the longest common beginning of two texts that is made of whole tokens of both."""
        length = 0
        for one, other in zip(self._split_tokens(left), self._split_tokens(right), strict=False):
            if one != other:
                break
            length += len(one)
        return length

    def _end(self, view: _View, turn: int, start: int) -> int:
        """The position after the end-of-turn marker of the turn."""
        message = view.conversation.messages[turn]
        positions = view.whole.positions
        content, calls = view.signs.closing(turn), view.signs.calling(turn)
        has_calls = bool(message.get("tool_calls"))
        own = [sign for sign in (content, calls) if positions.get(sign, -1) >= start]
        if not has_calls:
            position = positions[content] if own else start
            blank = not (message.get("content") or "").strip()
            if own or (blank and self._endings.ends_at(view.whole.text, position)):
                rest = view.whole.text[position:]
                return position + self._endings.match_plain(rest, message.get("content") or "", turn)
        anchor = max(own, key=positions.__getitem__) if own else self._anchor(view, turn)
        try:
            until = view.signs.unmark(self._render(view.conversation, view.marked[: turn + 1]))
        except TemplateRenderError as error:
            raise MaskNotFound(f"the template does not take the conversation up to its end: {error}", turn) from None
        if anchor and anchor not in until.positions:
            raise MaskNotFound("the template writes it differently when it is the last message", turn)
        position = positions[anchor] if anchor else 0
        ending: EndOfTurn = self._endings.of_tail(until.after(anchor) if anchor else until.text, turn)
        if not view.whole.text.startswith(ending.text, position):
            shown = view.whole.text[position : position + len(ending.text)]
            raise MaskNotFound(
                f"it ends with {ending.text[-40:]!r} as the last message, with {shown[-40:]!r} here", turn
            )
        return position + len(ending.text)

    @staticmethod
    def _check_inside(view: _View, turn: int, span: Span, warnings: set[str]) -> None:
        """Nothing of another message lies in the span, and what the message says does."""
        start, end = span
        positions = view.whole.positions
        own = {view.signs.opening(turn), view.signs.closing(turn), view.signs.calling(turn)}
        if any(start < position < end for sign, position in positions.items() if sign not in own):
            raise MaskNotFound("the text of another message lies inside it", turn)
        # A generation prompt can hold the first words of an answer, such as an opening <think>.
        text = view.whole.text[min(start, positions.get(view.signs.opening(turn), start)) : end]
        if not holds_all(view.conversation.messages[turn], text, turn):
            warnings.add("the template leaves out a part of a turn")

    def _by_template(
        self, conversation: Conversation, text: str, turns: Sequence[int], failure: MaskError | None
    ) -> MaskedText | MaskError:
        """The spans between the template's own marks, when there is one a turn and each ends as a turn must.

        What a mark shares with the generation prompt is given to the model, so it is left out.
        """
        marks = self._renderer.marked_spans(conversation.messages, conversation.tools, conversation.template_kwargs)
        if len(marks) != len(turns):
            return failure or MaskError(f"the template marks {len(marks)} turns of {len(turns)}")
        spans = []
        warnings = set()
        for turn, (first, last) in zip(turns, marks, strict=True):
            end = first + len(text[first:last].rstrip())
            start = first + self._shared_tokens(self._endings.generation_prompt, text[first:end])
            if start >= end or not self._endings.is_end(text[start:end]):
                return failure or MaskError("the template's own marks leave out the end of a turn", turn)
            try:
                if not holds_all(conversation.messages[turn], text[start:end], turn):
                    warnings.add("the template leaves out a part of a turn")
            except MaskNotFound as error:
                return MaskError(str(error), turn)
            spans.append((start, end))
        return MaskedText(text, tuple(spans), "template", frozenset(warnings))


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
