"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.errors import StorageError

_PREFIX, _MARK = ".", ".partial"


def staging_path(target: Path) -> Path:
    """Where a directory is put together before it takes its name: beside it, so that a rename is enough."""
    return target.with_name(f"{_PREFIX}{target.name}{_MARK}")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that becomes `target` when the block ends well, and is removed when it does not.

    Raises:
        StorageError: `target` exists and is not empty; what was published is never overwritten.
    """
    refuse_occupied(target)
    staging = staging_path(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_occupied(target: Path) -> None:
    """Nothing, or a StorageError when `target` holds something already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} exists and is not empty; choose another place or remove it")


def publish(staging: Path, target: Path) -> None:
    """Flush a staged folder to disk, give its files the modes that the umask asks for, and rename it to `target`.

    safetensors writes files that only their owner can read, which another user's server then cannot load.
    """
    umask = os.umask(0)
    os.umask(umask)
    for folder, _, names in os.walk(staging):
        for name in names:
            file = os.path.join(folder, name)
            os.chmod(file, 0o666 & ~umask)
            _flush(file)
        _flush(folder)
    if target.is_dir():
        target.rmdir()
    os.rename(staging, target)
    _flush(target.parent)


def remove_leftovers(folder: Path) -> list[Path]:
    """Staging folders that a killed process left in `folder`; removed."""
    leftovers = [path for path in folder.glob(f"{_PREFIX}*{_MARK}") if path.is_dir()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
