"""What supervised fine-tuning trains on, whatever its rows are: chats, texts and ready tokens, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from finetuning.data.chat.markers import MaskError
from finetuning.data.collators import UNTRAINED
from finetuning.data.processors.base import ChatProcessor, DroppedSample, TokenizedSample, truncate
from finetuning.data.samples import Conversation, Text, TokenIds
from finetuning.data.statistics import TOO_LONG
from finetuning.data.tokenization.labels import LabelBuilder, TokenizedText

PIECE = "a piece of a text that is longer than a row may be"
NO_WORDS = "a completion without words"


@dataclass
class SFTProcessor:
    """Chats, texts and ready tokens to `input_ids` and `labels`; -100 labels what is not trained."""

    make_chats: Callable[[], ChatProcessor]
    """Called when the first chat comes by: texts and tokens need no chat template."""
    labeller: LabelBuilder
    eos: str | None
    vocabulary: int
    max_length: int
    truncate: bool

    def __call__(self, rows: Sequence[Any]) -> list[TokenizedSample | DroppedSample]:
        made: list[TokenizedSample | DroppedSample | None] = [None] * len(rows)
        for kind, make in ((Conversation, self._chats), (Text, self._texts), (TokenIds, self._ready)):
            places = [index for index, row in enumerate(rows) if isinstance(row, kind)]
            if places:
                for index, one in zip(places, make([rows[index] for index in places]), strict=True):
                    made[index] = one
        return [one for one in made if one is not None]

    def _chats(self, rows: Sequence[Conversation]) -> list[TokenizedSample | DroppedSample]:
        return self._chat_maker(rows)

    @cached_property
    def _chat_maker(self) -> ChatProcessor:
        return self.make_chats()

    def _texts(self, rows: Sequence[Text]) -> list[TokenizedSample | DroppedSample]:
        ended = [self._with_eos(row) for row in rows]
        usable = [row for row in ended if isinstance(row, Text)]
        tokenised = iter(self.labeller.encode([row.text for row in usable], [row.spans for row in usable]))
        return [row if isinstance(row, DroppedSample) else self._finish(row, next(tokenised)) for row in ended]

    def _with_eos(self, row: Text) -> Text | DroppedSample:
        """The row with the end-of-sequence token at its end, once, and in the span that reaches up to there."""
        if row.fault or not row.text.strip():
            return DroppedSample("nothing to train on", row.fault or "the text is empty")
        if not row.add_eos:
            return row
        if not self.eos:
            return DroppedSample(
                "no end of the text",
                "the tokenizer has no end-of-sequence token; set add_eos_token: false",
                is_bad=True,
            )
        text = row.text if row.text.endswith(self.eos) else row.text + self.eos
        spans = row.spans
        if spans and spans[-1][1] == len(row.text):
            spans = (*spans[:-1], (spans[-1][0], len(text)))
        return replace(row, text=text, spans=spans)

    def _finish(self, row: Text, tokens: TokenizedText | MaskError) -> TokenizedSample | DroppedSample:
        fitted = truncate(tokens, self.max_length, self.truncate)
        if isinstance(fitted, DroppedSample):
            return fitted
        notes = set(row.notes | fitted.notes)
        words = "".join(row.text[start:end] for start, end in row.spans) if row.spans else row.text
        if not words.removesuffix(self.eos or "").strip():
            notes.add(NO_WORDS)
        return replace(fitted, text=row.text, notes=frozenset(notes))

    def divide(self, rows: list[Any]) -> list[Any]:
        """The rows, each text that is trained whole and too long as its tokens, in rows of `max_length` of them."""
        texts = {}
        for index, row in enumerate(rows):
            if isinstance(row, Text) and row.spans is None and len(row.text.encode()) + 2 > self.max_length:
                ended = self._with_eos(row)
                if isinstance(ended, Text):
                    texts[index] = ended.text
        tokenised = dict(zip(texts, self.labeller.encode(list(texts.values()), [None] * len(texts)), strict=True))
        divided = []
        for index, row in enumerate(rows):
            tokens = tokenised.get(index)
            is_long = isinstance(tokens, TokenizedText) and len(tokens.ids) > self.max_length
            divided += self._pieces(tokens.ids.tolist(), row) if is_long else (row,)
        return divided

    def _pieces(self, ids: list[int], row: Text) -> list[TokenIds]:
        pieces = [ids[first : first + self.max_length] for first in range(0, len(ids), self.max_length)]
        return [TokenIds(piece, piece, row.place, row.notes | {PIECE}) for piece in pieces]

    def _ready(self, rows: Sequence[TokenIds]) -> list[TokenizedSample | DroppedSample]:
        return [self._check_ids(row) for row in rows]

    def _check_ids(self, row: TokenIds) -> TokenizedSample | DroppedSample:
        ids = np.array(row.input_ids, dtype=np.int64)
        labels = np.array(row.labels, dtype=np.int32)
        size = len(ids)
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            worst = int(ids.max() if ids.max() >= self.vocabulary else ids.min())
            return DroppedSample(
                "bad row",
                f"token {worst} is none of the tokenizer's {self.vocabulary}: prepared for another one?",
                True,
            )
        if not (labels != UNTRAINED).any():
            return DroppedSample("nothing to train on", "every label is -100")
        if size > self.max_length and not self.truncate:
            return DroppedSample(
                TOO_LONG, f"{size} tokens, the limit is {self.max_length}", is_fault=False, tokens=size
            )
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
            notes=row.notes,
        )
