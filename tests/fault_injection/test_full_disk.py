"""A disk that fills up, for real: a small file system in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuning.algorithms import ALGORITHMS
from finetuning.atomic_io import find_manifest_mismatch
from finetuning.errors import StorageError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.getuid() == 0 and shutil.which("mount")
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("a file system of its own needs the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def filling(folder: Path, full_at: set[int], *, left: int = 700_000) -> Any:
    """SFT whose disk has only so many bytes left while it saves at these steps."""
    from transformers import TrainerCallback

    class Fills(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            filler = folder / "filler"
            filler.unlink(missing_ok=True)
            if state.global_step + 1 in full_at:
                with open(filler, "wb") as stream:
                    stream.write(bytes(shutil.disk_usage(folder).free - left))

    def build(parts: Any) -> Any:
        trainer = ALGORITHMS["sft"].build_trainer(parts)
        trainer.add_callback(Fills())
        return trainer

    return replace(ALGORITHMS["sft"], build_trainer=build)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    train: Any, sft_values: Any, small_disk: Path, caplog: Any
) -> None:
    changes = {
        "training_args.output_dir": str(small_disk / "out"),
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "training_args.save_total_limit": 1,
        "training_args.max_steps": 4,
    }
    # Step 1 fails in the middle of a write; step 3, whose size is known by then, is not begun.
    run = train(sft_values(changes), filling(small_disk, {1, 3}))
    assert [path.name for path in run.output_dir.glob("checkpoint-*")] != []
    assert find_manifest_mismatch(run.output_dir / "checkpoint-4") is None
    assert not list(run.output_dir.glob(".*.partial"))
    messages = [record.getMessage() for record in caplog.records if "is not saved" in record.getMessage()]
    assert [text.partition(" ")[0] for text in messages] == ["checkpoint-1", "checkpoint-3"]
    assert " bytes, " not in messages[0]
    assert " bytes, " in messages[1]


def test_a_full_disk_at_the_end_names_the_newest_checkpoint(train: Any, sft_values: Any, small_disk: Path) -> None:
    changes = {
        "training_args.output_dir": str(small_disk / "out"),
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 2,
        "training_args.save_total_limit": 1,
    }
    with pytest.raises(StorageError, match=r"no space left for the final model in .*checkpoint-2 is valid: free"):
        train(sft_values(changes), filling(small_disk, {3}, left=300_000))
    out = small_disk / "out"
    assert find_manifest_mismatch(out / "checkpoint-2") is None, "the last whole one stays though one is the limit"
    assert not (out / "checkpoint-final").exists()
