"""Preprocessing: input rows to tokenized samples, batch by batch, in this process or in a pool of worker processes.

A batch travels between processes as a few flat arrays, which is cheap to serialize.
"""

# pyarrow and datasets have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from finetuning.config.sections.data import DatasetSource
from finetuning.data.arrow import ArrowTableWriter, as_dataset, take_rows
from finetuning.data.formats import Options
from finetuning.data.open_dataset import OpenDataset, UnparsedRow, open_dataset, source_title
from finetuning.data.preview import PreviewRow, preview_of
from finetuning.data.processors.base import DroppedSample, Processor, TokenizedSample
from finetuning.data.samples import (
    Conversation,
    ParsedRow,
    Preference,
    Prompt,
    Row,
    RowToTokenize,
    SkippedRow,
    UnpairedPreference,
)
from finetuning.data.sources import Line
from finetuning.data.statistics import RowCounts, SplitStatistics
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.data.worker_pool import WorkerPool, usable_workers
from finetuning.errors import DataError, Location, Problem

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Item = TypeVar("Item")

DUPLICATE_ROW = "the same as an earlier row"
MAX_PREVIEW_ROWS = 100
"""Rows of each run that a preview can show."""
_MAX_ROWS = 1024
_MAX_BYTES = 4 << 20
_MIN_BATCHES_FOR_WORKERS = 8
_NOT_TOKENIZED = (Problem, SkippedRow)


@dataclass
class Batch:
    """The outcome of a batch of rows."""

    statistics: SplitStatistics
    kept_mask: np.ndarray
    """Whether each row is trained on, bool, (rows,)."""
    columns: dict[str, Column]
    hashes: np.ndarray
    """Python's hash of the text of each kept row, int64. Only comparable within this process and its forks."""
    sizes: np.ndarray
    """Tokens and trained tokens of each kept row, int64, (rows, 2)."""
    problems: list[Problem] = field(default_factory=list[Problem])
    preview_samples: list[tuple[TokenizedSample, Location, str | None]] = field(
        default_factory=list[tuple[TokenizedSample, Location, str | None]]
    )
    """The first kept rows, as many as were requested, with their locations and system prompts."""
    measured: object = None
    """What the run's inspector measured of the rows."""

    def table(self) -> pa.Table:
        """The kept rows."""
        import pyarrow as pa

        return pa.table({name: column.to_arrow() for name, column in self.columns.items()})


@dataclass(frozen=True)
class Column:
    """The values of all rows; lists are concatenated, with the length of each in `sizes`."""

    values: np.ndarray | list[bool] | list[str]
    sizes: np.ndarray | None

    @classmethod
    def of(cls, rows: list[Any]) -> Column:
        """A column of int32 arrays, of bools or of strings."""
        if isinstance(rows[0], np.ndarray):
            return cls(np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        return cls(rows, None)

    def to_arrow(self) -> pa.Array:
        import pyarrow as pa

        if self.sizes is not None:
            return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(self.sizes)]), pa.array(self.values))
        return pa.array(self.values, type=pa.bool_() if isinstance(self.values[0], bool) else pa.large_string())


def in_batches(rows: Iterable[Item], row_of: Callable[[Item], UnparsedRow] | None = None) -> Iterator[list[Item]]:
    """Split rows into lists of at most 1024, or fewer where rows are long.

    `row_of` extracts the row from an item that wraps it.
    """
    batch: list[Item] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _num_bytes(row_of(row) if row_of else row)
        if len(batch) == _MAX_ROWS or size > _MAX_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_bytes(row: object) -> int:
    """The size of an unparsed line, or of the strings of a parsed row."""
    if isinstance(row, Line):
        return len(row.data)
    return sum(len(value) for value in row.values.values() if isinstance(value, str)) if isinstance(row, Row) else 0


def parse_rows(rows: Iterable[Item], parse: Callable[[Item], ParsedRow | SkippedRow]) -> list[RowToTokenize]:
    """Parse the rows of a file. One row may become several."""
    parsed: list[RowToTokenize] = []
    for row in rows:
        result = parse(row)
        parsed += result if isinstance(result, Sequence) else (result,)
    return parsed


def make_batch(
    rows: Sequence[RowToTokenize], processor: Processor, statistics: SplitStatistics, num_preview_rows: int
) -> Batch:
    """Tokenize parsed rows and count their outcomes in `statistics`, which holds nothing else yet."""
    processed = iter(processor([row for row in rows if not isinstance(row, _NOT_TOKENIZED)]))
    kept_mask = np.zeros(len(rows), dtype=bool)
    kept: list[TokenizedSample] = []
    batch = Batch(statistics, kept_mask, {}, np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.int64))
    for index, row in enumerate(rows):
        if isinstance(row, Problem):
            sample: TokenizedSample | DroppedSample = DroppedSample("bad row", row.message, is_bad=True)
        else:
            sample = DroppedSample(row.reason, is_invalid=False) if isinstance(row, SkippedRow) else next(processed)
        if isinstance(sample, DroppedSample):
            if sample.is_bad:
                batch.problems.append(row if isinstance(row, Problem) else Problem(_message(sample), row.location))
            statistics.drop(
                row.location, sample.reason, sample.detail, is_invalid=sample.is_invalid, tokens=sample.tokens
            )
            continue
        kept_mask[index] = True
        kept.append(sample)
        if sample.tokens_cut:
            statistics.truncate(row.location, sample.tokens, sample.trained, sample.tokens_cut, sample.answer_cut)
        else:
            statistics.keep(sample.tokens, sample.trained)
        for warning in sample.warnings:
            statistics.warn(warning)
        for column in () if isinstance(row, _NOT_TOKENIZED) else row.unused:
            # The index that pandas writes into CSV has no name.
            statistics.warn(f"column {column if column.strip() else repr(column)} is not used")
        if len(kept) <= num_preview_rows:
            batch.preview_samples.append((sample, row.location, _system_prompt_of(row)))
    if kept:
        batch.sizes = np.array([(sample.tokens, sample.trained) for sample in kept], dtype=np.int64)
        batch.columns = {name: Column.of([sample.columns[name] for sample in kept]) for name in kept[0].columns}
        batch.hashes = np.array([hash(sample.text) for sample in kept], dtype=np.int64)
    return batch


def _system_prompt_of(row: RowToTokenize) -> str | None:
    """Return the text of the system message that a row of messages begins with; None if there is none."""
    if isinstance(row, Conversation | Prompt):
        messages = row.messages
    elif isinstance(row, Preference | UnpairedPreference):
        messages = row.prompt
    else:
        return None
    content = messages[0].get("content") if messages and messages[0].get("role") == "system" else None
    return content if isinstance(content, str) else None


def _message(sample: DroppedSample) -> str:
    return f"{sample.reason}: {sample.detail}" if sample.detail else sample.reason


class DuplicateCounter:
    """Counts texts that occurred before, in the same split or in an earlier one, by 64-bit hashes."""

    def __init__(self) -> None:
        self._earlier_splits: dict[str, np.ndarray] = {}
        self._hashes: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes of the current split."""
        self._hashes.append(hashes)

    def count_earlier(self, hashes: np.ndarray, statistics: SplitStatistics) -> None:
        """Count the texts that occurred in another split, without remembering them."""
        for split, earlier in self._earlier_splits.items():
            statistics.warn(f"the same as a {split} row", int(np.isin(hashes, earlier).sum()))

    def finish_split(self, statistics: SplitStatistics) -> None:
        """Count the duplicates of the current split, which ends here."""
        hashes = np.concatenate(self._hashes) if self._hashes else np.empty(0, dtype=np.int64)
        self._hashes = []
        for split, earlier in self._earlier_splits.items():
            is_duplicate = np.isin(hashes, earlier)
            statistics.warn(f"the same as a {split} row", int(is_duplicate.sum()))
            hashes = hashes[~is_duplicate]
        unique = np.unique(hashes)
        statistics.warn(DUPLICATE_ROW, len(hashes) - len(unique))
        self._earlier_splits[statistics.split] = unique


class Inspector(Protocol):
    """Looks at the rows of a run while they are prepared, for `finetuning data doctor`."""

    def measure(self, rows: Sequence[RowToTokenize], batch: Batch) -> object:
        """Return measures of a batch. Called in any process."""
        ...

    def add(self, split: str, measured: object) -> None:
        """Add the measures of a batch. Called in the main process, in the order of the rows."""
        ...


@dataclass(frozen=True)
class PreparedSplit:
    """The tokenized rows of one split, and which input rows they come from."""

    samples: pa.Table
    """The kept rows, in the order in which they were read."""
    kept_mask: np.ndarray
    """Whether each input row is kept, bool."""
    lengths: list[int]
    """Number of input rows of each dataset."""
    sizes: np.ndarray
    """Tokens and trained tokens of each kept row, int64, (rows, 2)."""
    hashes: np.ndarray
    """Hash of the text of each kept row, int64."""

    def kept_indices(self, order: np.ndarray) -> np.ndarray:
        """Map indices of input rows to indices into `samples`, leaving out dropped rows."""
        return (np.cumsum(self.kept_mask) - 1)[order[self.kept_mask[order]]]


@dataclass
class Preprocessor:
    """Reads and tokenizes the rows of all splits of a run, and collects problems, previews and duplicates."""

    kind: str
    """The kind of rows that the method trains on: a key of `KINDS`."""
    options: Options
    processor: Processor
    label_builder: LabelBuilder
    limit: int | None
    """Longest row in tokens."""
    num_workers: int = 1
    """Processes to use where there are many rows."""
    split_rows: Callable[[Sequence[RowToTokenize]], list[RowToTokenize]] | None = None
    """Replaces rows that are too long by several shorter ones."""
    problems: list[Problem] = field(default_factory=list[Problem])
    preview: list[list[PreviewRow]] = field(default_factory=list[list[PreviewRow]])
    duplicates: DuplicateCounter = field(default_factory=DuplicateCounter)
    inspector: Inspector | None = None

    def read(
        self, sources: Sequence[tuple[str, DatasetSource]], split: str, folder: Path | None = None
    ) -> tuple[PreparedSplit, SplitStatistics]:
        """Read and tokenize datasets, each given with its key in the config. Temporary files go into `folder`."""
        statistics = SplitStatistics(RowCounts(split, self.limit))
        writer = ArrowTableWriter(folder)
        kept_masks: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        hashes: list[np.ndarray] = []
        lengths = []
        for key, source in sources:
            opened = open_dataset(source, key, self.kind, self.options)
            statistics.counts.formats[source_title(source)] = str(opened)
            rows = 0
            with closing(self._batches(opened, split)) as batches:
                for batch in batches:
                    rows += len(batch.kept_mask)
                    kept_masks.append(batch.kept_mask)
                    sizes.append(batch.sizes)
                    hashes.append(batch.hashes)
                    self._add(batch, statistics, writer)
            lengths.append(rows)
        self.duplicates.finish_split(statistics)
        prepared = PreparedSplit(
            writer.table(), np.concatenate(kept_masks), lengths, np.concatenate(sizes), np.concatenate(hashes)
        )
        return prepared, statistics

    def _add(self, batch: Batch, statistics: SplitStatistics, writer: ArrowTableWriter) -> None:
        statistics.add(batch.statistics)
        self.problems += batch.problems
        self.add_preview(batch)
        if self.inspector is not None:
            self.inspector.add(statistics.split, batch.measured)
        if batch.columns:
            self.duplicates.add(batch.hashes)
            writer.add(batch.table())

    @property
    def num_preview_rows(self) -> int:
        """How many more rows the preview takes."""
        return MAX_PREVIEW_ROWS - len(self.preview)

    def add_preview(self, batch: Batch) -> None:
        """Add the first rows of a batch to the preview, until it is full."""
        for sample, location, system in batch.preview_samples[: self.num_preview_rows]:
            self.preview.append(preview_of(sample, location, self.label_builder, system))

    def _batches(self, opened: OpenDataset, split: str) -> Generator[Batch, None, None]:
        """The batches of a dataset, in order.

        Where there are many, forked worker processes make them. The first batch is made before the fork, so that the
        workers inherit what it taught about the chat template.
        """
        unparsed = in_batches(opened.unparsed)
        head = list(islice(unparsed, _MIN_BATCHES_FOR_WORKERS)) if self.num_workers > 1 else []
        num_workers = usable_workers(self.num_workers) if len(head) == _MIN_BATCHES_FOR_WORKERS else 1
        if num_workers == 1:
            yield from self._one_ahead(opened, chain(head, unparsed), split)
            return
        yield self._make(self.parse(head[0], opened.parse), split)

        def make(task: tuple[list[UnparsedRow], int]) -> Batch:
            rows, num_preview_rows = task
            return self._make(self.parse(rows, opened.parse), split, num_preview_rows)

        with WorkerPool(make, num_workers) as workers:
            tasks = ((rows, self.num_preview_rows) for rows in chain(head[1:], unparsed))
            yield from workers.map(tasks)

    def _one_ahead(self, opened: OpenDataset, unparsed: Iterator[list[UnparsedRow]], split: str) -> Iterator[Batch]:
        """The batches, made in a thread while the next one is parsed: the tokenizer releases the GIL."""
        pending: Future[Batch] | None = None
        with ThreadPoolExecutor(1, "prepare") as thread:
            for rows in unparsed:
                submitted = thread.submit(self._make, self.parse(rows, opened.parse), split)
                if pending:
                    yield pending.result()
                pending = submitted
            if pending:
                yield pending.result()

    def parse(self, rows: Iterable[Item], parse: Callable[[Item], ParsedRow | SkippedRow]) -> list[RowToTokenize]:
        """Parse the rows of a file, and split those that are too long where that is configured."""
        parsed = parse_rows(rows, parse)
        return self.split_rows(parsed) if self.split_rows else parsed

    def _make(self, rows: Sequence[RowToTokenize], split: str, num_preview_rows: int | None = None) -> Batch:
        statistics = SplitStatistics(RowCounts(split, self.limit))
        num_preview_rows = self.num_preview_rows if num_preview_rows is None else num_preview_rows
        batch = make_batch(rows, self.processor, statistics, num_preview_rows)
        if self.inspector is not None:
            batch.measured = self.inspector.measure(rows, batch)
        return batch


def held_out_statistics(
    prepared: PreparedSplit, order: np.ndarray, train_order: np.ndarray, method: str
) -> SplitStatistics:
    """Statistics of the validation rows that were split off the training rows by `method`.

    Dropped rows are part of the training statistics already. `order` and `train_order` are indices of input rows;
    validation rows whose text is also trained on are counted.
    """
    kept = prepared.kept_indices(order)
    tokens, trained = prepared.sizes[kept].sum(axis=0).tolist()
    formats = {"split off the rows above": method}
    statistics = SplitStatistics(
        RowCounts("validation", rows=len(order), kept=len(kept), tokens=tokens, trained_tokens=trained, formats=formats)
    )
    is_duplicate = np.isin(prepared.hashes[kept], prepared.hashes[prepared.kept_indices(train_order)])
    statistics.warn("the same as a training row", int(is_duplicate.sum()))
    return statistics


def to_dataset(prepared: PreparedSplit, order: np.ndarray, split: str, folder: Path | None = None) -> datasets.Dataset:
    """The kept rows of a split in the given order of input rows.

    Raises:
        DataError: every one of these rows was dropped.
    """
    rows = prepared.kept_indices(order)
    if not len(rows):
        raise DataError(f"no {split} row is left: all rows selected for it were dropped")
    in_order = len(rows) == prepared.samples.num_rows and np.array_equal(rows, np.arange(len(rows)))
    return as_dataset(prepared.samples if in_order else take_rows(prepared.samples, rows, folder))
