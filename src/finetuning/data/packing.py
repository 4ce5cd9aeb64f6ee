"""Packing: short rows into packs of at most `max_seq_length` tokens, and the padding that it saves."""

# pyarrow and datasets have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from finetuning.data.arrow import ArrowTableWriter, as_dataset, row_lengths

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class PackingResult:
    """The rows of each pack: pack i holds `rows[borders[i]:borders[i + 1]]`, int64, in their original order."""

    rows: np.ndarray
    borders: np.ndarray
    filled: float
    """Share of the packs' capacity that is used."""

    def __len__(self) -> int:
        return len(self.borders) - 1


def pack(lengths: np.ndarray, capacity: int) -> PackingResult:
    """Pack rows by best-fit decreasing; no row is split.

    The longest rows are placed first, each into the fullest pack that still has space; rows of one length are placed
    together. The same lengths give the same packs. Source: best-fit decreasing on a histogram of lengths, as in Krell
    et al., "Efficient Sequence Packing without Cross-contamination", 2021.

    Args:
        lengths: int array of shape (rows,), each between 1 and `capacity`.

    Raises:
        ValueError: a row is longer than `capacity`, or empty.

    >>> packing = pack(np.array([3, 5, 2, 6]), 8)
    >>> [packing.rows[a:b].tolist() for a, b in zip(packing.borders, packing.borders[1:])]
    [[2, 3], [0, 1]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return PackingResult(lengths, np.zeros(1, dtype=np.int64), 1.0)
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"rows have {lengths.min()} to {lengths.max()} tokens; a pack holds 1 to {capacity}")
    by_length = np.argsort(-lengths, kind="stable")
    sorted_lengths = lengths[by_length]
    starts = np.flatnonzero(np.diff(sorted_lengths, prepend=capacity + 1))
    ends = np.append(starts[1:], len(lengths))
    # More space than all rows fill is never used, and lists of packs by their free space would be as long as it.
    packs = _Packs(min(capacity, int(lengths.sum())))
    pack_of_row = np.empty(len(lengths), dtype=np.int64)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        pack_of_row[by_length[start:end]] = packs.location(int(sorted_lengths[start]), end - start)
    rows = np.argsort(pack_of_row, kind="stable")
    borders = np.append(0, np.cumsum(np.bincount(pack_of_row, minlength=packs.count)))
    return PackingResult(rows, borders, float(lengths.sum() / (packs.count * capacity)))


class _Packs:
    """Open packs, by the number of tokens that still fit."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._by_space: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self._counts = np.zeros(capacity + 1, dtype=np.int64)
        self.count = 0

    def location(self, length: int, number: int) -> np.ndarray:
        """Place `number` rows of this length; returns the pack of each, int64, (number,)."""
        pack_groups: list[np.ndarray] = []
        while number:
            space = length + int(np.argmax(self._counts[length:] > 0))
            if self._counts[space]:
                packs = self._take(space, number)
                self._put(space - length, packs)
            else:
                packs = self._open(length, number)
            pack_groups.append(packs)
            number -= len(packs)
        return np.concatenate(pack_groups)

    def _open(self, length: int, number: int) -> np.ndarray:
        """Open new packs, each filled with as many rows of this length as fit."""
        each = self._capacity // length
        new = np.arange(self.count, self.count + -(-number // each))
        self.count += len(new)
        packs = np.repeat(new, each)[:number]
        full, rest = divmod(number, each)
        self._put(self._capacity - each * length, new[:full])
        if rest:
            self._put(self._capacity - rest * length, new[full:])
        return packs

    def _take(self, space: int, number: int) -> np.ndarray:
        """Take up to `number` packs with exactly this much space."""
        pack_groups: list[np.ndarray] = []
        remaining = number
        stack = self._by_space[space]
        while stack and remaining:
            packs = stack.pop()
            if len(packs) > remaining:
                stack.append(packs[remaining:])
                packs = packs[:remaining]
            pack_groups.append(packs)
            remaining -= len(packs)
        self._counts[space] -= number - remaining
        return np.concatenate(pack_groups)

    def _put(self, space: int, packs: np.ndarray) -> None:
        if len(packs):
            self._by_space[space].append(packs)
            self._counts[space] += len(packs)


_TOKENS_PER_WRITE = 1 << 19


def pack_rows(rows: Sequence[Mapping[str, np.ndarray]], capacity: int) -> list[Mapping[str, object]]:
    """`pack_dataset` for rows in memory."""
    lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
    packing = pack(lengths, capacity)
    packs: list[Mapping[str, object]] = []
    for start, end in pairwise(packing.borders):
        members = packing.rows[start:end]
        columns = {name: np.concatenate([rows[row][name] for row in members]) for name in ("input_ids", "labels")}
        packs.append({**columns, "lengths": lengths[members].tolist()})
    return packs


def pack_dataset(dataset: datasets.Dataset, capacity: int) -> datasets.Dataset:
    """Pack the rows of a dataset into rows of at most `capacity` tokens.

    The columns are `input_ids`, `labels` and `lengths`, the lengths of the rows in the pack, in order.
    """
    import pyarrow as pa

    lengths = row_lengths(dataset)
    packing = pack(lengths, capacity)
    source = dataset.with_format("arrow")
    columns = ("input_ids", "labels")
    writer = ArrowTableWriter()
    group = max(1, _TOKENS_PER_WRITE // capacity)
    for first in range(0, len(packing), group):
        borders = packing.borders[first : first + group + 1]
        rows = packing.rows[borders[0] : borders[-1]]
        table = source[rows]
        sizes = lengths[rows]
        ends = np.concatenate([[0], np.cumsum(sizes)])[borders - borders[0]]
        packs = {}
        for name in columns:
            values = pa.chunked_array([chunk.flatten() for chunk in table[name].chunks]).combine_chunks()
            packs[name] = pa.LargeListArray.from_arrays(ends, values)
        packs["lengths"] = pa.LargeListArray.from_arrays(borders - borders[0], pa.array(sizes.astype(np.int32)))
        writer.add(pa.table(packs))
    return as_dataset(writer.table())
