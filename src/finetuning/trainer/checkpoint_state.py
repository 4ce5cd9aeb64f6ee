"""Which checkpoints of a run are kept, and how the others go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetuning.atomic_io import staging_path


def retire_checkpoints(newest: Path, most: int | None, best: Path | None) -> None:
    """Removes the checkpoints beside `newest` that are more than `most` with it; the best one stays, too.

    Those of a later step go first: this run has passed them over. Each loses its name before its files, so that what is
    called a checkpoint is whole even when the removal is cut. None is removed where `most` is None or 0.
    """
    if not most or most < 0:
        return
    step = _step(newest)
    others = [
        path
        for path in newest.parent.glob(f"{newest.name.rpartition('-')[0]}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit() and path not in (newest, best)
    ]
    others.sort(key=lambda path: (_step(path) < step, _step(path)))
    kept = {newest, best} - {None}
    for path in others[: max(len(others) + len(kept) - most, 0)]:
        retired = staging_path(path)
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(path, retired)
        shutil.rmtree(retired, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
