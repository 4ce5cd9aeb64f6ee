"""How many rows a run would train on, before any is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetuning.config.sections.data import DataConfig, DatasetSource
from finetuning.data.arranging import arrange, used_datasets
from finetuning.data.cache import prepared_in
from finetuning.data.open_dataset import open_dataset, options_for, unparsed_rows
from finetuning.data.sources import find_shards
from finetuning.errors import DataError, Problem


@dataclass(frozen=True)
class Count:
    """A number of rows, None where nobody knows it, and what it says."""

    rows: int | None
    why: str


def count_training_rows(data_conf: DataConfig, *, rated: bool = False) -> Count:
    """Training rows after mixing and splitting, with none lost: what filters take is known only when they run. Of
    prepared rows those that are left.

    Args:
        rated: whether rows are rated answers, of which a preference makes two.

    Raises:
        DataError: a file is missing or empty; every such file is named.
    """
    if data_conf.prepared:
        stored = prepared_in(Path(data_conf.prepared).expanduser())
        return Count(len(stored.train), f"as prepared in {data_conf.prepared}, before any are packed")
    lengths, problems = [], list[Problem]()
    for key, source in used_datasets(data_conf.training_data, "data_conf.training_data"):
        try:
            if data_conf.streaming:
                find_shards(source, key, streaming=True)
            else:
                lengths.append(_rated_rows(source, key) if rated else sum(1 for _ in unparsed_rows(source, key)))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    if data_conf.streaming:
        return Count(None, "data_conf.streaming: they are read as training goes")
    rows = len(arrange(data_conf.training_data, data_conf.validation_data, lengths)[0])
    return Count(rows, "before any is filtered or dropped")


def _rated_rows(source: DatasetSource, key: str) -> int:
    """Rows, the two of a preference both counted; a row that cannot be read counts as one."""
    rows = open_dataset(source, key, "unpaired", options_for(None, {})).rows
    return sum(len(row) if isinstance(row, list) else 1 for row in rows)
