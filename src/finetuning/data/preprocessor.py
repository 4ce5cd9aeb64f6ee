"""Files to the examples that they hold, and examples to a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.config.sections.data import DatasetSource
from finetuning.data.arrow import Spool, taken
from finetuning.data.batches import Batch, Repeats, in_batches, make_batch, typed
from finetuning.data.columns import as_dataset
from finetuning.data.formats import Options
from finetuning.data.ledger import PartLedger
from finetuning.data.open_dataset import OpenDataset, open_dataset, title_of
from finetuning.data.preview import PreviewRow, preview_of
from finetuning.data.processors.base import Maker
from finetuning.data.statistics import Totals
from finetuning.data.tokenization.labels import Labeller
from finetuning.data.worker_pool import Workers, usable_workers
from finetuning.errors import DataError, Problem

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_FEW = 8
"""Batches that are made before other processes are asked to help."""
MOST_SHOWN = 100
"""Rows of each run that a preview can show."""


@dataclass(frozen=True)
class Part:
    """The rows of one part of the data: those that are trained on, and the number of rows in each file."""

    examples: pa.Table
    alive: np.ndarray
    lengths: list[int]
    sizes: np.ndarray
    """Tokens and trained tokens of each row that is trained on, int64, (rows, 2)."""
    hashes: np.ndarray
    """Of the text of each row that is trained on, int64."""

    def trained_on(self, order: np.ndarray) -> np.ndarray:
        """Indices into what is held of rows that are trained on, of those in `order` that are."""
        return (np.cumsum(self.alive) - 1)[order[self.alive[order]]]


@dataclass
class Reading:
    """What is common to all parts: how rows are read and made, and what has gone wrong so far."""

    kind: str
    """The kind of rows that the method takes: a key of `KINDS`."""
    options: Options
    make: Maker
    labeller: Labeller
    limit: int | None
    workers: int = 1
    """Processes that may share the work."""
    divide: Callable[[list[Any]], list[Any]] | None = None
    """Makes several of rows that are too long to be one."""
    problems: list[Problem] = field(default_factory=list)
    preview: list[list[PreviewRow]] = field(default_factory=list)
    repeats: Repeats = field(default_factory=Repeats)

    def read(
        self, sources: Sequence[tuple[str, DatasetSource]], name: str, folder: Path | None = None
    ) -> tuple[Part, PartLedger]:
        """The rows of datasets, each with its key in the config; they are kept on the disk of `folder`."""
        ledger = PartLedger(Totals(name, self.limit))
        spool = Spool(folder)
        alive: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        hashes: list[np.ndarray] = []
        lengths = []
        for key, source in sources:
            opened = open_dataset(source, key, self.kind, self.options)
            ledger.totals.formats[title_of(source)] = str(opened)
            rows = 0
            with closing(self._batches(opened, name)) as batches:
                for batch in batches:
                    rows += len(batch.alive)
                    alive.append(batch.alive)
                    sizes.append(batch.sizes)
                    hashes.append(batch.hashes)
                    self._add(batch, ledger, spool)
            lengths.append(rows)
        self.repeats.note(ledger)
        texts = np.concatenate(hashes)
        return Part(spool.table(), np.concatenate(alive), lengths, np.concatenate(sizes), texts), ledger

    def _add(self, batch: Batch, ledger: PartLedger, spool: Spool) -> None:
        ledger.add(batch.ledger)
        self.problems += batch.problems
        self.show(batch)
        if batch.columns:
            self.repeats.add(batch.hashes)
            spool.add(batch.table())

    @property
    def want(self) -> int:
        """How many more rows a preview can show."""
        return MOST_SHOWN - len(self.preview)

    def show(self, batch: Batch) -> None:
        """Takes the first rows of a batch up into the preview, until that is full."""
        for example, place in batch.shown[: self.want]:
            self.preview.append(preview_of(example, place, self.labeller))

    def _batches(self, opened: OpenDataset, name: str) -> Iterator[Batch]:
        """The batches of a dataset, in order. Where there are many, clones of this process make them, with what the
        first of them taught about the template."""
        unparsed = in_batches(opened.unparsed)
        count = usable_workers(self.workers)
        head = list(islice(unparsed, _FEW)) if count > 1 else []
        if len(head) < _FEW:
            yield from self._one_ahead(opened, chain(head, unparsed), name)
            return
        yield self._make(self.typed(head[0], opened.parse), name)

        def make(task: tuple[list[Any], int]) -> Batch:
            rows, want = task
            return make_batch(self.typed(rows, opened.parse), self.make, PartLedger(Totals(name, self.limit)), want)

        with Workers(make, count) as workers:
            tasks = ((rows, self.want) for rows in chain(head[1:], unparsed))
            yield from workers.map(tasks)

    def _one_ahead(self, opened: OpenDataset, unparsed: Iterator[list[Any]], name: str) -> Iterator[Batch]:
        """The batches, made by a thread that mostly waits for the tokenizer's own, while the next is parsed."""
        waiting: Future[Batch] | None = None
        with ThreadPoolExecutor(1, "prepare") as thread:
            for rows in unparsed:
                made = thread.submit(self._make, self.typed(rows, opened.parse), name)
                if waiting:
                    yield waiting.result()
                waiting = made
            if waiting:
                yield waiting.result()

    def typed(self, rows: Iterable[Any], parse: Callable[[Any], Any]) -> list[Any]:
        """What the rows of a file are to the method, as many as are made of them."""
        found = typed(rows, parse)
        return self.divide(found) if self.divide else found

    def _make(self, rows: Sequence[Any], name: str) -> Batch:
        return make_batch(rows, self.make, PartLedger(Totals(name, self.limit)), self.want)


def left_out(part: Part, order: np.ndarray, train: np.ndarray, how: str) -> PartLedger:
    """The ledger of rows that were read for training and validate: what became of those dropped, that of training
    says. Those whose text is trained on as well are counted: `train` are the rows that stay."""
    kept = part.trained_on(order)
    tokens, trained = part.sizes[kept].sum(axis=0).tolist()
    formats = {"out of the rows above": how}
    ledger = PartLedger(
        Totals("validation", rows=len(order), kept=len(kept), tokens=tokens, trained_tokens=trained, formats=formats)
    )
    again = np.isin(part.hashes[kept], part.hashes[part.trained_on(train)])
    ledger.note("the same as a training row", int(again.sum()))
    return ledger


def to_dataset(part: Part, order: np.ndarray, name: str, folder: Path | None = None) -> datasets.Dataset:
    """The rows of a part in an order, without those that were dropped."""
    rows = part.trained_on(order)
    if not len(rows):
        raise DataError(f"no {name} row is left: all rows that were to be used for it were dropped")
    in_order = len(rows) == part.examples.num_rows and np.array_equal(rows, np.arange(len(rows)))
    return as_dataset(part.examples if in_order else taken(part.examples, rows, folder))
