"""Which rows lie together in one long row.

Training rows laid together in packs, and what packing, or laying end to end, saves over padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.data.arrow import ArrowSpool, as_dataset

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class PackingResult:
    """Rows by pack: `rows[borders[i]:borders[i + 1]]` are the rows of pack i, int64, in their own order."""

    rows: np.ndarray
    borders: np.ndarray
    filled: float
    """Share of all packs' capacity that holds tokens."""

    def __len__(self) -> int:
        return len(self.borders) - 1


def pack(lengths: np.ndarray, capacity: int) -> PackingResult:
    """Packs of at most `capacity` tokens, as few as best-fit decreasing needs; no row is cut.

    Rows of one length are placed together: the longest first, each into the fullest pack that still has room. The
    same lengths give the same packs. Source: best-fit decreasing on a histogram of lengths, as in Krell et al.,
    "Efficient Sequence Packing without Cross-contamination", 2021.

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
    packs = _Packs(capacity)
    pack_of_row = np.empty(len(lengths), dtype=np.int64)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        pack_of_row[by_length[start:end]] = packs.place(int(sorted_lengths[start]), end - start)
    rows = np.argsort(pack_of_row, kind="stable")
    borders = np.append(0, np.cumsum(np.bincount(pack_of_row, minlength=packs.count)))
    return PackingResult(rows, borders, float(lengths.sum() / (packs.count * capacity)))


class _Packs:
    """Open packs by the room that is left in them."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self._counts = np.zeros(capacity + 1, dtype=np.int64)
        self.count = 0

    def place(self, length: int, number: int) -> np.ndarray:
        """The packs that `number` rows of this length go to, int64, (number,)."""
        placed = []
        while number:
            room = length + int(np.argmax(self._counts[length:] > 0))
            if self._counts[room]:
                packs = self._take(room, number)
                self._put(room - length, packs)
            else:
                packs = self._open(length, number)
            placed.append(packs)
            number -= len(packs)
        return np.concatenate(placed)

    def _open(self, length: int, number: int) -> np.ndarray:
        """New packs, each filled with as many rows of this length as it holds."""
        each = self._capacity // length
        new = np.arange(self.count, self.count + -(-number // each))
        self.count += len(new)
        packs = np.repeat(new, each)[:number]
        full, rest = divmod(number, each)
        self._put(self._capacity - each * length, new[:full])
        if rest:
            self._put(self._capacity - rest * length, new[full:])
        return packs

    def _take(self, room: int, number: int) -> np.ndarray:
        """Up to `number` packs with exactly this room."""
        taken, wanted = [], number
        stack = self._by_room[room]
        while stack and wanted:
            packs = stack.pop()
            if len(packs) > wanted:
                stack.append(packs[wanted:])
                packs = packs[:wanted]
            taken.append(packs)
            wanted -= len(packs)
        self._counts[room] -= number - wanted
        return np.concatenate(taken)

    def _put(self, room: int, packs: np.ndarray) -> None:
        if len(packs):
            self._by_room[room].append(packs)
            self._counts[room] += len(packs)


_TOKENS = 1 << 19


@dataclass(frozen=True)
class PaddingStats:
    """How rows lie in the packs of a run, and what share of computed tokens is real in each way to lay them."""

    rows: int
    packs: int | None
    """Number of packs; None where rows are not packed."""
    filled: float | None
    """Share of the packs' capacity that holds tokens."""
    padded: float
    """Share of computed tokens that are real in batches drawn by chance and padded to their longest row."""

    def __str__(self) -> str:
        real = f"{self.padded:.0%} of computed tokens are real when padded, 100% end to end"
        if self.packs is None:
            return real
        return f"{self.rows:,} rows in {self.packs:,} packs, {self.filled:.1%} full; {real} or packed"


def row_lengths(dataset: datasets.Dataset, column: str = "input_ids") -> np.ndarray:
    """Tokens of each row, int64, in order; of each row inside the packs, where rows are packed."""
    import pyarrow.compute as pc

    table = dataset.with_format("arrow")[:]
    if "lengths" in dataset.column_names:
        return pc.list_flatten(table["lengths"]).to_numpy().astype(np.int64)
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)


def padding_stats(dataset: datasets.Dataset, capacity: int, batch: int) -> PaddingStats:
    """How the rows of a dataset lie, and the shares that are real in batches of this many rows."""
    lengths = row_lengths(dataset)
    packed = "lengths" in dataset.column_names
    filled = float(lengths.sum() / (len(dataset) * capacity)) if packed else None
    return PaddingStats(len(lengths), len(dataset) if packed else None, filled, _padded_share(lengths, batch))


def _padded_share(lengths: np.ndarray, batch: int) -> float:
    order = np.random.default_rng(0).permutation(len(lengths))
    starts = np.arange(0, len(lengths), batch)
    longest = np.maximum.reduceat(lengths[order], starts)
    sizes = np.diff(np.append(starts, len(lengths)))
    return float(lengths.sum() / (longest * sizes).sum())


def pack_rows(rows: Sequence[Mapping[str, np.ndarray]], capacity: int) -> list[dict[str, Any]]:
    """The packs of `pack_dataset`, of rows that are at hand."""
    lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
    packing = pack(lengths, capacity)
    packs = []
    for start, end in pairwise(packing.borders):
        chosen = packing.rows[start:end]
        columns = {name: np.concatenate([rows[row][name] for row in chosen]) for name in ("input_ids", "labels")}
        packs.append({**columns, "lengths": lengths[chosen].tolist()})
    return packs


def pack_dataset(dataset: datasets.Dataset, capacity: int) -> datasets.Dataset:
    """The rows in packs of at most `capacity` tokens: `input_ids`, `labels`, and `lengths`, those of the rows in a
    pack, in order."""
    import pyarrow as pa

    lengths = row_lengths(dataset)
    packing = pack(lengths, capacity)
    source = dataset.with_format("arrow")
    columns = ("input_ids", "labels")
    spool = ArrowSpool()
    slab = max(1, _TOKENS // capacity)
    for first in range(0, len(packing), slab):
        borders = packing.borders[first : first + slab + 1]
        rows = packing.rows[borders[0] : borders[-1]]
        table = source[rows]
        sizes = lengths[rows]
        ends = np.concatenate([[0], np.cumsum(sizes)])[borders - borders[0]]
        packs = {}
        for name in columns:
            values = pa.chunked_array([chunk.flatten() for chunk in table[name].chunks]).combine_chunks()
            packs[name] = pa.LargeListArray.from_arrays(ends, values)
        packs["lengths"] = pa.LargeListArray.from_arrays(borders - borders[0], pa.array(sizes.astype(np.int32)))
        spool.add(pa.table(packs))
    return as_dataset(spool.table())
