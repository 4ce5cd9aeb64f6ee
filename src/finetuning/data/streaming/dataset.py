"""Streaming: rows are read, tokenized and packed during training, for a corpus that does not fit on the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np

from finetuning.config.sections.data import Concatenation, DataConfig, WeightedDatasetSource
from finetuning.data.collators import UNTRAINED
from finetuning.data.mixing import used_datasets
from finetuning.data.open_dataset import UnparsedRow, open_dataset, source_title
from finetuning.data.packing import pack_rows
from finetuning.data.preprocessor import Batch, Preprocessor, in_batches, make_batch
from finetuning.data.samples import ParsedRow, SkippedRow
from finetuning.data.statistics import RowCounts, SplitStatistics, raise_bad_rows
from finetuning.data.streaming.interleave import chain_datasets, interleave, shuffle_buffer
from finetuning.data.streaming.stream_statistics import StreamStatistics
from finetuning.errors import DataError, Location

MIN_ROWS_TO_CHECK = 1000
"""Rows after which the share of invalid rows is checked."""
_SPLIT = "training"
_PLACEHOLDER = {"input_ids": [0], "labels": [UNTRAINED]}
# Names in checkpoints that earlier versions wrote.
_OLD_STATE = {"given": "num_yielded", "left_out": "num_skipped", "rejects": "rejects_bytes", "totals": "counts"} | {
    "passes": "epoch"
}


@dataclass(frozen=True)
class Position:
    """The start of a block of rows: the epoch, counted from 0, and the rows of it that come before."""

    epoch: int = 0
    rows: int = 0


@dataclass(frozen=True)
class _Block:
    """Rows that were tokenized together. A block without rows marks the end of an epoch."""

    position: Position
    ends_epoch: bool
    rows: Sequence[Mapping[str, object]] = ()
    batch: Batch | None = None


@dataclass(frozen=True)
class _BlockState:
    """The state before a block, from which the stream can be resumed."""

    num_yielded: int
    """Rows yielded before, over all epochs."""
    position: Position
    counts: dict[str, object]
    rejects_bytes: int
    """Size of `rejects.jsonl`."""


class RowStream:
    """An infinite stream of tokenized rows, epoch after epoch, each in another order.

    Rows pass through the shuffle buffer before they are tokenized. So the order depends only on the seed and the data,
    and a resumed stream reads the rows that it skips without tokenizing them. A thread tokenizes the next block while
    the current one is trained on; at most the buffer and two blocks are in memory. Every process gets the same rows.
    """

    def __init__(
        self,
        data_conf: DataConfig,
        preprocessor: Preprocessor,
        seed: int,
        capacity: int | None,
        validation: SplitStatistics | None,
    ):
        """`capacity` is that of packs; None does not pack. `preprocessor` has read the validation rows already."""
        self._conf = data_conf
        self._preprocessor = preprocessor
        self._seed = seed
        self._capacity = capacity
        self._datasets = used_datasets(data_conf.training_data, "data_conf.training_data")
        self._parsers: dict[int, Callable[[UnparsedRow], ParsedRow | SkippedRow]] = {}
        self._formats: dict[str, str] = {}
        for number in range(len(self._datasets)):
            # Report a dataset that cannot be read now, not when its first row is due.
            self._open(number)
        self.statistics = StreamStatistics(
            RowCounts(_SPLIT, preprocessor.limit), () if validation is None else (validation,)
        )
        self.lookahead = 0
        """How many rows the trainer may have fetched before training on them."""
        self._blocks = self._blocks_from(Position())
        self._block_states: deque[_BlockState] = deque()
        self._num_yielded: int = 0
        self._num_placeholders: int = 0
        self._num_skipped: int = 0
        # The first block is made at once, so that errors in the data come before the model is loaded.
        self._first: _Block | None = next(self._blocks)
        self._start_block(self._first)

    @property
    def column_names(self) -> list[str]:
        """The columns of each row."""
        return ["input_ids", "labels", *(["lengths"] if self._capacity is not None else [])]

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        self.statistics.open_rejects()
        for _ in range(self._num_placeholders):
            yield _PLACEHOLDER
        with ThreadPoolExecutor(1, "stream") as thread:
            pending: Future[_Block] | None = None
            while True:
                block, self._first = self._first, None
                if block is None:
                    block = pending.result() if pending else next(self._blocks)
                    self._start_block(block)
                pending = thread.submit(next, self._blocks)
                num_skipped, self._num_skipped = self._num_skipped, 0
                for row in block.rows[num_skipped:]:
                    self._num_yielded += 1
                    yield row

    def state_dict(self, num_yielded: int) -> dict[str, object]:
        """The state from which `load_state_dict` continues after the first `num_yielded` rows; JSON types only."""
        state = next(state for state in reversed(self._block_states) if state.num_yielded <= num_yielded)
        return {**asdict(state), "num_skipped": num_yielded - state.num_yielded}

    def load_state_dict(self, state: dict[str, Any], num_placeholders: int) -> int:
        """Continue from a state, after `num_placeholders` rows without labels for the trainer to skip.

        Returns the number of rows that were yielded before.
        """
        state = {_OLD_STATE.get(key, key): value for key, value in state.items()}
        old_position: dict[str, Any] = state["position"]
        position = Position(**{_OLD_STATE.get(key, key): value for key, value in old_position.items()})
        counts = RowCounts.from_state_dict(state["counts"])
        self.statistics.restore(counts, position.epoch, state["rejects_bytes"])
        self._num_skipped, self._num_placeholders = state["num_skipped"], num_placeholders
        self._num_yielded = state["num_yielded"] + self._num_skipped
        self._block_states.clear()
        self._blocks = self._blocks_from(position)
        self._first = next(self._blocks)
        self._start_block(self._first, num_yielded=state["num_yielded"])
        return self._num_yielded

    def _start_block(self, block: _Block, num_yielded: int | None = None) -> None:
        """Count a block before its first row is yielded.

        Raises:
            DataError: the block has bad rows, or too many rows have been invalid so far.
        """
        num_yielded = self._num_yielded if num_yielded is None else num_yielded
        statistics = self.statistics
        self._block_states.append(
            _BlockState(num_yielded, block.position, statistics.counts.state_dict(), statistics.rejects_bytes)
        )
        while len(self._block_states) > 1 and self._block_states[1].num_yielded <= self._num_yielded - self.lookahead:
            self._block_states.popleft()
        is_first_epoch = block.position.epoch == 0
        if block.batch is not None and is_first_epoch:
            if self._conf.on_bad_row == "error":
                raise_bad_rows(block.batch.problems)
            statistics.add(block.batch.statistics)
        if is_first_epoch and (block.ends_epoch or statistics.counts.rows >= MIN_ROWS_TO_CHECK):
            statistics.counts.check(self._conf.max_lost_fraction)
        if block.ends_epoch:
            if not statistics.counts.kept:
                raise DataError("no training row is left", location=Location(key="data_conf.training_data"))
            statistics.epochs = block.position.epoch + 1

    def _blocks_from(self, position: Position) -> Iterator[_Block]:
        """The blocks from a position on. Earlier rows are read, which keeps their order, but not tokenized."""
        while True:
            rows = self._unparsed(position.epoch)
            deque(islice(rows, position.rows), maxlen=0)
            for batch in in_batches(rows, row_of=lambda numbered: numbered[1]):
                yield self._make_block(batch, position)
                position = replace(position, rows=position.rows + len(batch))
            yield _Block(position, ends_epoch=True)
            position = Position(position.epoch + 1)

    def _unparsed(self, epoch: int) -> Iterator[tuple[int, UnparsedRow]]:
        """The unparsed rows of an epoch in their training order, each with the number of its dataset."""
        data = self._conf.training_data
        sources = [lambda number=number: self._open(number) for number in range(len(self._datasets))]
        if isinstance(data, Concatenation):
            rows = chain_datasets(sources)
        else:
            weights = [cast(WeightedDatasetSource, source).sampling_weight for _, source in self._datasets]
            rows = interleave(sources, weights, data.seed + epoch, data.stopping)
        return shuffle_buffer(rows, self._conf.shuffle_buffer, (self._seed, epoch))

    def _open(self, number: int) -> Iterator[UnparsedRow]:
        key, source = self._datasets[number]
        opened = open_dataset(source, key, self._preprocessor.kind, self._preprocessor.options, streaming=True)
        self._parsers[number] = opened.parse
        self._formats[source_title(source)] = str(opened)
        return opened.unparsed

    def _make_block(self, numbered_rows: list[tuple[int, UnparsedRow]], position: Position) -> _Block:
        preprocessor = self._preprocessor
        parsed = preprocessor.parse(numbered_rows, lambda numbered: self._parsers[numbered[0]](numbered[1]))
        statistics = SplitStatistics(RowCounts(_SPLIT, preprocessor.limit, formats=dict(self._formats)))
        batch = make_batch(parsed, preprocessor.processor, statistics, preprocessor.num_preview_rows)
        preprocessor.add_preview(batch)
        preprocessor.duplicates.count_earlier(batch.hashes, statistics)
        rows = _rows_of(batch)
        if self._capacity is not None:
            generator = np.random.default_rng((self._seed, position.epoch, position.rows))
            packs = pack_rows(rows, self._capacity)
            order: list[int] = generator.permutation(len(packs)).tolist()
            return _Block(position, ends_epoch=False, rows=[packs[index] for index in order], batch=batch)
        return _Block(position, ends_epoch=False, rows=rows, batch=batch)


def _rows_of(batch: Batch) -> list[dict[str, np.ndarray]]:
    """The rows of a batch, as views of its columns."""
    columns = {
        name: np.split(column.values, np.cumsum(cast("np.ndarray", column.sizes))[:-1])
        for name, column in batch.columns.items()
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
