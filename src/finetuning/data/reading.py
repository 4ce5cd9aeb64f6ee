"""Files to the examples that they hold, and examples to a dataset."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.config.data import DatasetSource
from finetuning.data.columns import Columns, as_dataset
from finetuning.data.examples import Example, Lost, Maker
from finetuning.data.formats import Options
from finetuning.data.labelling import Labeller
from finetuning.data.ledger import PartLedger
from finetuning.data.loading import open_dataset, title_of
from finetuning.data.preview import PreviewRow, preview_of
from finetuning.data.rows import Skipped
from finetuning.errors import DataError, Place, Problem

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SAME_AS_BEFORE = "the same as a row before"
_BATCH = 1024
MOST_SHOWN = 100
"""Rows of each run that a preview can show."""


@dataclass(frozen=True)
class Part:
    """The rows of one part of the data: those that are trained on, and the number of rows in each file."""

    examples: pa.Table
    alive: np.ndarray
    lengths: list[int]


@dataclass
class Reading:
    """What is common to all parts: how rows are read and made, and what has gone wrong so far."""

    kind: str
    """The kind of rows that the method takes: a key of `KINDS`."""
    options: Options
    make: Maker
    labeller: Labeller
    limit: int | None
    problems: list[Problem] = field(default_factory=list)
    preview: list[list[PreviewRow]] = field(default_factory=list)
    seen: dict[bytes, str] = field(default_factory=dict)

    def read(self, sources: Sequence[tuple[str, DatasetSource]], name: str) -> tuple[Part, PartLedger]:
        """The rows of datasets, each with its key in the config. One batch is made into examples, by a thread that
        mostly waits for the tokenizer's own, while the next is read and parsed."""
        ledger = PartLedger(name, self.limit)
        columns = Columns()
        alive: list[bool] = []
        lengths = []
        with _spared_collections(), ThreadPoolExecutor(1, "prepare") as thread:
            for key, source in sources:
                before = len(alive)
                opened = open_dataset(source, key, self.kind, self.options)
                ledger.formats[title_of(source)] = str(opened)
                waiting: tuple[list[Any], Future[list[Example | Lost]]] | None = None
                while batch := list(islice(opened.rows, _BATCH)):
                    parsed = [one for row in batch for one in (row if isinstance(row, list) else [row])]
                    made = thread.submit(self.make, [one for one in parsed if not isinstance(one, Problem | Skipped)])
                    if waiting:
                        self._add(*waiting, ledger, columns, alive)
                    waiting = (parsed, made)
                if waiting:
                    self._add(*waiting, ledger, columns, alive)
                lengths.append(len(alive) - before)
        return Part(columns.table(), np.array(alive, dtype=bool), lengths), ledger

    def _add(
        self,
        parsed: Sequence[Any],
        examples: Future[list[Example | Lost]],
        ledger: PartLedger,
        columns: Columns,
        alive: list[bool],
    ) -> None:
        made = iter(examples.result())
        for row in parsed:
            if isinstance(row, Problem):
                example: Example | Lost = Lost("bad row", row.message, is_bad=True)
            else:
                example = Lost(row.reason, is_fault=False) if isinstance(row, Skipped) else next(made)
            alive.append(isinstance(example, Example))
            if isinstance(example, Lost):
                if example.is_bad:
                    self.problems.append(row if isinstance(row, Problem) else Problem(_why(example), row.place))
                ledger.drop(row.place, example.reason, example.detail, is_fault=example.is_fault, tokens=example.tokens)
                continue
            self._keep(example, row.place, ledger)
            columns.add(example.columns)
        columns.flush()

    def _keep(self, example: Example, place: Place, ledger: PartLedger) -> None:
        if example.tokens_cut:
            ledger.truncate(place, example.tokens, example.trained, example.tokens_cut, example.answer_cut)
        else:
            ledger.keep(example.tokens, example.trained)
        for note in example.notes:
            ledger.note(note)
        if len(self.preview) < MOST_SHOWN:
            self.preview.append(preview_of(example, place, self.labeller))
        key = hashlib.blake2b(example.text.encode(), digest_size=16).digest()
        first = self.seen.get(key)
        if first is None:
            self.seen[key] = ledger.part
        else:
            ledger.note(SAME_AS_BEFORE if first == ledger.part else f"the same as a {first} row")


@contextmanager
def _spared_collections() -> Iterator[None]:
    """Keeps the garbage collector from going through all that the libraries hold, once in a few batches."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def to_dataset(part: Part, order: np.ndarray, name: str) -> datasets.Dataset:
    """The rows of a part in an order, without those that were dropped."""
    rows = (np.cumsum(part.alive) - 1)[order[part.alive[order]]]
    if not len(rows):
        raise DataError(f"no {name} row is left: all rows that were to be used for it were dropped")
    in_order = len(rows) == part.examples.num_rows and np.array_equal(rows, np.arange(len(rows)))
    return as_dataset(part.examples if in_order else part.examples.take(rows))


def _why(lost: Lost) -> str:
    return f"{lost.reason}: {lost.detail}" if lost.detail else lost.reason
