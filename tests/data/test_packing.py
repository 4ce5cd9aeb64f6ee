"""Packs: no row lost, none too full, almost no padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.data.packing import pack


@given(st.lists(st.integers(1, 64), max_size=300), st.integers(64, 100))
def test_each_row_lies_in_one_pack_that_holds_it(lengths: list[int], capacity: int) -> None:
    packing = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(packing.rows.tolist()) == list(range(len(lengths)))
    for start, end in zip(packing.borders, packing.borders[1:], strict=False):
        rows = packing.rows[start:end]
        assert 0 < np.array(lengths)[rows].sum() <= capacity
        assert rows.tolist() == sorted(rows.tolist())


def test_no_worse_than_one_at_a_time_best_fit() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = random.integers(1, 200, size=300)
        bins: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [index for index, space in enumerate(bins) if space >= length]
            if fitting:
                bins[min(fitting, key=lambda index: bins[index])] -= length
            else:
                bins.append(256 - length)
        assert len(pack(lengths, 256)) <= len(bins) + 1


def test_a_large_set_of_mixed_lengths_fills_its_packs() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(4.0, 0.8, 200_000).astype(np.int64), 1, 2048)
    assert pack(lengths, 2048).filled >= 0.999


def test_same_lengths_same_packs() -> None:
    lengths = np.random.default_rng(2).integers(1, 500, size=5_000)
    assert np.array_equal(pack(lengths, 512).rows, pack(lengths, 512).rows)


def test_a_row_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 9 tokens; a pack holds 1 to 8"):
        pack(np.array([1, 9]), 8)


def test_nothing_packs_to_nothing() -> None:
    assert len(pack(np.array([], dtype=np.int64), 8)) == 0
