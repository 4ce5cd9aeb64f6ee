"""Files to the examples that they hold, and examples to a dataset.

A batch of rows to what became of it, in few and flat values that pass between processes at little cost."""

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
from finetuning.data.arrow import ArrowSpool, as_dataset, take_rows
from finetuning.data.formats import Options
from finetuning.data.open_dataset import OpenDataset, open_dataset, source_title
from finetuning.data.preview import PreviewRow, preview_of
from finetuning.data.processors.base import DroppedSample, Processor, TokenizedSample
from finetuning.data.samples import Row, SkippedRow
from finetuning.data.sources import Line
from finetuning.data.statistics import RowCounts, SplitStatistics
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.data.worker_pool import WorkerPool, usable_workers
from finetuning.errors import DataError, Location, Problem

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SAME_AS_BEFORE = "the same as a row before"
_ROWS = 1024
_BYTES = 4 << 20
_NOT_MADE = (Problem, SkippedRow)


@dataclass
class Batch:
    """What became of the rows of a batch."""

    ledger: SplitStatistics
    alive: np.ndarray
    """Of each row, whether it is trained on."""
    columns: dict[str, Column]
    hashes: np.ndarray
    """Of the text of each row that is trained on, int64, as Python has them: alike in this process and its clones."""
    sizes: np.ndarray
    """Tokens and trained tokens of each of them, int64, (rows, 2)."""
    problems: list[Problem] = field(default_factory=list)
    shown: list[tuple[TokenizedSample, Location]] = field(default_factory=list)
    """The first rows, as many as were asked for."""

    def table(self) -> pa.Table:
        """The rows that are trained on."""
        import pyarrow as pa

        return pa.table({name: column.to_arrow() for name, column in self.columns.items()})


@dataclass(frozen=True)
class Column:
    """The values of all rows, and where they are lists, laid end to end, the length of each."""

    values: np.ndarray | list[Any]
    sizes: np.ndarray | None

    @classmethod
    def of(cls, rows: list[Any]) -> Column:
        """A column of int32 arrays, of truth values or of texts."""
        if isinstance(rows[0], np.ndarray):
            return cls(np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        return cls(rows, None)

    def to_arrow(self) -> pa.Array:
        import pyarrow as pa

        if self.sizes is not None:
            return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(self.sizes)]), pa.array(self.values))
        return pa.array(self.values, type=pa.bool_() if isinstance(self.values[0], bool) else pa.large_string())


def in_batches(rows: Iterable[Any], row_of: Callable[[Any], Any] | None = None) -> Iterator[list[Any]]:
    """The rows in lists of no more than 1024, and of few megabytes where rows are long; `row_of` takes a row out of
    what stands for it."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _bytes_of(row_of(row) if row_of else row)
        if len(batch) == _ROWS or size > _BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes_of(row: Any) -> int:
    """The size of a line; of a row that is parsed already, that of its texts."""
    if isinstance(row, Line):
        return len(row.data)
    return sum(len(one) for one in row.values.values() if isinstance(one, str)) if isinstance(row, Row) else 0


def parse_rows(rows: Iterable[Any], parse: Callable[[Any], Any]) -> list[Any]:
    """What the rows of a file are to a method; a row can be several."""
    found = []
    for row in rows:
        one = parse(row)
        found += one if isinstance(one, list) else (one,)
    return found


def make_batch(rows: Sequence[Any], make: Processor, ledger: SplitStatistics, want: int) -> Batch:
    """What becomes of typed rows, told in a ledger of their own; `want` counts the rows to show."""
    made = iter(make([one for one in rows if not isinstance(one, _NOT_MADE)]))
    alive = np.zeros(len(rows), dtype=bool)
    kept: list[TokenizedSample] = []
    batch = Batch(ledger, alive, {}, np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.int64))
    for index, row in enumerate(rows):
        if isinstance(row, Problem):
            example: TokenizedSample | DroppedSample = DroppedSample("bad row", row.message, is_bad=True)
        else:
            example = DroppedSample(row.reason, is_fault=False) if isinstance(row, SkippedRow) else next(made)
        if isinstance(example, DroppedSample):
            if example.is_bad:
                batch.problems.append(row if isinstance(row, Problem) else Problem(_why(example), row.place))
            ledger.drop(row.place, example.reason, example.detail, is_fault=example.is_fault, tokens=example.tokens)
            continue
        alive[index] = True
        kept.append(example)
        if example.tokens_cut:
            ledger.truncate(row.place, example.tokens, example.trained, example.tokens_cut, example.answer_cut)
        else:
            ledger.keep(example.tokens, example.trained)
        for note in example.notes:
            ledger.note(note)
        if len(kept) <= want:
            batch.shown.append((example, row.place))
    if kept:
        batch.sizes = np.array([(one.tokens, one.trained) for one in kept], dtype=np.int64)
        batch.columns = {name: Column.of([one.columns[name] for one in kept]) for name in kept[0].columns}
        batch.hashes = np.array([hash(one.text) for one in kept], dtype=np.int64)
    return batch


def _why(lost: DroppedSample) -> str:
    return f"{lost.reason}: {lost.detail}" if lost.detail else lost.reason


class DuplicateCounter:
    """Which texts came before, told by their hashes of 64 bits."""

    def __init__(self) -> None:
        self._former: dict[str, np.ndarray] = {}
        self._own: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        self._own.append(hashes)

    def note_former(self, hashes: np.ndarray, ledger: SplitStatistics) -> None:
        """Counts texts that came in another part before; nothing of them is kept."""
        for part, former in self._former.items():
            ledger.note(f"the same as a {part} row", int(np.isin(hashes, former).sum()))

    def note(self, ledger: SplitStatistics) -> None:
        """Counts the texts of a part, which ends here, that came before."""
        own = np.concatenate(self._own) if self._own else np.empty(0, dtype=np.int64)
        self._own = []
        for part, former in self._former.items():
            again = np.isin(own, former)
            ledger.note(f"the same as a {part} row", int(again.sum()))
            own = own[~again]
        once = np.unique(own)
        ledger.note(SAME_AS_BEFORE, len(own) - len(once))
        self._former[ledger.part] = once


_FEW = 8
"""Batches that are made before other processes are asked to help."""
MOST_SHOWN = 100
"""Rows of each run that a preview can show."""


@dataclass(frozen=True)
class PreparedSplit:
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
class Preprocessor:
    """What is common to all parts: how rows are read and made, and what has gone wrong so far."""

    kind: str
    """The kind of rows that the method takes: a key of `KINDS`."""
    options: Options
    make: Processor
    labeller: LabelBuilder
    limit: int | None
    workers: int = 1
    """Processes that may share the work."""
    divide: Callable[[list[Any]], list[Any]] | None = None
    """Makes several of rows that are too long to be one."""
    problems: list[Problem] = field(default_factory=list)
    preview: list[list[PreviewRow]] = field(default_factory=list)
    repeats: DuplicateCounter = field(default_factory=DuplicateCounter)

    def read(
        self, sources: Sequence[tuple[str, DatasetSource]], name: str, folder: Path | None = None
    ) -> tuple[PreparedSplit, SplitStatistics]:
        """The rows of datasets, each with its key in the config; they are kept on the disk of `folder`."""
        ledger = SplitStatistics(RowCounts(name, self.limit))
        spool = ArrowSpool(folder)
        alive: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        hashes: list[np.ndarray] = []
        lengths = []
        for key, source in sources:
            opened = open_dataset(source, key, self.kind, self.options)
            ledger.totals.formats[source_title(source)] = str(opened)
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
        return PreparedSplit(spool.table(), np.concatenate(alive), lengths, np.concatenate(sizes), texts), ledger

    def _add(self, batch: Batch, ledger: SplitStatistics, spool: ArrowSpool) -> None:
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
            return make_batch(
                self.typed(rows, opened.parse), self.make, SplitStatistics(RowCounts(name, self.limit)), want
            )

        with WorkerPool(make, count) as workers:
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
        found = parse_rows(rows, parse)
        return self.divide(found) if self.divide else found

    def _make(self, rows: Sequence[Any], name: str) -> Batch:
        return make_batch(rows, self.make, SplitStatistics(RowCounts(name, self.limit)), self.want)


def dropped_split_statistics(part: PreparedSplit, order: np.ndarray, train: np.ndarray, how: str) -> SplitStatistics:
    """The ledger of rows that were read for training and validate: what became of those dropped, that of training
    says. Those whose text is trained on as well are counted: `train` are the rows that stay."""
    kept = part.trained_on(order)
    tokens, trained = part.sizes[kept].sum(axis=0).tolist()
    formats = {"out of the rows above": how}
    ledger = SplitStatistics(
        RowCounts("validation", rows=len(order), kept=len(kept), tokens=tokens, trained_tokens=trained, formats=formats)
    )
    again = np.isin(part.hashes[kept], part.hashes[part.trained_on(train)])
    ledger.note("the same as a training row", int(again.sum()))
    return ledger


def to_dataset(part: PreparedSplit, order: np.ndarray, name: str, folder: Path | None = None) -> datasets.Dataset:
    """The rows of a part in an order, without those that were dropped."""
    rows = part.trained_on(order)
    if not len(rows):
        raise DataError(f"no {name} row is left: all rows that were to be used for it were dropped")
    in_order = len(rows) == part.examples.num_rows and np.array_equal(rows, np.arange(len(rows)))
    return as_dataset(part.examples if in_order else take_rows(part.examples, rows, folder))
