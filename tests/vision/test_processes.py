"""Images on two processes: the losses are those of one, with the vision tower trained and a batch without images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vision.conftest import COLORS
from vision.test_preferences import preference

PARTS = {"run_conf.train_parts": ["language_model", "projector", "vision_tower"]}


@pytest.mark.full
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_have_the_losses_of_one(
    method: str,
    vision_values: Any,
    train: Any,
    torchrun: Any,
    logged_losses: Any,
    write_config: Any,
    picture_rows: list[dict[str, Any]],
    pictures: list[str],
    tmp_path: Path,
) -> None:
    rows = picture_rows
    if method == "dpo":
        rows = [preference(name, color) for name, color in zip(pictures, COLORS, strict=True)]
        rows += [preference(None, "red", "What is the color of blood?"), preference(None, "blue", "And of the sky?")]

    def values(folder: str) -> dict[str, Any]:
        changes = {
            **PARTS,
            "training_args.output_dir": str(tmp_path / folder),
            "training_args.max_steps": 3,
            "batchsize_conf": {"total_train_batch_size": 2, "max_per_device_train_batch_size": 1},
        }
        made = vision_values("qwen2_5_vl", rows, changes)
        if method == "dpo":
            del made["sft_args"]
        return made

    single = train(values("one"))
    torchrun(method, write_config(values("two"), "two.yaml"))
    assert logged_losses(tmp_path / "two") == pytest.approx(single.losses, rel=1e-3)
