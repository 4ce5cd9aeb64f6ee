"""Rows of supervised fine-tuning to `input_ids` and `labels`: chats, plain texts and tokenized rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.collators import UNTRAINED
from finetuning.data.processors.base import (
    NO_ANSWER,
    PROMPT_SPACE,
    TEMPLATE_IN_TEXT,
    DroppedSample,
    MessageWarnings,
    TokenizedSample,
    explain_split,
    find_unprinted,
    omitted_messages,
    serve_tool_calls,
    too_long,
    truncate,
    unused_arguments,
    unverified_mask,
)
from finetuning.data.samples import RENDER_ERROR, Conversation, MaskedText, MaskError, RowToTokenize, Text, TokenIds
from finetuning.data.tokenization.labels import LabelBuilder, TokenizedText

NO_TURN_SELECTED = "no assistant message is selected for training"
SPLIT_TEXT = "part of a text that was split at max_seq_length"
EMPTY_COMPLETION = "a completion without text"


@dataclass
class ChatProcessor:
    """Conversations to `input_ids` and `labels`; the labels are -100 where no loss is taken."""

    renderer: TemplateRenderer
    mask_builder: AssistantMaskBuilder
    label_builder: LabelBuilder
    max_length: int
    truncate: bool
    completions_only: bool
    warnings: MessageWarnings = field(init=False)

    def __post_init__(self) -> None:
        self.warnings = MessageWarnings(self.renderer.special_tokens, self.renderer.message_keys)

    def __call__(self, rows: Sequence[Conversation]) -> list[TokenizedSample | DroppedSample]:
        serve_tool_calls(rows, self.renderer)
        turns = [self._turns(row) for row in rows]
        rendered = self._render(rows, turns)
        masked = [
            (result, row_turns)
            for result, row_turns in zip(rendered, turns, strict=True)
            if isinstance(result, MaskedText)
        ]
        spans = [None if row_turns is None else result.spans for result, row_turns in masked]
        headers = [result.headers for result, _ in masked]
        tokenized = iter(self.label_builder.encode([result.text for result, _ in masked], spans, headers))
        warnings = self.warnings.of_batch([row.messages for row in rows])
        return [
            result if isinstance(result, DroppedSample) else self._finish(row, result, next(tokenized), row_warnings)
            for row, result, row_warnings in zip(rows, rendered, warnings, strict=True)
        ]

    def render_one(self, row: Conversation) -> tuple[MaskedText | DroppedSample, Sequence[int] | None]:
        """Return the rendered text of a conversation with its spans, and the messages to train on; None for all."""
        turns = self._turns(row)
        return self._render([row], [turns])[0], turns

    def _turns(self, row: Conversation) -> Sequence[int] | None:
        """Indices of the messages to train on; None to train on the whole text."""
        if row.turns == "all" or (row.turns is None and not self.completions_only):
            return None
        if row.turns is not None:
            return row.turns
        return [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]

    def _render(
        self, rows: Sequence[Conversation], turns: Sequence[Sequence[int] | None]
    ) -> list[MaskedText | DroppedSample]:
        with_turns = [(row, selected) for row, selected in zip(rows, turns, strict=True) if selected is not None]
        masked = iter(self.mask_builder.find_turns(*map(list, zip(*with_turns, strict=True))) if with_turns else ())
        whole = [row for row, selected in zip(rows, turns, strict=True) if selected is None]
        texts = iter(self.mask_builder.texts(whole))
        results = [_whole_text(next(texts)) if selected is None else next(masked) for selected in turns]
        return [
            unverified_mask(result, self.renderer) if isinstance(result, MaskError) else result for result in results
        ]

    def _finish(
        self, row: Conversation, masked: MaskedText, tokens: TokenizedText | MaskError, warnings: Collection[str]
    ) -> TokenizedSample | DroppedSample:
        if isinstance(tokens, MaskError):
            return unverified_mask(tokens)
        notes = masked.warnings.union(warnings)
        # A text that follows a known layout has all contents, and its row nothing but contents.
        if masked.method != "layout":
            if unprinted := find_unprinted(row, self.renderer, masked.text):
                return unprinted
            notes = notes.union(omitted_messages(row.messages, masked.text), unused_arguments(row, self.renderer))
        sample = truncate(tokens, self.max_length, self.truncate, masked.text, notes)
        if isinstance(sample, DroppedSample) and sample.detail == NO_ANSWER:
            has_answer = any(message["role"] == "assistant" for message in row.messages)
            return replace(sample, detail=NO_TURN_SELECTED) if has_answer else sample
        if isinstance(sample, TokenizedSample) and sample.answer_cut and row.messages[-1]["role"] != "assistant":
            return replace(sample, answer_cut=False)
        return sample


def _whole_text(text: str | TemplateRenderError) -> MaskedText | MaskError:
    return MaskedText(text, (), "everything") if isinstance(text, str) else MaskError(f"{RENDER_ERROR}: {text}")


@dataclass
class SFTProcessor:
    """Chats, texts and token ids to `input_ids` and `labels`; the labels are -100 where no loss is taken."""

    make_chat_processor: Callable[[], ChatProcessor]
    """Called at the first chat: texts and token ids need no chat template."""
    label_builder: LabelBuilder
    eos: str | None
    vocab_size: int
    max_length: int
    truncate: bool
    special_tokens: tuple[str, ...] = ()
    find_ends: Callable[[], Sequence[str]] = tuple
    """Called for the first text that ends with a special token: the tokens that end a turn."""

    def __call__(self, rows: Sequence[Conversation | Text | TokenIds]) -> list[TokenizedSample | DroppedSample]:
        # A batch may mix kinds of rows. Each kind is processed as a whole, and put back into the order of the rows.
        results: dict[int, TokenizedSample | DroppedSample] = {}
        chats = {index: row for index, row in enumerate(rows) if isinstance(row, Conversation)}
        texts = {index: row for index, row in enumerate(rows) if isinstance(row, Text)}
        token_ids = {index: row for index, row in enumerate(rows) if isinstance(row, TokenIds)}
        if chats:
            results |= zip(chats, self._chat_processor(list(chats.values())), strict=True)
        if texts:
            results |= zip(texts, self._texts(list(texts.values())), strict=True)
        results |= {index: self._check_ids(row) for index, row in token_ids.items()}
        return [results[index] for index in range(len(rows))]

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(self.find_ends())

    @cached_property
    def _text_warnings(self) -> MessageWarnings:
        return MessageWarnings(self.special_tokens)

    @cached_property
    def _chat_processor(self) -> ChatProcessor:
        return self.make_chat_processor()

    def _texts(self, rows: Sequence[Text]) -> list[TokenizedSample | DroppedSample]:
        with_eos = [self._with_eos(row) for row in rows]
        usable = [row for row in with_eos if isinstance(row, Text)]
        tokenized = iter(self.label_builder.encode([row.text for row in usable], [row.spans for row in usable]))
        return [row if isinstance(row, DroppedSample) else self._finish(row, next(tokenized)) for row in with_eos]

    def _with_eos(self, row: Text) -> Text | DroppedSample:
        """Append the end-of-sequence token once, and include it in the span that reaches to the end of the text."""
        if row.fault or not row.text.strip():
            return DroppedSample("nothing to train on", row.fault or "the text is empty")
        if not row.add_eos:
            return row
        if not self.eos:
            return DroppedSample(
                "no end-of-sequence token",
                "the tokenizer has no end-of-sequence token: name one as eos_token in its tokenizer_config.json, or set"
                " add_eos_token: false for this dataset",
                is_bad=True,
            )
        # A text to which a chat template was applied ends with the end of a turn, and often a line break.
        stripped = row.text.rstrip()
        is_ended = row.text.endswith(self.eos) or (
            stripped.endswith(self.special_tokens) and stripped.endswith((self.eos, *self._ends))
        )
        text = row.text if is_ended else row.text + self.eos
        spans = row.spans
        if spans and spans[-1][1] == len(row.text):
            spans = (*spans[:-1], (spans[-1][0], len(text)))
        return replace(row, text=text, spans=spans)

    def _finish(self, row: Text, tokens: TokenizedText | MaskError) -> TokenizedSample | DroppedSample:
        start = row.spans[0][0] if row.spans else 0
        if isinstance(tokens, MaskError) and row.text[start - 1 : start].isspace():
            return unverified_mask(MaskError(f"{tokens}: {PROMPT_SPACE}"))
        sample = truncate(tokens, self.max_length, self.truncate)
        if isinstance(sample, DroppedSample):
            return sample
        warnings = row.warnings | {str(explain_split(warning, row.text, start)) for warning in sample.warnings}
        text = row.text.rstrip().removesuffix(self.eos or "")
        if not row.is_templated and self._text_warnings.has_special_token(text):
            warnings |= {TEMPLATE_IN_TEXT}
        trained_text = "".join(row.text[start:end] for start, end in row.spans) if row.spans else row.text
        if not trained_text.removesuffix(self.eos or "").strip():
            warnings |= {EMPTY_COMPLETION}
        return replace(sample, text=row.text, warnings=warnings)

    def split_rows(self, rows: Sequence[RowToTokenize]) -> list[RowToTokenize]:
        """Replace each text that is trained whole and is too long by rows of at most `max_length` tokens."""
        texts: dict[int, str] = {}
        for index, row in enumerate(rows):
            # A token is at least one byte long: a text that is short in bytes need not be tokenized to know.
            if (
                isinstance(row, Text)
                and row.spans is None
                and not row.images
                and len(row.text.encode()) + 2 > self.max_length
            ):
                with_eos = self._with_eos(row)
                if isinstance(with_eos, Text):
                    texts[index] = with_eos.text
        tokenized: dict[int, TokenizedText | MaskError] = dict(
            zip(texts, self.label_builder.encode(list(texts.values()), [None] * len(texts)), strict=True)
        )
        result: list[RowToTokenize] = []
        for index, row in enumerate(rows):
            tokens = tokenized.get(index)
            if isinstance(row, Text) and isinstance(tokens, TokenizedText) and len(tokens.ids) > self.max_length:
                result += self._chunks(tokens.ids.tolist(), row)
            else:
                result.append(row)
        return result

    def _chunks(self, ids: list[int], row: Text) -> list[TokenIds]:
        chunks = [ids[first : first + self.max_length] for first in range(0, len(ids), self.max_length)]
        rows = [TokenIds(chunk, chunk, row.location, row.warnings | {SPLIT_TEXT}) for chunk in chunks]
        rows[0].unused = row.unused
        return rows

    def _check_ids(self, row: TokenIds) -> TokenizedSample | DroppedSample:
        # Before there is an array: an id may be larger than any type of numpy.
        lowest, highest = min(row.input_ids), max(row.input_ids)
        if lowest < 0 or highest >= self.vocab_size:
            worst = highest if highest >= self.vocab_size else lowest
            return DroppedSample(
                "bad row",
                f"token id {worst} is outside the tokenizer's vocabulary of {self.vocab_size}: tokenized with another"
                " tokenizer?",
                is_bad=True,
            )
        ids, labels = np.array(row.input_ids, dtype=np.int64), np.array(row.labels, dtype=np.int32)
        size = len(ids)
        if not (labels != UNTRAINED).any():
            return DroppedSample("nothing to train on", "every label is -100")
        if size > self.max_length and not self.truncate:
            return too_long(size, self.max_length)
        last = int(np.flatnonzero(labels != UNTRAINED)[-1])
        ids, labels = ids[: self.max_length].astype(np.int32), labels[: self.max_length]
        trained = int(np.count_nonzero(labels != UNTRAINED))
        if not trained:
            return DroppedSample(
                "nothing left to train on", f"the labels begin after {self.max_length} tokens", tokens=size
            )
        return TokenizedSample(
            columns={"input_ids": ids, "labels": labels},
            tokens=len(ids),
            trained=trained,
            text=" ".join(map(str, row.input_ids)),
            tokens_cut=max(size - self.max_length, 0),
            answer_cut=last >= self.max_length,
            warnings=row.warnings,
        )
