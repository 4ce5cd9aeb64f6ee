"""Which rows lie together in one long row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Rows by pack: `rows[borders[i]:borders[i + 1]]` are the rows of pack i, int64, in their own order."""

    rows: np.ndarray
    borders: np.ndarray
    filled: float
    """Share of all packs' capacity that holds tokens."""

    def __len__(self) -> int:
        return len(self.borders) - 1


def pack(lengths: np.ndarray, capacity: int) -> Packing:
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
        return Packing(lengths, np.zeros(1, dtype=np.int64), 1.0)
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
    return Packing(rows, borders, float(lengths.sum() / (packs.count * capacity)))


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
