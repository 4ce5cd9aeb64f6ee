"""The number of unpaired rows that a dry run counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetuning.config.sections.data import Concatenation, DataConfig, DatasetSource, NoData
from finetuning.data.prepared import count_training_rows


def test_preference_counts_as_two_unpaired_rows(tmp_path: Path, write_jsonl: Any, dpo_rows: Any) -> None:
    path = write_jsonl(tmp_path / "dpo.jsonl", dpo_rows(7))
    data = DataConfig(
        training_data=Concatenation(type="CONCATENATION", datasets=[DatasetSource(path=str(path))]),
        validation_data=NoData(type="NONE"),
    )
    assert count_training_rows(data).rows == 7
    assert count_training_rows(data, unpaired=True).rows == 14
