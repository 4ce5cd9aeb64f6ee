"""The order of training rows: mixing datasets, and splitting off validation rows.

The draws equal those of `datasets.interleave_datasets` and `Dataset.train_test_split`, so that a seed selects the same
rows as with those functions, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from finetuning.config.sections.data import (
    AutoSplit,
    Concatenation,
    DatasetSource,
    FromDatasets,
    TrainingData,
    ValidationData,
    WeightedDatasetSource,
    WeightedMix,
)
from finetuning.errors import DataError, Location

_BLOCK = 1000
_MAX_REPEATS = 1000
"""Longest mix, in multiples of its datasets' rows. A longer one is most likely a mistyped weight."""


def concatenate(lengths: Sequence[int]) -> np.ndarray:
    """Indices of all rows of all datasets, int64, (rows,)."""
    return np.arange(sum(lengths), dtype=np.int64)


def weighted_mix(
    lengths: Sequence[int], weights: Sequence[float], seed: int, stopping: str = "all_exhausted"
) -> np.ndarray:
    """Indices of the rows of a mix into the concatenated datasets, int64.

    If all weights are 1.0, the datasets take turns, and shorter ones start again until the longest ends. Otherwise the
    dataset of each row is drawn by weight, until every dataset has given all of its rows. Every row of a dataset with a
    weight appears at least once; with `first_exhausted` no row appears twice, and the mix ends where a dataset has no
    row left. A weight of 0 leaves its dataset out. Weights are normalized by their sum.

    Raises:
        ValueError: every weight is 0, a dataset with a weight is empty, or the mix would repeat rows excessively.
    """
    used = [index for index, weight in enumerate(weights) if weight > 0]
    if not used:
        raise ValueError("all sampling weights are 0")
    starts = np.concatenate([[0], np.cumsum(lengths)])[used].astype(np.int64)
    sizes = np.asarray(lengths, dtype=np.int64)[used]
    if not sizes.all():
        raise ValueError("a dataset of the mix has no rows")
    until_first = stopping == "first_exhausted"
    if all(weights[index] == 1.0 for index in used):
        turns = np.arange(sizes.min() if until_first else sizes.max(), dtype=np.int64)[:, None]
        return (turns % sizes + starts).ravel()
    probabilities = shares([weights[index] for index in used])
    if not until_first:
        _check_length(sizes, probabilities)
    draws = _draw_until_exhausted(sizes, probabilities, seed, until_first)
    indices = np.empty(len(draws), dtype=np.int64)
    for source, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        positions = np.flatnonzero(draws == source)
        indices[positions] = np.arange(len(positions)) % size + start
    return indices


def shares(weights: Sequence[float]) -> list[float]:
    """The probability of each dataset."""
    total = sum(weights)
    if total == float("inf"):  # The sum of very large weights overflows.
        return shares([weight / max(weights) for weight in weights])
    return [weight / total for weight in weights]


def _check_length(sizes: np.ndarray, probabilities: Sequence[float]) -> None:
    expected = max(size / share if share else np.inf for size, share in zip(sizes, probabilities, strict=True))
    if expected > _MAX_REPEATS * sizes.sum():
        raise ValueError(
            f"the mix would be about {expected:,.0f} rows long, from {sizes.sum():,} rows: it ends when every dataset"
            f" is exhausted, and one of them has a share of {min(probabilities):.1g};"
            " raise its sampling_weight, remove it, or set stopping: first_exhausted"
        )


def sampled_datasets(probabilities: Sequence[float], seed: int) -> Iterator[np.ndarray]:
    """Draw dataset numbers forever, in blocks."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.choice(len(probabilities), size=_BLOCK, p=probabilities)


def _draw_until_exhausted(
    sizes: np.ndarray, probabilities: Sequence[float], seed: int, until_first: bool
) -> np.ndarray:
    """Draw dataset numbers until all datasets are exhausted, or the first of them."""
    draws = sampled_datasets(probabilities, seed)
    counts = np.zeros(len(sizes), dtype=np.int64)
    blocks: list[np.ndarray] = []
    while not (counts >= sizes).any() if until_first else (counts < sizes).any():
        blocks.append(next(draws))
        counts += np.bincount(blocks[-1], minlength=len(sizes))
    drawn = np.concatenate(blocks)
    done = [np.flatnonzero(drawn == source)[size - 1] for source, size in enumerate(sizes) if counts[source] >= size]
    return drawn[: (min(done) if until_first else max(done)) + 1]


def split(count: int, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled, disjoint positions of the training and of the validation rows among `count` rows, int64.

    Raises:
        ValueError: one split would be empty.
    """
    validation = int(np.ceil(ratio * count))
    if not 0 < validation < count:
        raise ValueError(f"cannot split {count} rows with ratio {ratio:g}: one split would be empty")
    order = np.random.default_rng(seed).permutation(count)
    return order[validation:], order[:validation]


def used_datasets(data: Concatenation | WeightedMix, key: str) -> list[tuple[str, DatasetSource]]:
    """The datasets that are read, each with its key in the config: all except those of weight 0.

    Raises:
        DataError: every weight is 0.
    """
    used = [
        (f"{key}.datasets[{index}]", source)
        for index, source in enumerate(data.datasets)
        if getattr(source, "sampling_weight", 1.0) > 0
    ]
    if not used:
        raise DataError(
            "all sampling weights are 0: there is nothing to train on", location=Location(key=f"{key}.datasets")
        )
    return used


def arrange(
    training: TrainingData, validation: ValidationData, lengths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Indices of the training rows, and of the validation rows that are split off them, int64.

    `lengths` are the row counts of the datasets of `used_datasets`; the indices are into their concatenation.

    Raises:
        DataError: a split would be empty.
    """
    used = used_datasets(training, "data_conf.training_data")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    train_rows: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    for (key, source), length, start in zip(used, lengths, starts, strict=False):
        kept, out = _split_dataset(source, validation, length, key)
        train_rows.append(kept + start)
        held_out.append(out + start)
    train = _mix(training, [source for _, source in used], train_rows)
    if isinstance(validation, AutoSplit):
        positions = _split(len(train), validation.ratio, validation.seed, "data_conf.validation_data.ratio")
        return train[positions[0]], train[positions[1]]
    if not isinstance(validation, FromDatasets):
        return train, None
    rows = np.concatenate(held_out)
    if not len(rows) or not len(train):
        missing = "train on" if len(rows) else "validate on: no dataset has a validation_ratio"
        raise DataError(f"no row is left to {missing}", location=Location(key="data_conf.validation_data"))
    return train, rows


def _split_dataset(
    source: DatasetSource, validation: ValidationData, length: int, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation rows of one dataset; in file order if all are used."""
    every_row, no_row = np.arange(length, dtype=np.int64), np.arange(0, dtype=np.int64)
    ratio = source.validation_ratio if isinstance(validation, FromDatasets) else 0.0
    if ratio == 1:
        return no_row, every_row
    if ratio == 0 and source.train_ratio in (None, 1.0):
        return every_row, no_row
    seed = getattr(validation, "seed", 0)
    if ratio:
        train, held_out = _split(length, ratio, seed, f"{key}.validation_ratio")
    else:
        train, held_out = np.random.default_rng(seed).permutation(length), no_row
    num_train = len(train) if source.train_ratio is None else min(int(source.train_ratio * length), len(train))
    return train[:num_train], held_out


def _mix(training: TrainingData, sources: Sequence[DatasetSource], rows_of: Sequence[np.ndarray]) -> np.ndarray:
    used = [index for index, rows in enumerate(rows_of) if len(rows)]
    if not used:
        return np.arange(0, dtype=np.int64)
    rows = np.concatenate([rows_of[index] for index in used])
    sizes = [len(rows_of[index]) for index in used]
    if isinstance(training, Concatenation):
        return rows
    weights = [cast(WeightedDatasetSource, sources[index]).sampling_weight for index in used]
    try:
        return rows[weighted_mix(sizes, weights, training.seed, training.stopping)]
    except ValueError as error:
        raise DataError(str(error), location=Location(key="data_conf.training_data.datasets")) from None


def _split(count: int, ratio: float, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return split(count, ratio, seed)
    except ValueError as error:
        raise DataError(str(error), location=Location(key=key)) from None
