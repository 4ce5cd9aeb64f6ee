"""What a config, rows and weights of somebody else may not do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetuning.config.sections.experiment import SFTExperiment
from finetuning.config.sections.model import RunConfig
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.document import ConfigDocument
from finetuning.errors import ConfigError, ModelError
from finetuning.model.load import load_model


class Planted:
    """A pickle of it makes a folder when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_was_asked_for_runs_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, copy)
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save({**weights, "planted": Planted(tmp_path / "mark")}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="contains more than weights, so it was not loaded"):
        load_model(RunConfig(model=str(copy), model_args={"use_safetensors": False}))
    assert not (tmp_path / "mark").exists()


def test_the_restricted_reader_cannot_be_switched_off(sft_values: Any) -> None:
    values = sft_values({"run_conf.model_args": {"use_safetensors": False, "weights_only": False}})
    with pytest.raises(ConfigError, match=r"weights_only"):
        validate(ConfigDocument(values), SFTExperiment)


def test_names_in_rows_lead_to_no_file(sft_values: Any, write_config: Any, write_jsonl: Any, run_cli: Any) -> None:
    outside = "../../../escaped"
    values = sft_values({"training_args.max_steps": 1, "tracking": {"trackers": ["tensorboard"]}})
    values["tracking"] |= {"experiment_name": outside, "run_name": outside}
    rows = Path(values["data_conf"]["training_data"]["datasets"][0]["path"])
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    write_jsonl(rows, [{"messages": messages, "dataset": outside, "id": f"{outside}-{n}"} for n in range(12)])
    root = rows.parents[2]
    before = {path for path in root.rglob("*") if not path.is_relative_to(rows.parent)}
    result = run_cli(["sft", write_config(values)])
    assert result.returncode == 0, result.stderr
    assert {path.name for path in rows.parent.iterdir()} == {rows.name, "config.yaml", "out"}
    assert not [path for path in root.rglob("*escaped*") if path not in before]
