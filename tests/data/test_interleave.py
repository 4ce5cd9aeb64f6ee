"""A stream of rows comes in the order that the same rows have when they are all there."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from finetuning.data.mixing import weighted_mix
from finetuning.data.streaming.interleave import chain_datasets, interleave, shuffle_buffer
from finetuning.errors import DataError

SIZES = (7, 3, 40)


def sources(*sizes: int) -> list:
    """Datasets whose rows are their places in all datasets concatenated."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    return [
        lambda start=start, size=size: iter(range(start, start + size))
        for start, size in zip(starts, sizes, strict=False)
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.25, 0.25), (5.0, 1.0, 1.0)])
@pytest.mark.parametrize("stopping", ["all_exhausted", "first_exhausted"])
def test_a_mix_has_the_order_of_prepared_rows(weights: tuple[float, ...], stopping: str) -> None:
    for seed in (0, 5, 19851243):
        expected = weighted_mix(SIZES, weights, seed, stopping).tolist()
        result = list(interleave(sources(*SIZES), weights, seed, stopping))
        assert [row for _, row in result] == expected
        borders = np.cumsum(SIZES)
        assert [number for number, _ in result] == [int(np.searchsorted(borders, row, "right")) for row in expected]


def test_a_mix_of_more_than_a_block_of_draws_has_it_too() -> None:
    sizes, weights = (2500, 10), (0.9, 0.1)
    result = [row for _, row in interleave(sources(*sizes), weights, 3, "all_exhausted")]
    assert result == weighted_mix(sizes, weights, 3).tolist()
    assert len(result) > 2000


def test_datasets_come_one_after_another() -> None:
    assert list(chain_datasets(sources(2, 1))) == [(0, 0), (0, 1), (1, 2)]


def test_a_dataset_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        list(interleave(sources(2, 0), (1.0, 1.0), 0, "all_exhausted"))


def test_shuffling_gives_each_row_once_and_holds_no_more_than_its_buffer() -> None:
    consumed = 0

    def rows() -> object:
        nonlocal consumed
        for row in range(500):
            consumed += 1
            yield row

    emitted = []
    for row in shuffle_buffer(rows(), 20, (1, 0)):
        emitted.append(row)
        assert consumed - len(emitted) <= 20
        assert row <= len(emitted) + 20, "no row comes before it was read"
    assert Counter(emitted) == Counter(range(500))
    assert emitted != sorted(emitted)
    assert emitted == list(shuffle_buffer(iter(range(500)), 20, (1, 0)))
    assert emitted != list(shuffle_buffer(iter(range(500)), 20, (1, 1)))
    assert list(shuffle_buffer(iter(range(9)), 1, (1, 0))) == list(range(9))
    assert sorted(shuffle_buffer(iter(range(9)), 100, (1, 0))) == list(range(9))


def test_rows_move_about_as_far_as_the_buffer_is_long() -> None:
    order = np.array(list(shuffle_buffer(iter(range(20_000)), 50, (3, 0))))
    assert 25 < np.abs(np.arange(20_000) - order).mean() < 75
