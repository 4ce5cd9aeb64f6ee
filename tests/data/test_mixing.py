from __future__ import annotations

from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pytest

from finetuning.config.sections.data import DataConfig
from finetuning.data.mixing import arrange, concatenate, split, weighted_mix
from finetuning.errors import DataError


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


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1e-6, 1.0], r"would be about 3,000,003 rows long, from 5 rows: .* has a share of 1e-06; raise its"),
        ([1e-300, 1.0], "rows long"),
        ([5e-324, 1e100], "about inf rows long"),
    ],
)
def test_weights_that_would_repeat_rows_without_measure_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_mix([3, 2], weights, 0)
    mix = {"type": "PRECOMPUTE_WEIGHTED_MIX"}
    if max(weights) <= 1:
        with pytest.raises(DataError, match=r"^data_conf\.training_data\.datasets: the mix would be about"):
            arranged([3, 2], [{"sampling_weight": weight} for weight in weights], {"type": "NONE"}, **mix)
        assert len(weighted_mix([3, 2], weights, 0, "first_exhausted")) == 2
    assert len(weighted_mix([3, 2], [1e308, 1e308], 0)) >= 5


@pytest.mark.parametrize(("count", "ratio"), [(10, 0.2), (11, 0.25), (1000, 0.013)])
def test_split_is_that_of_datasets(count: int, ratio: float) -> None:
    train, validation = split(count, ratio, 1289525893)
    theirs = datasets.Dataset.from_dict({"i": list(range(count))}).train_test_split(ratio, seed=1289525893)
    assert train.tolist() == theirs["train"]["i"][:]
    assert validation.tolist() == theirs["test"]["i"][:]


def test_a_split_with_an_empty_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot split 1 rows with ratio 0\.2"):
        split(1, 0.2, 0)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    ("lengths", "weights"), [([30, 5], [0.9, 0.1]), ([3, 4, 5], [1.0, 1.0, 1.0]), ([3000, 700], [0.5, 0.4])]
)
def test_a_mix_may_end_with_its_first_dataset(lengths: list[int], weights: list[float], seed: int) -> None:
    mixed = weighted_mix(lengths, weights, seed, "first_exhausted").tolist()
    assert len(set(mixed)) == len(mixed)
    starts = np.cumsum([0, *lengths])
    exhausted = [set(range(start, end)) <= set(mixed) for start, end in pairwise(starts.tolist())]
    assert any(exhausted)
    if set(weights) == {1.0}:
        return
    assert sum(exhausted) == 1, "it ends with the first, not the second"
    parts = [datasets.Dataset.from_dict({"i": list(range(start, end))}) for start, end in pairwise(starts.tolist())]
    probabilities = [weight / sum(weights) for weight in weights]
    theirs = datasets.interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="first_exhausted")["i"][:]
    assert mixed == theirs


def arranged(
    lengths: list[int], sources: list[dict[str, Any]], validation: dict[str, Any], **training: Any
) -> tuple[list[int], list[int] | None]:
    values = {
        "training_data": {"type": "CONCATENATION", "datasets": [{"path": "a", **item} for item in sources], **training},
        "validation_data": validation,
    }
    conf = DataConfig.model_validate(values)
    train, held_out = arrange(conf.training_data, conf.validation_data, lengths)
    return train.tolist(), None if held_out is None else held_out.tolist()


def test_each_dataset_gives_its_share_to_validation() -> None:
    sources = [{"validation_ratio": 0.25}, {}, {"validation_ratio": 1.0}, {"train_ratio": 0.5, "validation_ratio": 0.5}]
    train, held_out = arranged([8, 3, 2, 10], sources, {"type": "FROM_DATASETS", "seed": 3})
    assert held_out is not None
    assert [sum(low <= item < high for item in held_out) for low, high in ((0, 8), (8, 11), (11, 13), (13, 23))] == [
        2,
        0,
        2,
        5,
    ]
    assert sorted(train + held_out) == list(range(23))
    assert train[6:9] == [8, 9, 10], "a dataset that is not split keeps its order"


def test_a_share_of_a_dataset_is_that_of_datasets() -> None:
    train, held_out = arranged(
        [40], [{"train_ratio": 0.5, "validation_ratio": 0.2}], {"type": "FROM_DATASETS", "seed": 5}
    )
    theirs = datasets.Dataset.from_dict({"i": list(range(40))}).train_test_split(0.2, 0.5, seed=5)
    assert (train, held_out) == (theirs["train"]["i"][:], theirs["test"]["i"][:])


def test_a_share_can_be_trained_on_without_validation() -> None:
    train, held_out = arranged([10, 2], [{"train_ratio": 0.3}, {}], {"type": "NONE"})
    assert (len(train), held_out) == (5, None)
    assert train[3:] == [10, 11]


def test_weights_go_with_the_datasets_that_are_trained_on() -> None:
    sources = [{"sampling_weight": 0.0}, {"sampling_weight": 1.0, "validation_ratio": 1.0}, {"sampling_weight": 0.5}]
    train, held_out = arranged(
        [2, 3], sources, {"type": "FROM_DATASETS"}, type="PRECOMPUTE_WEIGHTED_MIX", stopping="first_exhausted"
    )
    assert (train, held_out) == ([2, 3, 4], [0, 1])


def test_a_split_that_leaves_nothing_names_its_key() -> None:
    with pytest.raises(DataError, match=r"datasets\[0\]\.validation_ratio: cannot split 1 rows"):
        arranged([1], [{"validation_ratio": 0.5}], {"type": "FROM_DATASETS"})
    with pytest.raises(DataError, match="no row is left to validate on: no dataset has a validation_ratio"):
        arranged([1], [{}], {"type": "FROM_DATASETS"})
    with pytest.raises(DataError, match="no row is left to train on"):
        arranged([1], [{"validation_ratio": 1.0}], {"type": "FROM_DATASETS"})
