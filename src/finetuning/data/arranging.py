"""Which rows are trained on and which validate, in which order, by what the config says of its datasets."""

from __future__ import annotations

from collections.abc import Sequence

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
from finetuning.data import mixing
from finetuning.errors import DataError, Place


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
            "all sampling weights are 0, so there is nothing to train on", place=Place(key=f"{key}.datasets")
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
        raise DataError(f"nothing is left to {missing}", place=Place(key="data_conf.validation_data"))
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
        return rows[mixing.weighted_mix(sizes, weights, training.seed, training.stopping)]
    except ValueError as error:
        raise DataError(str(error), place=Place(key="data_conf.training_data.datasets")) from None


def _split(count: int, ratio: float, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return mixing.split(count, ratio, seed)
    except ValueError as error:
        raise DataError(str(error), place=Place(key=key)) from None
