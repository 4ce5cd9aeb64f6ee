"""Old checkpoints go, and never the last whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuning.trainer.checkpointing import rotate_checkpoints


@pytest.mark.parametrize(
    ("steps", "newest", "most", "best", "kept"),
    [
        ((1, 2, 3), 3, 2, None, {2, 3}),
        ((1, 2, 3), 3, 1, 1, {1, 3}),
        ((1, 2, 3), 3, 3, 1, {1, 2, 3}),
        # A run that has passed over 6 and gone on from 3.
        ((3, 4, 6), 4, 1, None, {4}),
        ((3, 4, 6), 4, 2, None, {3, 4}),
        ((9, 10, 11), 11, 2, None, {10, 11}),
        ((1, 2), 2, None, None, {1, 2}),
        ((1, 2), 2, 0, None, {1, 2}),
    ],
)
def test_the_oldest_go_first(
    tmp_path: Path, steps: tuple[int, ...], newest: int, most: int | None, best: int | None, kept: set[int]
) -> None:
    (tmp_path / "checkpoint-final").mkdir()
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").touch()
    rotate_checkpoints(tmp_path / f"checkpoint-{newest}", most, tmp_path / f"checkpoint-{best}" if best else None)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in kept} | {"checkpoint-final"}
