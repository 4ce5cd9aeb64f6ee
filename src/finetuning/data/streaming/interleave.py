"""Rows of several datasets in the order of a mix, as they come, without knowing how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np

from finetuning.data.mixing import sampled_datasets, shares
from finetuning.errors import DataError

Row = TypeVar("Row")
Open = Callable[[], Iterator[Any]]
_END = object()


def chain_datasets(sources: Sequence[Open]) -> Iterator[tuple[int, Any]]:
    """All rows of all datasets, each with the number of its dataset."""
    for number, source in enumerate(sources):
        for row in source():
            yield number, row


def interleave(
    sources: Sequence[Open], weights: Sequence[float], seed: int, stopping: str
) -> Iterator[tuple[int, Any]]:
    """The rows of `mixing.weighted_mix`, in its order; all weights are above 0.

    Raises:
        DataError: a dataset has no rows.
    """
    streams = [_Repeated(source) for source in sources]
    is_over = any if stopping == "first_exhausted" else all
    takes_turns = all(weight == 1.0 for weight in weights)
    if takes_turns:
        rounds: Iterator[Sequence[int]] = (range(len(streams)) for _ in count())
    else:
        blocks = sampled_datasets(shares(weights), seed)
        rounds = ((int(number),) for block in blocks for number in block)
    for numbers in rounds:
        for number in numbers:
            yield number, streams[number].take()
        if is_over(stream.is_through for stream in streams):
            return


class _Repeated:
    """The rows of a dataset, from its beginning again when they have all been taken."""

    def __init__(self, source: Open):
        self._source = source
        self._rows = source()
        self._next = next(self._rows, _END)
        self.is_through = False
        """Whether every row was taken once."""

    def take(self) -> Any:
        if self._next is _END:
            self._rows = self._source()
            self._next = next(self._rows, _END)
            if self._next is _END:
                raise DataError("a dataset of the mix has no rows")
        row, self._next = self._next, next(self._rows, _END)
        self.is_through = self.is_through or self._next is _END
        return row


def shuffle_buffer(rows: Iterator[Row], size: int, seed: Sequence[int]) -> Iterator[Row]:
    """The rows, each drawn out of the next `size` that are still to come; in their order for a size of 1.

    The same rows, size and seed give the same order. No more than `size` rows are held.
    """
    if size <= 1:
        yield from rows
        return
    generator = np.random.default_rng(seed)
    held = list(islice(rows, size))
    for row in rows:
        place = int(generator.integers(len(held)))
        drawn, held[place] = held[place], row
        yield drawn
    while held:
        place = int(generator.integers(len(held)))
        held[place], held[-1] = held[-1], held[place]
        yield held.pop()
