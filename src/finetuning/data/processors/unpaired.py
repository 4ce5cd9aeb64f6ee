"""Rated answers to the columns that KTO trains on, and pairs that are kept whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetuning.data.chat.markers import MaskedText, MaskError
from finetuning.data.processors.base import DroppedSample, PreferenceProcessor, TokenizedSample, unverified_mask
from finetuning.data.samples import Preference, UnpairedPreference
from finetuning.data.statistics import TOO_LONG
from finetuning.data.tokenization.labels import TokenizedText

if TYPE_CHECKING:
    import datasets


@dataclass
class UnpairedProcessor(PreferenceProcessor):
    """Rated answers to `prompt_ids`, `completion_ids` and `label`, with the borders and proofs of a preference's."""

    def __call__(self, rows: Sequence[UnpairedPreference]) -> list[TokenizedSample | DroppedSample]:
        marked = [self._mark(row, row.completion) for row in rows]
        shown = [one for one in marked if isinstance(one, MaskedText)]
        tokenised = iter(self.labeller.encode([one.text for one in shown], [one.spans for one in shown]))
        return [
            self._rate(row, one, next(tokenised)) if isinstance(one, MaskedText) else unverified_mask(one)
            for row, one in zip(rows, marked, strict=True)
        ]

    def _rate(
        self, row: UnpairedPreference, marked: MaskedText, tokens: TokenizedText | MaskError
    ) -> TokenizedSample | DroppedSample:
        if isinstance(tokens, MaskError):
            return unverified_mask(tokens)
        prompt, completion = self._cut(tokens)
        size = len(prompt) + len(completion)
        room = size if self.max_length is None else self.max_length - len(prompt)
        if room <= 0:
            return DroppedSample("nothing left to train on", f"the prompt alone is {len(prompt)} tokens", tokens=size)
        cut = max(len(completion) - room, 0)
        notes = marked.notes | self.notices([*row.prompt, *row.completion]) | ({tokens.note} if tokens.note else set())
        return TokenizedSample(
            columns={"prompt_ids": prompt, "completion_ids": completion[:room], "label": row.label},
            tokens=min(size, len(prompt) + room),
            trained=len(completion) - cut,
            text=marked.text,
            tokens_cut=cut,
            answer_cut=cut > 0,
            notes=frozenset(notes),
        )


@dataclass
class WholePairProcessor:
    """Processes preferences like `PreferenceProcessor`, but drops pairs that are too long: a reward is read at
    the end of a whole answer."""

    make: PreferenceProcessor
    max_length: int | None

    def __call__(self, rows: Sequence[Preference]) -> list[TokenizedSample | DroppedSample]:
        return [self._unless_too_long(one) for one in self.make(rows)]

    def _unless_too_long(self, one: TokenizedSample | DroppedSample) -> TokenizedSample | DroppedSample:
        if isinstance(one, DroppedSample) or self.max_length is None:
            return one
        ids = one.columns
        size = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        if size <= self.max_length:
            return one
        detail = f"{size} tokens, the limit is {self.max_length}"
        return DroppedSample(TOO_LONG, detail, is_fault=False, tokens=size)


def with_neighbours(dataset: datasets.Dataset, batch_size: int) -> datasets.Dataset:
    """The rows with `KL_completion_ids`, the answer of the row before, within batches of this many rows.

    The first row of a batch gets the last one's, so that the answers of a batch are the same twice over. A batch of one
    row gets the answer of the batch before.
    """
    import datasets
    from datasets.table import InMemoryTable

    count = len(dataset)
    starts = np.arange(0, count, batch_size)
    neighbours = np.arange(count) - 1
    neighbours[starts] = np.minimum(starts + batch_size, count) - 1
    if count > 1 and starts[-1] == count - 1:
        neighbours[-1] = count - 2
    table = dataset.with_format("arrow")[:]
    table = table.append_column("KL_completion_ids", table["completion_ids"].take(neighbours))
    features = datasets.Features({**dataset.features, "KL_completion_ids": dataset.features["completion_ids"]})
    return datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))
