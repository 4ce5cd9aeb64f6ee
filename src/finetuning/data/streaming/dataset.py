"""Rows that are read, rendered, masked and packed while they are trained on: a corpus that does not fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from finetuning.config.sections.data import Concatenation, DataConfig
from finetuning.data.collators import UNTRAINED
from finetuning.data.mixing import used_datasets
from finetuning.data.open_dataset import open_dataset, source_title
from finetuning.data.packing import pack_rows
from finetuning.data.preprocessor import Batch, Preprocessor, in_batches, make_batch
from finetuning.data.statistics import RowCounts, SplitStatistics, counts_of, raise_bad_rows, values_of
from finetuning.data.streaming.interleave import chain_datasets, interleave, shuffle_buffer
from finetuning.data.streaming.stream_statistics import StreamStatistics
from finetuning.errors import DataError, Location

ENOUGH = 1000
"""Rows after which the share that is lost says something."""
_PART = "training"
_PLACEHOLDER = {"input_ids": [0], "labels": [UNTRAINED]}


@dataclass(frozen=True)
class Position:
    """Where a block of rows begins: in which pass over the data, counted from 0, and after how many of its rows."""

    passes: int = 0
    rows: int = 0


@dataclass(frozen=True)
class _Block:
    """Rows that were made together; at the end of a pass one without any."""

    position: Position
    ends_pass: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    made: Batch | None = None


@dataclass(frozen=True)
class _Mark:
    """How things stood before a block was begun."""

    given: int
    """Rows given before, those of all passes."""
    position: Position
    totals: dict[str, Any]
    rejects: int
    """Bytes of the file of rejects."""


class RowStream:
    """Rows of token ids without end, pass after pass over the data, each pass in another order.

    What is read goes through a shuffle buffer before it is made into rows, so that the order depends on the seed and
    the data alone, and a stream that goes on in the middle reads what it has passed without making it again. One block
    is made, by a thread of its own, while the one before is trained on; no more than the buffer and two blocks are ever
    held. Every process that iterates it gets the same rows.
    """

    def __init__(
        self,
        data_conf: DataConfig,
        reading: Preprocessor,
        seed: int,
        capacity: int | None,
        validation: SplitStatistics | None,
    ):
        """`capacity` is that of packs; None leaves rows as they are. `reading` has read the validation rows already."""
        self._conf = data_conf
        self._reading = reading
        self._seed = seed
        self._capacity = capacity
        self._datasets = used_datasets(data_conf.training_data, "data_conf.training_data")
        self._parsers: dict[int, Any] = {}
        self._formats: dict[str, str] = {}
        for number in range(len(self._datasets)):
            # A dataset that cannot be read is better known now than when its turn comes.
            self._open(number)
        self.ledger = StreamStatistics(RowCounts(_PART, reading.limit), () if validation is None else (validation,))
        self.reach = 0
        """How many rows the trainer may have taken ahead of those that it has trained on."""
        self._blocks = self._from(Position())
        self._marks: deque[_Mark] = deque()
        self._given = self._placeholders = self._left_out = 0
        self._first: _Block | None = next(self._blocks)
        self._begin(self._first)

    @property
    def column_names(self) -> list[str]:
        """The columns of each row."""
        return ["input_ids", "labels", *(["lengths"] if self._capacity is not None else [])]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.ledger.begin()
        for _ in range(self._placeholders):
            yield _PLACEHOLDER
        with ThreadPoolExecutor(1, "stream") as thread:
            waiting: Future[_Block] | None = None
            while True:
                block, self._first = self._first, None
                if block is None:
                    block = waiting.result() if waiting else next(self._blocks)
                    self._begin(block)
                waiting = thread.submit(next, self._blocks)
                left_out, self._left_out = self._left_out, 0
                for row in block.rows[left_out:]:
                    self._given += 1
                    yield row

    def state(self, given: int) -> dict[str, Any]:
        """What `go_on` needs to give the row after the first `given` ones next; JSON types only."""
        mark = next(mark for mark in reversed(self._marks) if mark.given <= given)
        return {**asdict(mark), "left_out": given - mark.given}

    def go_on(self, state: dict[str, Any], placeholders: int) -> None:
        """Goes on where `state` was taken, after `placeholders` rows without a label for a trainer to pass over."""
        position = Position(**state["position"])
        self.ledger.restore(counts_of(state["totals"]), position.passes, state["rejects"])
        self._left_out, self._placeholders = state["left_out"], placeholders
        self._given = state["given"] + self._left_out
        self._marks.clear()
        self._blocks = self._from(position)
        self._first = next(self._blocks)
        self._begin(self._first, given=state["given"])

    def _begin(self, block: _Block, given: int | None = None) -> None:
        """Counts a block in, before the first of its rows is given.

        Raises:
            DataError: it holds bad rows, or too many rows have been lost by now.
        """
        given = self._given if given is None else given
        self._marks.append(_Mark(given, block.position, values_of(self.ledger.totals), self.ledger.rejects))
        while len(self._marks) > 1 and self._marks[1].given <= self._given - self.reach:
            self._marks.popleft()
        is_first_pass = block.position.passes == 0
        if block.made is not None and is_first_pass:
            if self._conf.on_bad_row == "error":
                raise_bad_rows(block.made.problems)
            self.ledger.fold(block.made.ledger)
        if is_first_pass and (block.ends_pass or self.ledger.totals.rows >= ENOUGH):
            self.ledger.totals.check(self._conf.max_lost_fraction)
        if block.ends_pass:
            if not self.ledger.totals.kept:
                raise DataError("no training row is left", place=Location(key="data_conf.training_data"))
            self.ledger.passes = block.position.passes + 1

    def _from(self, position: Position) -> Iterator[_Block]:
        """The blocks from a position on; those before it are read, in their order, and not made."""
        while True:
            rows = self._unparsed(position.passes)
            deque(islice(rows, position.rows), maxlen=0)
            for batch in in_batches(rows, row_of=lambda numbered: numbered[1]):
                yield self._make(batch, position)
                position = replace(position, rows=position.rows + len(batch))
            yield _Block(position, ends_pass=True)
            position = Position(position.passes + 1)

    def _unparsed(self, passes: int) -> Iterator[tuple[int, Any]]:
        """The rows of a pass as they stand in their files, each with the number of its dataset, in drawn order."""
        data = self._conf.training_data
        sources = [lambda number=number: self._open(number) for number in range(len(self._datasets))]
        if isinstance(data, Concatenation):
            rows = chain_datasets(sources)
        else:
            weights = [source.sampling_weight for _, source in self._datasets]
            rows = interleave(sources, weights, data.seed + passes, data.stopping)
        return shuffle_buffer(rows, self._conf.shuffle_buffer, (self._seed, passes))

    def _open(self, number: int) -> Iterator[Any]:
        key, source = self._datasets[number]
        opened = open_dataset(source, key, self._reading.kind, self._reading.options, streaming=True)
        self._parsers[number] = opened.parse
        self._formats[source_title(source)] = str(opened)
        return opened.unparsed

    def _make(self, batch: list[tuple[int, Any]], position: Position) -> _Block:
        reading = self._reading
        parsed = reading.typed(batch, lambda numbered: self._parsers[numbered[0]](numbered[1]))
        ledger = SplitStatistics(RowCounts(_PART, reading.limit, formats=dict(self._formats)))
        made = make_batch(parsed, reading.make, ledger, reading.want)
        reading.show(made)
        reading.repeats.note_former(made.hashes, ledger)
        rows = _rows_of(made)
        if self._capacity is not None:
            generator = np.random.default_rng((self._seed, position.passes, position.rows))
            packs = pack_rows(rows, self._capacity)
            rows = [packs[index] for index in generator.permutation(len(packs))]
        return _Block(position, ends_pass=False, rows=rows, made=made)


def _rows_of(batch: Batch) -> list[dict[str, Any]]:
    """The rows of a batch one by one, as views of its columns."""
    columns = {name: np.split(one.values, np.cumsum(one.sizes)[:-1]) for name, one in batch.columns.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
