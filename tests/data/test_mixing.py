from __future__ import annotations

import datasets
import numpy as np
import pytest

from finetuning.data.mixing import concatenate, split, weighted_mix


def interleaved(lengths: list[int], probabilities: list[float] | None, seed: int) -> list[int]:
    starts = np.cumsum([0, *lengths[:-1]])
    parts = [
        datasets.Dataset.from_dict({"i": list(range(start, start + size))})
        for start, size in zip(starts, lengths, strict=True)
    ]
    mixed = datasets.interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="all_exhausted")
    return mixed["i"][:]


def test_concatenation_is_one_dataset_after_another() -> None:
    assert concatenate([2, 3]).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("lengths", [[3, 4, 5], [1, 1], [7], [2, 2000]])
def test_equal_weights_take_turns_as_datasets_does(lengths: list[int]) -> None:
    assert weighted_mix(lengths, [1.0] * len(lengths), 3).tolist() == interleaved(lengths, None, 3)


@pytest.mark.parametrize("seed", [0, 19851243])
@pytest.mark.parametrize(
    ("lengths", "weights"), [([30, 5], [0.9, 0.1]), ([3, 4, 5], [2.0, 1.0, 1.0]), ([900, 700], [0.5, 0.5])]
)
def test_weights_draw_as_datasets_does(lengths: list[int], weights: list[float], seed: int) -> None:
    probabilities = [weight / sum(weights) for weight in weights]
    mixed = weighted_mix(lengths, weights, seed)
    assert mixed.tolist() == interleaved(lengths, probabilities, seed)
    assert set(mixed.tolist()) == set(range(sum(lengths)))


def test_weight_zero_skips_a_dataset() -> None:
    assert weighted_mix([2, 3, 2], [1.0, 0.0, 1.0], 0).tolist() == [0, 5, 1, 6]
    with pytest.raises(ValueError, match="all sampling weights are 0"):
        weighted_mix([2], [0.0], 0)


@pytest.mark.parametrize(("count", "ratio"), [(10, 0.2), (11, 0.25), (1000, 0.013)])
def test_split_is_that_of_datasets(count: int, ratio: float) -> None:
    train, validation = split(count, ratio, 1289525893)
    theirs = datasets.Dataset.from_dict({"i": list(range(count))}).train_test_split(ratio, seed=1289525893)
    assert train.tolist() == theirs["train"]["i"][:]
    assert validation.tolist() == theirs["test"]["i"][:]


def test_a_split_with_an_empty_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 rows cannot be split with ratio 0\.2"):
        split(1, 0.2, 0)
