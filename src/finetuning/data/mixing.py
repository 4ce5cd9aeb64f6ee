"""Which rows, in which order: pure functions of lengths, weights and a seed.

The draws are those of `datasets.interleave_datasets` and `Dataset.train_test_split`, so that a seed picks the rows
that it always picked, on any number of processes.

Which rows are trained on and which validate, in which order, by what the config says of its datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from finetuning.config.sections.data import (
    AutoSplit,
    Concatenation,
    DatasetSource,
    FromDatasets,
    TrainingData,
    ValidationData,
    WeightedMix,
)
from finetuning.errors import DataError, Location

_BLOCK = 1000
_MOST_REPEATED = 1000
"""How many times as long as its datasets a mix may become: beyond, a weight was not meant."""


def concatenate(lengths: Sequence[int]) -> np.ndarray:
    """Indices, int64, of all rows of all datasets laid end to end."""
    return np.arange(sum(lengths), dtype=np.int64)


def weighted_mix(
    lengths: Sequence[int], weights: Sequence[float], seed: int, stopping: str = "all_exhausted"
) -> np.ndarray:
    """Indices, int64, into the datasets laid end to end.

    When all weights are 1.0 the datasets take turns, and shorter ones start again until the longest is through.
    Otherwise a dataset is drawn by weight for each place until each has given all its rows. So every row of a dataset
    with weight appears at least once; under `first_exhausted` none appears twice, and the mix ends where a dataset has
    no other row to give. A weight of 0 skips its dataset. The weights of the others are divided by their sum.

    Raises:
        ValueError: no weight is above 0, a dataset that has one is empty, or rows would be repeated without measure.
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
        places = np.flatnonzero(draws == source)
        indices[places] = np.arange(len(places)) % size + start
    return indices


def shares(weights: Sequence[float]) -> list[float]:
    """Probabilities, by weight; 0 for a weight that is nothing beside the others."""
    total = sum(weights)
    if total == float("inf"):
        return shares([weight / max(weights) for weight in weights])
    return [weight / total for weight in weights]


def _check_length(sizes: np.ndarray, probabilities: Sequence[float]) -> None:
    expected = max(size / share if share else np.inf for size, share in zip(sizes, probabilities, strict=True))
    if expected > _MOST_REPEATED * sizes.sum():
        raise ValueError(
            f"by these weights the mix would be about {expected:,.0f} rows long, made of {sizes.sum():,}: it ends when"
            f" the last row of every dataset was drawn, and one of them has {min(probabilities):.1g} of the draws;"
            " raise its sampling_weight, leave it out, or set stopping: first_exhausted"
        )


def sampled_datasets(probabilities: Sequence[float], seed: int) -> Iterator[np.ndarray]:
    """Numbers of datasets as they are drawn, without end, in blocks."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.choice(len(probabilities), size=_BLOCK, p=probabilities)


def _draw_until_exhausted(
    sizes: np.ndarray, probabilities: Sequence[float], seed: int, until_first: bool
) -> np.ndarray:
    """Drawn datasets, up to the draw that takes the last row of all of them, or of the first one."""
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
    """Positions, int64, of the training rows and of the validation rows among `count` rows, disjoint and shuffled.

    Raises:
        ValueError: one side would be empty.
    """
    validation = int(np.ceil(ratio * count))
    if not 0 < validation < count:
        raise ValueError(f"{count} rows cannot be split with ratio {ratio:g}: one side would be empty")
    order = np.random.default_rng(seed).permutation(count)
    return order[validation:], order[:validation]


def used_datasets(data: Concatenation | WeightedMix, key: str) -> list[tuple[str, DatasetSource]]:
    """The datasets that are read, each with its key in the config: all but those of weight 0.

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
            "all sampling weights are 0, so there is nothing to train on", place=Location(key=f"{key}.datasets")
        )
    return used


def arrange(
    training: TrainingData, validation: ValidationData, lengths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Indices, int64, of the training rows and of the validation rows that come out of the training data.

    `lengths` counts the rows of the datasets that `used_datasets` names; indices count through all of them.

    Raises:
        DataError: a split would leave one side empty.
    """
    used = used_datasets(training, "data_conf.training_data")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    parts, held_out = [], []
    for (key, source), length, start in zip(used, lengths, starts, strict=False):
        kept, out = _share(source, validation, length, key)
        parts.append(kept + start)
        held_out.append(out + start)
    train = _mixed(training, [source for _, source in used], parts)
    if isinstance(validation, AutoSplit):
        positions = _split(len(train), validation.ratio, validation.seed, "data_conf.validation_data.ratio")
        return train[positions[0]], train[positions[1]]
    if not isinstance(validation, FromDatasets):
        return train, None
    rows = np.concatenate(held_out)
    if not len(rows) or not len(train):
        missing = "train on" if len(rows) else "validate on: no dataset has a validation_ratio"
        raise DataError(f"nothing is left to {missing}", place=Location(key="data_conf.validation_data"))
    return train, rows


def _share(source: DatasetSource, validation: ValidationData, length: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a dataset's training rows and of its validation rows; in their order where none are left out."""
    everything, nothing = np.arange(length, dtype=np.int64), np.arange(0, dtype=np.int64)
    ratio = source.validation_ratio if isinstance(validation, FromDatasets) else 0.0
    if ratio == 1:
        return nothing, everything
    if ratio == 0 and source.train_ratio in (None, 1.0):
        return everything, nothing
    seed = getattr(validation, "seed", 0)
    if ratio:
        train, held_out = _split(length, ratio, seed, f"{key}.validation_ratio")
    else:
        train, held_out = np.random.default_rng(seed).permutation(length), nothing
    most = len(train) if source.train_ratio is None else min(int(source.train_ratio * length), len(train))
    return train[:most], held_out


def _mixed(training: TrainingData, sources: Sequence[DatasetSource], parts: Sequence[np.ndarray]) -> np.ndarray:
    filled = [index for index, part in enumerate(parts) if len(part)]
    if not filled:
        return np.arange(0, dtype=np.int64)
    rows = np.concatenate([parts[index] for index in filled])
    sizes = [len(parts[index]) for index in filled]
    if isinstance(training, Concatenation):
        return rows
    weights = [sources[index].sampling_weight for index in filled]
    try:
        return rows[weighted_mix(sizes, weights, training.seed, training.stopping)]
    except ValueError as error:
        raise DataError(str(error), place=Location(key="data_conf.training_data.datasets")) from None


def _split(count: int, ratio: float, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return split(count, ratio, seed)
    except ValueError as error:
        raise DataError(str(error), place=Location(key=key)) from None
