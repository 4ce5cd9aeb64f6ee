"""How many rows a run would train on, before any is tokenised."""

from __future__ import annotations

from finetuning.config.data import AutoSplit, Concatenation, DataConfig
from finetuning.data import mixing
from finetuning.data.sources import check_source, read_rows
from finetuning.errors import DataError, Problem


def count_training_rows(data_conf: DataConfig) -> int:
    """Training rows after mixing and splitting, with none lost: what filters take is known only when they run.

    Raises:
        DataError: a file is missing or empty; every such file is named.
    """
    training = data_conf.training_data
    lengths, weights, problems = [], [], list[Problem]()
    for index, source in enumerate(training.datasets):
        weight = getattr(source, "sampling_weight", 1.0)
        if weight == 0:
            continue
        try:
            check_source(source.path, f"data_conf.training_data.datasets[{index}].path")
            lengths.append(sum(1 for _ in read_rows(source.path)))
            weights.append(weight)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    is_plain = isinstance(training, Concatenation)
    rows = sum(lengths) if is_plain else len(mixing.weighted_mix(lengths, weights, training.seed))
    if isinstance(data_conf.validation_data, AutoSplit):
        rows = len(mixing.split(rows, data_conf.validation_data.ratio, data_conf.validation_data.seed)[0])
    return rows
