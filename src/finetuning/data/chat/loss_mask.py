"""The loss mask of conversations: which characters of a rendered conversation are trained.

Trained is each assistant turn: from the end of the generation prompt, which a served model is given, up to and
including the end-of-turn text, which it has to write. This holds for any Jinja template or the conversation is
rejected; no template is known by name here. The search has three steps.

1. Render. The conversation is rendered as it is, and again with markers (private-use characters, see `Markers`)
   around the contents. If the second text without its markers equals the first, the markers did not change what the
   template does, and their positions are those of the contents in the first text.
2. Find the start of a turn. The template renders the messages before the turn with the generation prompt. What it
   writes after the last marker must follow that marker in the whole text, too; the turn starts at its end.
3. Find the end of a turn. After its last marker must come the end-of-turn text (see `end_of_turn.py`). Where that
   cannot be read off, as after tool calls, the messages up to the turn are rendered, and what the template writes
   after the last marker must be in the whole text as well.

Then the span must contain the content and tool calls of its message, and no marker of another one. Each step compares
with a rendering by the template itself, so a wrong assumption about it leads to a rejected row and not to a wrong mask.

Some templates read the contents (`'<think>' in content`), and markers change what they write. Then the search is
repeated with markers after contents only, and without any: the text of the messages before a turn must then be a
prefix of the whole. If all three fail, the template's `{% generation %}` blocks are used where it has them, and
otherwise the first failure is the reason for rejecting the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from finetuning.data.chat.end_of_turn import EndOfTurnFinder, TurnEnd
from finetuning.data.chat.layout_cache import LayoutCache, LayoutKey
from finetuning.data.chat.template import (
    NO_MARKERS,
    REASONING_KEYS,
    Markers,
    StrippedText,
    TemplateRenderer,
    TemplateRenderError,
)
from finetuning.data.samples import (
    DIFFERENT_PROMPT,
    MISSING_PROMPT,
    RENDER_ERROR,
    UNTRAINED_END,
    Conversation,
    MaskedText,
    MaskError,
    MaskNotFound,
    Message,
    Span,
)

INCOMPLETE_TURN = "the template omits a part of a turn"
LATE_WORDS = "the template writes the words of a tool call after the tool's answer: they are not trained"

_PromptKey = tuple[str, tuple[str, ...]]
"""The last marker before a turn, and the roles of the messages before it."""


@dataclass(frozen=True)
class _Attempt:
    """A conversation rendered with one choice of markers."""

    method: str
    conversation: Conversation
    markers: Markers
    messages: Sequence[Message]
    """The messages with the markers."""
    rendered: StrippedText
    """The text of all messages, and the positions of the markers in it."""


@dataclass(frozen=True)
class _RenderedPair:
    """A conversation rendered without and with markers."""

    conversation: Conversation
    text: str
    markers: Markers
    marked: Conversation
    marked_text: str | TemplateRenderError
    """An error if the template fails on the markers."""


class AssistantMaskBuilder:
    """Finds the trained spans of conversations. What is learned of a template is kept from batch to batch."""

    def __init__(
        self, renderer: TemplateRenderer, split_tokens: Callable[[str], list[str]], stop_tokens: Iterable[str] = ()
    ):
        """Prepare for one template.

        Args:
            renderer: renders with the template.
            split_tokens: splits a text into the texts of its tokens.
            stop_tokens: tokens that end a turn in addition to the tokenizer's end-of-sequence token.
        """
        self._renderer = renderer
        self._split_tokens = split_tokens
        self._end_of_turn = EndOfTurnFinder(renderer, stop_tokens)
        self._layouts = LayoutCache(renderer)
        self._prompts: dict[_PromptKey, str] = {}

    def find(self, conversations: Sequence[Conversation]) -> list[MaskedText | MaskError]:
        """Return the rendered texts with the spans of all assistant turns; there may be none."""
        turns = [
            [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
            for conversation in conversations
        ]
        return self.find_turns(conversations, turns)

    def find_turns(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]]
    ) -> list[MaskedText | MaskError]:
        """Return the rendered texts with the spans of the given turns, indices of messages, of each."""
        keys = [self._layouts.key_of(row, selected) for row, selected in zip(conversations, turns, strict=True)]
        results: dict[int, MaskedText | MaskError] = {}
        # The first conversation of each layout is masked in full, which makes the layout available to the others.
        self._find_in_full(self._layouts.missing(keys), conversations, turns, keys, results)
        for index, masked in enumerate(self._layouts.apply(keys, conversations)):
            if masked is not None:
                results.setdefault(index, masked)
        rest = [index for index in range(len(keys)) if index not in results]
        self._find_in_full(rest, conversations, turns, keys, results)
        return [results[index] for index in range(len(keys))]

    def texts(self, conversations: Sequence[Conversation]) -> list[str | TemplateRenderError]:
        """Return the rendered texts; those on which the template failed give the error instead."""
        return self._renderer.texts(conversations)

    def _find_in_full(
        self,
        indices: Sequence[int],
        conversations: Sequence[Conversation],
        turns: Sequence[Sequence[int]],
        keys: Sequence[LayoutKey | None],
        results: dict[int, MaskedText | MaskError],
    ) -> None:
        """Add the results of the given conversations without using the layout cache, and add their layouts to it."""
        selected = [conversations[index] for index in indices]
        for index, rendered in zip(indices, self._render_pairs(selected), strict=True):
            if isinstance(rendered, TemplateRenderError):
                results[index] = MaskError(f"{RENDER_ERROR}: {rendered}")
                continue
            result, content_ends = self._find(rendered, turns[index])
            results[index] = result
            if content_ends is not None and isinstance(result, MaskedText):
                self._layouts.add(keys[index], conversations[index], result, content_ends)

    def _render_pairs(self, conversations: Sequence[Conversation]) -> list[_RenderedPair | TemplateRenderError]:
        texts = self._renderer.texts(conversations)
        markers = [
            Markers.absent_from(text, len(row.messages)) or NO_MARKERS if isinstance(text, str) else NO_MARKERS
            for row, text in zip(conversations, texts, strict=True)
        ]
        marked = [
            replace(row, messages=row_markers.insert(row.messages))
            for row, row_markers in zip(conversations, markers, strict=True)
        ]
        marked_texts = self._renderer.texts(marked)
        return [
            _RenderedPair(row, text, row_markers, with_markers, marked_text) if isinstance(text, str) else text
            for row, text, row_markers, with_markers, marked_text in zip(
                conversations, texts, markers, marked, marked_texts, strict=True
            )
        ]

    def _find(
        self, rendered: _RenderedPair, turns: Sequence[int]
    ) -> tuple[MaskedText | MaskError, list[int | None] | None]:
        """Return the spans of a conversation, and the ends of all contents in its text if markers showed them."""
        if not turns:
            return MaskedText(rendered.text, (), "no turns"), None
        failure: MaskError | None = None
        for attempt in self._attempts(rendered):
            # The markers changed what the template wrote: their positions say nothing of the text without them.
            if attempt.rendered.text != rendered.text:
                continue
            try:
                masked = self._find_spans(attempt, turns)
            except MaskNotFound as error:
                failure = failure or MaskError(str(error), error.turn)
                continue
            content_ends = None
            if attempt.method == "markers":
                positions, markers = attempt.rendered.positions, attempt.markers
                content_ends = [positions.get(markers.after_content(index)) for index in range(len(attempt.messages))]
            return masked, content_ends
        if self._renderer.has_generation_blocks:
            return self._from_generation_blocks(rendered.conversation, rendered.text, turns, failure), None
        return failure or MaskError("the chat template renders the same conversation differently each time"), None

    def _attempts(self, pair: _RenderedPair) -> Iterator[_Attempt]:
        """Yield the conversation with all markers, with markers after contents only, and without markers."""
        conversation, markers = pair.conversation, pair.markers
        if markers.base is not None and isinstance(pair.marked_text, str):
            rendered = markers.strip(pair.marked_text)
            yield _Attempt("markers", conversation, markers, pair.marked.messages, rendered)
        if markers.base is not None:
            messages = markers.insert(conversation.messages, before=False)
            (text,) = self._renderer.texts([replace(conversation, messages=messages)])
            if isinstance(text, str):
                yield _Attempt("end markers", conversation, markers, messages, markers.strip(text))
        yield _Attempt("prefix", conversation, NO_MARKERS, conversation.messages, StrippedText(pair.text, {}))

    def _render(self, attempt: _Attempt, num_messages: int, *, prompt: bool = False) -> StrippedText:
        """Render the first messages of an attempt."""
        conversation = attempt.conversation
        text = self._renderer.text(
            attempt.messages[:num_messages],
            prompt=prompt,
            tools=conversation.tools,
            kwargs=conversation.template_kwargs,
        )
        return attempt.markers.strip(text)

    def _find_spans(self, attempt: _Attempt, turns: Sequence[int]) -> MaskedText:
        """Find the span of each turn.

        Raises:
            MaskNotFound: a span cannot be verified.
        """
        spans: list[Span] = []
        missing_prompts: list[str] = []
        warnings: set[str] = set()
        text = attempt.rendered.text
        appended = ""
        for turn in turns:
            start, missing_prompt = self._find_start(attempt, turn, warnings)
            is_split = self._is_split(attempt, turn)
            if is_split:
                warnings.add(LATE_WORDS)
            end, turn_end = self._find_end(attempt, turn, start, without_content=is_split)
            if not turn_end.is_trained:
                warnings.add(UNTRAINED_END)
            if start < (spans[-1][1] if spans else 0) or end <= start:
                raise MaskNotFound("its text overlaps the turn before it", turn)
            self._check_span(attempt, turn, (start, end), warnings, without_content=is_split)
            appended = turn_end.appended
            spans.append((start, end + len(appended)))
            missing_prompts.append(missing_prompt)
        return MaskedText(
            text + appended,
            tuple(spans),
            attempt.method,
            frozenset(warnings),
            missing_prompts=tuple(missing_prompts),
            appended=appended,
        )

    def _find_start(self, attempt: _Attempt, turn: int, warnings: set[str]) -> tuple[int, str]:
        """Return where the model begins to write a turn, and the part of its prompt that is missing before that."""
        text = attempt.rendered.text
        position, prompt = self._prompt_of(attempt, turn)
        content_start = attempt.rendered.positions.get(attempt.markers.before_content(turn))
        if text.startswith(prompt, position):
            return position + len(prompt), ""
        header = text[position:content_start]
        # A reasoning template prompts with an opening <think> that this turn, without reasoning, does not have.
        if content_start is not None and prompt.startswith(header):
            warnings.add(MISSING_PROMPT)
            return content_start, prompt[len(header) :]
        # Only the generation prompt itself may differ, not the end of the message before it; and the turn is trained
        # from the first token on that the served model would not be given.
        common = self._common_tokens(prompt, header)
        start = position + common
        if common <= len(prompt) - len(self._end_of_turn.generation_prompt):
            # A template on one line writes other whitespace around its conditions in a prompt.
            if content_start is None or header.split() != prompt.split():
                raise MaskNotFound("the text before it is not the template's generation prompt", turn)
            start = content_start
        warnings.add(DIFFERENT_PROMPT)
        return start, ""

    def _prompt_of(self, attempt: _Attempt, turn: int) -> tuple[int, str]:
        """Return the position of the last marker before a turn, and what the prompt of the turn has after it."""
        if turn == 0:
            return self._first_prompt(attempt)
        marker = self._last_marker_before(attempt, turn)
        position = attempt.rendered.positions[marker] if marker else 0
        key = self._prompt_key(attempt, turn, marker)
        if key is not None and key in self._prompts:
            return position, self._prompts[key]
        try:
            prompt_text = self._render(attempt, turn, prompt=True)
        except TemplateRenderError as error:
            raise MaskNotFound(f"the template failed on the messages before it: {error}", turn) from None
        if marker and marker not in prompt_text.positions:
            raise MaskNotFound("the template writes the message before it differently in the prompt", turn)
        prompt = prompt_text.after(marker) if marker else prompt_text.text
        if key is not None:
            self._prompts[key] = prompt
        return position, prompt

    def _first_prompt(self, attempt: _Attempt) -> tuple[int, str]:
        """Return the same for a turn that starts the conversation: no messages come before it that can be rendered."""
        text, prompt = attempt.rendered.text, self._end_of_turn.generation_prompt
        content_start = attempt.rendered.positions.get(attempt.markers.before_content(0))
        if content_start is not None and prompt and text.endswith(prompt, 0, content_start):
            return content_start - len(prompt), prompt
        bos = self._renderer.tokenizer.bos_token
        position = len(bos) if isinstance(bos, str) and text.startswith(bos) else 0
        if text.startswith(prompt, position) if prompt else content_start == position:
            return position, prompt
        if content_start is None or not prompt.startswith(text[position:content_start]):
            raise MaskNotFound("the conversation starts with it, and its header cannot be identified", 0)
        return position, prompt

    @staticmethod
    def _last_marker_before(attempt: _Attempt, turn: int) -> str | None:
        """Return the marker of an earlier message that is last in the text; None without markers."""
        last_position = -1
        last_marker = None
        for index in range(turn):
            for marker in (attempt.markers.after_content(index), attempt.markers.after_call(index)):
                position = attempt.rendered.positions.get(marker, -1)
                if position > last_position:
                    last_position, last_marker = position, marker
        return last_marker

    @staticmethod
    def _prompt_key(attempt: _Attempt, turn: int, marker: str | None) -> _PromptKey | None:
        """Return what the prompt after a marker depends on; None if that may be more than the roles before the turn."""
        conversation = attempt.conversation
        if marker is None or conversation.tools or conversation.template_kwargs:
            return None
        before = conversation.messages[:turn]
        if any(len(message) != 2 or message["content"].strip() != message["content"] for message in before):
            return None
        if not all(message["content"] for message in before):
            return None
        return marker, tuple(message["role"] for message in before)

    def _common_tokens(self, left: str, right: str) -> int:
        """Return the length in characters of the longest common beginning made of whole tokens of both texts."""
        length = 0
        for left_token, right_token in zip(self._split_tokens(left), self._split_tokens(right), strict=False):
            if left_token != right_token:
                break
            length += len(left_token)
        return length

    @staticmethod
    def _is_split(attempt: _Attempt, turn: int) -> bool:
        """Return whether the template writes a turn's tool calls, then later messages, and then its content.

        Gemma 4 writes the tool's answer between them. A served model ends its turn with the call; after the tool's
        answer it writes the next turn. So the content is part of a later prompt, where the server has it as well.
        """
        positions, markers = attempt.rendered.positions, attempt.markers
        content, call = positions.get(markers.after_content(turn), -1), attempt.rendered.first(markers.after_call(turn))
        if not 0 <= call < content:
            return False
        later = range(turn + 1, len(attempt.messages))
        return any(call < positions.get(markers.after_content(index), -1) < content for index in later)

    def _find_end(
        self, attempt: _Attempt, turn: int, start: int, *, without_content: bool = False
    ) -> tuple[int, TurnEnd]:
        """Return the position up to which a turn that starts at `start` is trained, and its end-of-turn text.

        `without_content` leaves out the content of a turn that the template splits (see `_is_split`).
        """
        message = attempt.conversation.messages[turn]
        text, rendered = attempt.rendered.text, attempt.rendered
        after_content, after_call = attempt.markers.after_content(turn), attempt.markers.after_call(turn)
        markers = [marker for marker in (after_content,) if rendered.positions.get(marker, -1) >= start]
        if without_content:
            markers = []
            attempt = replace(attempt, messages=[*attempt.messages[:turn], {**attempt.messages[turn], "content": ""}])
        markers += [marker for marker in (after_call,) if rendered.first(marker) >= start]
        if not message.get("tool_calls"):
            content = message.get("content") or ""
            position = rendered.positions[after_content] if markers else start
            if markers or (not content.strip() and self._end_of_turn.is_empty_turn_at(text, position)):
                end = self._end_of_turn.match_after_content(text[position:], content, turn)
                return position + end.length, end
        # How a template closes tool calls is unknown: it shows it when the turn is the last message.
        marker = max(markers, key=rendered.first) if markers else self._last_marker_before(attempt, turn)
        try:
            as_last = self._render(attempt, turn + 1)
        except TemplateRenderError as error:
            raise MaskNotFound(f"the template failed on the messages up to its end: {error}", turn) from None
        if marker and as_last.first(marker) < 0:
            raise MaskNotFound("the template writes it differently when it is the last message", turn)
        position = rendered.first(marker) if marker else 0
        tail = as_last.after(marker) if marker else as_last.text
        end = self._end_of_turn.match_as_last(tail, text[position:], turn, is_call=bool(message.get("tool_calls")))
        return position + end.length, end

    @staticmethod
    def _check_span(
        attempt: _Attempt, turn: int, span: Span, warnings: set[str], *, without_content: bool = False
    ) -> None:
        """Raise MaskNotFound if a span holds text of another message, or not that of its own."""
        start, end = span
        markers, positions = attempt.markers, attempt.rendered.positions
        turn_markers = {markers.before_content(turn), markers.after_content(turn), markers.after_call(turn)}
        if any(start < position < end for marker, position in positions.items() if marker not in turn_markers):
            raise MaskNotFound("its text contains text of another message", turn)
        # The generation prompt may be the first words of an answer, such as an opening <think>: then the span starts
        # after the beginning of the content.
        text = attempt.rendered.text[min(start, positions.get(markers.before_content(turn), start)) : end]
        message = attempt.conversation.messages[turn]
        if not contains_message({**message, "content": ""} if without_content else message, text, turn):
            warnings.add(INCOMPLETE_TURN)

    def _from_generation_blocks(
        self, conversation: Conversation, text: str, turns: Sequence[int], failure: MaskError | None
    ) -> MaskedText | MaskError:
        """Return the spans of the `{% generation %}` blocks, if there is one per turn and each includes the end of it.

        What a block has in common with the generation prompt is not trained: the model is given it.
        """
        blocks = self._renderer.generation_spans(
            conversation.messages, conversation.tools, conversation.template_kwargs
        )
        if len(blocks) != len(turns):
            problem = f"the template has {len(blocks)} generation blocks for {len(turns)} assistant turns"
            return failure or MaskError(problem)
        spans: list[Span] = []
        warnings: set[str] = set()
        for turn, (block_start, block_end) in zip(turns, blocks, strict=True):
            end = block_start + len(text[block_start:block_end].rstrip())
            prompt = self._end_of_turn.generation_prompt
            start = block_start + self._common_tokens(prompt, text[block_start:end])
            if start >= end or not self._end_of_turn.is_complete_turn(text[start:end]):
                return failure or MaskError(
                    "the template's generation block does not include the end of the turn", turn
                )
            try:
                if not contains_message(conversation.messages[turn], text[start:end], turn):
                    warnings.add(INCOMPLETE_TURN)
            except MaskNotFound as error:
                return MaskError(str(error), turn)
            spans.append((start, end))
        return MaskedText(text, tuple(spans), "generation blocks", frozenset(warnings))


def contains_message(message: Message, text: str, turn: int) -> bool:
    """Return whether a turn's text contains all of its message; False if only its reasoning is missing.

    Raises:
        MaskNotFound: the answer itself is missing, or a tool call.
    """
    names = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    if any(name not in text for name in names):
        raise MaskNotFound("the template omits its tool calls", turn)
    content = (message.get("content") or "").strip()
    answer = content.rpartition("</think>")[2].strip()
    if answer and content not in text and answer not in text and not names:
        raise MaskNotFound("the template omits its content", turn)
    reasoning = [str(message.get(key) or "").strip() for key in REASONING_KEYS] if len(message) > 2 else []
    return content in text and all(thoughts in text for thoughts in reasoning)
