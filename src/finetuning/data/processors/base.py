"""What a method trains on, made of typed rows: token ids with the text and the mask that they were proven against."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.markers import NOT_TAKEN, MaskedText, MaskError
from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.collators import UNTRAINED
from finetuning.data.samples import Conversation, Message, Preference
from finetuning.data.statistics import TOO_LONG
from finetuning.data.tokenization.labels import LabelBuilder, TokenizedText

EMPTY_ANSWER = "an assistant's turn without words"
NO_ANSWER = "no message of the assistant"
NOTHING_CHOSEN = "none of the assistant's messages is to be trained"
MARKERS_IN_TEXT = "a message holds a special token of the tokenizer as text"


@dataclass(slots=True)
class TokenizedSample:
    """One row, ready: int32 arrays, texts or truth values by column, its length, its trained tokens, and the text that
    it was made of."""

    columns: dict[str, Any]
    tokens: int
    trained: int
    text: str
    tokens_cut: int = 0
    answer_cut: bool = False
    notes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DroppedSample:
    """A row that is not trained on, and why. `is_bad` tells a row that is wrong from one that does not fit."""

    reason: str
    detail: str = ""
    is_bad: bool = False
    is_fault: bool = True
    tokens: int = 0


class Processor(Protocol):
    """Makes examples of a batch of typed rows."""

    def __call__(self, rows: Sequence[Any]) -> list[TokenizedSample | DroppedSample]: ...


def unverified_mask(refused: MaskError) -> DroppedSample:
    return DroppedSample("no loss mask could be proven", str(refused), is_bad=True)


@dataclass
class RowWarnings:
    """Looks for what is worth knowing in messages."""

    special_tokens: tuple[str, ...]

    @cached_property
    def _first_characters(self) -> tuple[str, ...]:
        return tuple({token[0] for token in self.special_tokens})

    def of_all(self, rows: Sequence[Sequence[Message]]) -> Sequence[Collection[str]]:
        """The notes of each row's messages; those of rows without any are found at once."""
        contents = [message.get("content") or " " for messages in rows for message in messages]
        words = "\n".join(contents)
        if any(map(str.isspace, contents)) or any(character in words for character in self._first_characters):
            return [self(messages) for messages in rows]
        return [()] * len(rows)

    def __call__(self, messages: Sequence[Message]) -> set[str]:
        notes: set[str] = set()
        contents = [message.get("content") or " " for message in messages]
        if not any(map(str.isspace, contents)) and not self._holds_special("\n".join(contents)):
            return notes
        for message in messages:
            content = message.get("content") or ""
            if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
                notes.add(EMPTY_ANSWER)
            if self._holds_special(content):
                notes.add(MARKERS_IN_TEXT)
        return notes

    def _holds_special(self, content: str) -> bool:
        for character in self._first_characters:
            if character in content:
                return any(token in content for token in self.special_tokens)
        return False


@dataclass
class ChatProcessor:
    """Conversations to `input_ids` and `labels`; -100 labels what is not trained."""

    renderer: TemplateRenderer
    masker: AssistantMaskBuilder
    labeller: LabelBuilder
    max_length: int
    truncate: bool
    completions_only: bool
    notices: RowWarnings = field(init=False)

    def __post_init__(self) -> None:
        self.notices = RowWarnings(self.renderer.special_tokens)

    def __call__(self, rows: Sequence[Conversation]) -> list[TokenizedSample | DroppedSample]:
        turns = [self._turns(row) for row in rows]
        rendered = self._render(rows, turns)
        shown = [(one, wanted) for one, wanted in zip(rendered, turns, strict=True) if isinstance(one, MaskedText)]
        spans = [None if wanted is None else one.spans for one, wanted in shown]
        heads = [one.heads for one, _ in shown]
        tokenised = iter(self.labeller.encode([one.text for one, _ in shown], spans, heads))
        notes = self.notices.of_all([row.messages for row in rows])
        return [
            one if isinstance(one, DroppedSample) else self._finish(row, one, next(tokenised), own)
            for row, one, own in zip(rows, rendered, notes, strict=True)
        ]

    def _turns(self, row: Conversation) -> Sequence[int] | None:
        """The messages to train on; None for all of the text."""
        if row.turns == "all" or (row.turns is None and not self.completions_only):
            return None
        if row.turns is not None:
            return row.turns
        return [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]

    def _render(
        self, rows: Sequence[Conversation], turns: Sequence[Sequence[int] | None]
    ) -> list[MaskedText | DroppedSample]:
        chosen = [(row, wanted) for row, wanted in zip(rows, turns, strict=True) if wanted is not None]
        marked = iter(self.masker.find_turns(*map(list, zip(*chosen, strict=True))) if chosen else ())
        texts = iter(self.masker.texts([row for row, wanted in zip(rows, turns, strict=True) if wanted is None]))
        found = [_whole(next(texts)) if wanted is None else next(marked) for wanted in turns]
        return [unverified_mask(one) if isinstance(one, MaskError) else one for one in found]

    def _finish(
        self, row: Conversation, marked: MaskedText, tokens: TokenizedText | MaskError, notes: Collection[str]
    ) -> TokenizedSample | DroppedSample:
        if isinstance(tokens, MaskError):
            return unverified_mask(tokens)
        example = truncate(tokens, self.max_length, self.truncate, marked.text, marked.notes.union(notes))
        if isinstance(example, DroppedSample) and example.detail == NO_ANSWER:
            has_answer = any(message["role"] == "assistant" for message in row.messages)
            return replace(example, detail=NOTHING_CHOSEN) if has_answer else example
        if isinstance(example, TokenizedSample) and example.answer_cut and row.messages[-1]["role"] != "assistant":
            return replace(example, answer_cut=False)
        return example


def _whole(text: str | TemplateRenderError) -> MaskedText | MaskError:
    return MaskedText(text, (), "everything") if isinstance(text, str) else MaskError(f"{NOT_TAKEN}: {text}")


def truncate(
    tokens: TokenizedText | MaskError, max_length: int, truncate: bool, text: str = "", notes: Iterable[str] = ()
) -> TokenizedSample | DroppedSample:
    """The tokens as `input_ids` and `labels`, cut at the end where they are too long and may be cut."""
    if isinstance(tokens, MaskError):
        return unverified_mask(tokens)
    size = len(tokens.ids)
    if 0 < size <= max_length and (trained := sum([last - first for first, last in tokens.runs])):
        columns = {"input_ids": tokens.ids, "labels": tokens.labels(UNTRAINED)}
        found = frozenset([*notes, tokens.note] if tokens.note else notes)
        return TokenizedSample(columns, size, trained, text, notes=found)
    if not any(last > first for first, last in tokens.runs):
        return DroppedSample("nothing to train on", NO_ANSWER)
    if size > max_length and not truncate:
        return DroppedSample(TOO_LONG, f"{size} tokens, the limit is {max_length}", is_fault=False, tokens=size)
    ids, labels = tokens.ids[:max_length], tokens.labels(UNTRAINED)[:max_length]
    trained = sum(max(min(last, max_length) - first, 0) for first, last in tokens.runs)
    if trained == 0:
        return DroppedSample("nothing left to train on", f"the answer begins after {max_length} tokens", tokens=size)
    return TokenizedSample(
        columns={"input_ids": ids, "labels": labels},
        tokens=len(ids),
        trained=trained,
        text=text,
        tokens_cut=max(size - max_length, 0),
        answer_cut=tokens.runs[-1][1] > max_length,
        notes=frozenset([*notes, tokens.note] if tokens.note else notes),
    )


@dataclass
class PreferenceProcessor:
    """Preferences to `prompt_ids`, `chosen_ids` and `rejected_ids`.

    A prompt and its answer are rendered and tokenised together, so that the ids are those of the served model; the
    answer ends with its end-of-turn marker.
    """

    renderer: TemplateRenderer
    masker: AssistantMaskBuilder
    labeller: LabelBuilder
    max_length: int | None
    notices: RowWarnings = field(init=False)

    def __post_init__(self) -> None:
        self.notices = RowWarnings(self.renderer.special_tokens)

    def __call__(self, rows: Sequence[Preference]) -> list[TokenizedSample | DroppedSample]:
        found = iter(self.mark([(row, answer) for row in rows for answer in (row.chosen, row.rejected)]))
        marked = [(next(found), next(found)) for _ in rows]
        shown = [one for pair in marked for one in pair if isinstance(one, MaskedText)]
        tokenised = iter(self.labeller.encode([one.text for one in shown], [one.spans for one in shown]))
        pairs = [tuple(next(tokenised) if isinstance(one, MaskedText) else one for one in pair) for pair in marked]
        return [self._finish(row, found, pair) for row, found, pair in zip(rows, marked, pairs, strict=True)]

    def mark(self, answers: Sequence[tuple[Any, list[Message]]]) -> list[MaskedText | MaskError]:
        """The text of each row's prompt with an answer, up to the end of the answer, which is its one span."""
        if any(row.is_text for row, _ in answers):
            return [
                self._texts(row, answer) if row.is_text else self.mark([(row, answer)])[0] for row, answer in answers
            ]
        conversations = [
            Conversation([*row.prompt, *answer], row.place, row.tools, row.template_kwargs) for row, answer in answers
        ]
        turns = [range(len(row.prompt), len(row.prompt) + len(answer)) for row, answer in answers]
        return [self._one_span(one) for one in self.masker.find_turns(conversations, turns)]

    def _mark(self, row: Any, answer: list[Message]) -> MaskedText | MaskError:
        return self.mark([(row, answer)])[0]

    def _texts(self, row: Any, answer: list[Message]) -> MaskedText:
        """A prompt and an answer that no template frames, and the end-of-sequence token."""
        prompt = row.prompt[0]["content"]
        text = f"{prompt}{answer[0]['content']}{self.renderer.tokenizer.eos_token or ''}"
        return MaskedText(text, ((len(prompt), len(text)),), "text")

    @staticmethod
    def _one_span(found: MaskedText | MaskError) -> MaskedText | MaskError:
        if isinstance(found, MaskError):
            return found
        if any(one[1] != other[0] for one, other in pairwise(found.spans)):
            return MaskError("an answer of several messages has headers between them that would be trained")
        span = (found.spans[0][0], found.spans[-1][1])
        return MaskedText(found.text[: span[1]], (span,), found.method, found.notes)

    def _finish(
        self, row: Preference, found: tuple[MaskedText | MaskError, ...], pair: tuple[TokenizedText | MaskError, ...]
    ) -> TokenizedSample | DroppedSample:
        for name, one in zip(("chosen", "rejected"), pair, strict=True):
            if isinstance(one, MaskError):
                return unverified_mask(MaskError(f"{name} answer: {one}"))
        (prompt, chosen), (other_prompt, rejected) = (self._cut(tokens) for tokens in pair)
        if not np.array_equal(prompt, other_prompt):
            return unverified_mask(MaskError("the prompt is rendered differently before the rejected answer"))
        if np.array_equal(chosen, rejected):
            return DroppedSample("the chosen and the rejected answer are the same")
        size = len(prompt) + max(len(chosen), len(rejected))
        room = size if self.max_length is None else self.max_length - len(prompt)
        if room <= 0:
            return DroppedSample("nothing left to train on", f"the prompt alone is {len(prompt)} tokens", tokens=size)
        notes = set().union(*(one.notes for one in found), self.notices([*row.prompt, *row.chosen, *row.rejected]))
        notes.update(tokens.note for tokens in pair if tokens.note)
        cut = max(len(chosen) - room, 0) + max(len(rejected) - room, 0)
        chosen, rejected = chosen[:room], rejected[:room]
        if np.array_equal(chosen, rejected):
            return DroppedSample("nothing left to train on", "the answers differ only after max_length", tokens=size)
        return TokenizedSample(
            columns={"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected},
            tokens=2 * len(prompt) + len(chosen) + len(rejected),
            trained=len(chosen) + len(rejected),
            text=f"{found[0].text}\0{found[1].text}",
            tokens_cut=cut,
            answer_cut=cut > 0,
            notes=frozenset(notes),
        )

    @staticmethod
    def _cut(tokens: TokenizedText) -> tuple[np.ndarray, np.ndarray]:
        first, last = tokens.runs[0]
        return tokens.ids[:first], tokens.ids[first:last]
