"""How many rows a run would train on, before any is tokenised."""

from __future__ import annotations

from finetuning.config.data import DataConfig
from finetuning.data.arranging import arrange, used_datasets
from finetuning.data.loading import unparsed_rows
from finetuning.errors import DataError, Problem


def count_training_rows(data_conf: DataConfig) -> int:
    """Training rows after mixing and splitting, with none lost: what filters take is known only when they run.

    Raises:
        DataError: a file is missing or empty; every such file is named.
    """
    lengths, problems = [], list[Problem]()
    for key, source in used_datasets(data_conf.training_data, "data_conf.training_data"):
        try:
            lengths.append(sum(1 for _ in unparsed_rows(source, key)))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return len(arrange(data_conf.training_data, data_conf.validation_data, lengths)[0])
