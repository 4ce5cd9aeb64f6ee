"""The algorithm that docs/contributing/new-algorithm.md adds works as the page says."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetuning.algorithms import ALGORITHMS
from finetuning.config.sections import experiment

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contributing" / "new-algorithm.md"


def load(title: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the block with this title from a file, because the docstrings of config fields are read from source."""
    match = re.search(rf'^```python title="{title}"\n(.*?)^```$', PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert match is not None
    path.write_text(match[1], "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def focal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    sections = load("config/sections/experiment.py", tmp_path / "focal_sections.py", monkeypatch)
    monkeypatch.setattr(experiment, "FocalExperiment", sections.FocalExperiment, raising=False)
    monkeypatch.setitem(experiment.EXPERIMENTS, "focal", sections.FocalExperiment)
    module = load("algorithms/focal.py", tmp_path / "focal_algorithm.py", monkeypatch)
    monkeypatch.setitem(ALGORITHMS, "focal", module.ALGORITHM)
    return module


def test_the_loss_is_that_of_the_paper(focal: ModuleType) -> None:
    import torch

    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    expected = sum((1 - p) ** 2 * -p.log() for p in (torch.tensor(0.5), torch.tensor(2.0).sigmoid()))
    torch.testing.assert_close(focal.focal_loss(logits, torch.tensor([0, 0]), gamma=2.0), expected)


def test_gamma_zero_trains_like_sft_and_gamma_two_gives_a_smaller_loss(
    focal: ModuleType, train: Callable[..., Any], sft_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def losses(name: str, algorithm: Any = None, **sections: Any) -> list[float]:
        values = sft_values()
        values["training_args"]["output_dir"] = str(tmp_path / name)
        values["sft_args"]["batching"] = "padded"
        return train({**values, **sections}, algorithm).losses

    cross_entropy = losses("sft")
    assert losses("zero", focal.ALGORITHM, focal_args={"gamma": 0.0}) == pytest.approx(cross_entropy, abs=1e-5)
    assert losses("two", focal.ALGORITHM)[0] < 0.9999 * cross_entropy[0]
