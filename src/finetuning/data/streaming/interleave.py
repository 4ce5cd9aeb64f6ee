"""Interleaving datasets of unknown length, in the order of `mixing.weighted_mix`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Generic, TypeVar

import numpy as np

from finetuning.data.mixing import sampled_datasets, shares
from finetuning.errors import DataError

Row = TypeVar("Row")
Open = Callable[[], Iterator[Row]]


def chain_datasets(sources: Sequence[Open[Row]]) -> Iterator[tuple[int, Row]]:
    """All rows of one dataset after the other, each with the number of its dataset."""
    for number, source in enumerate(sources):
        for row in source():
            yield number, row


def interleave(
    sources: Sequence[Open[Row]], weights: Sequence[float], seed: int, stopping: str
) -> Iterator[tuple[int, Row]]:
    """The rows of `mixing.weighted_mix` in its order, each with the number of its dataset. All weights are above 0.

    Raises:
        DataError: a dataset has no rows.
    """
    streams = [_RepeatedRows(source) for source in sources]
    ends = any if stopping == "first_exhausted" else all
    takes_turns = all(weight == 1.0 for weight in weights)
    if takes_turns:
        rounds: Iterator[Sequence[int]] = (range(len(streams)) for _ in count())
    else:
        blocks = sampled_datasets(shares(weights), seed)
        rounds = ((int(number),) for block in blocks for number in block)
    for numbers in rounds:
        for number in numbers:
            yield number, streams[number].take()
        if ends(stream.is_exhausted for stream in streams):
            return


class _RepeatedRows(Generic[Row]):
    """The rows of a dataset, starting over when it is exhausted."""

    def __init__(self, source: Open[Row]):
        self._source = source
        self._rows = source()
        self._next = next(self._rows, None)
        self.is_exhausted = False
        """Whether every row was taken at least once."""

    def take(self) -> Row:
        if self._next is None:
            self._rows = self._source()
            self._next = next(self._rows, None)
            if self._next is None:
                raise DataError("a dataset of the mix has no rows")
        row, self._next = self._next, next(self._rows, None)
        self.is_exhausted = self.is_exhausted or self._next is None
        return row


def shuffle_buffer(rows: Iterator[Row], size: int, seed: Sequence[int]) -> Iterator[Row]:
    """Shuffle rows with a buffer of `size` rows; a size of 1 keeps their order.

    The same rows, size and seed give the same order.
    """
    if size <= 1:
        yield from rows
        return
    generator = np.random.default_rng(seed)
    buffer = list(islice(rows, size))
    for row in rows:
        index = int(generator.integers(len(buffer)))
        drawn, buffer[index] = buffer[index], row
        yield drawn
    while buffer:
        index = int(generator.integers(len(buffer)))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        yield buffer.pop()
