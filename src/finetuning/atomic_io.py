"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.errors import StorageError

MANIFEST = "manifest.json"
_PREFIX, _MARK = ".", ".partial"
_LITTLE_ROOM = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**20


def staging_path(target: Path) -> Path:
    """Where a directory is put together before it takes its name: beside it, so that a rename is enough."""
    return target.with_name(f"{_PREFIX}{target.name}{_MARK}")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that becomes `target` when the block ends well, and is removed when it does not.

    Raises:
        StorageError: `target` exists and is not empty; what was published is never overwritten.
    """
    require_empty(target)
    staging = staging_path(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def require_empty(target: Path) -> None:
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
            fsync(file)
        fsync(folder)
    if target.is_dir():
        target.rmdir()
    os.rename(staging, target)
    fsync(target.parent)


def write_manifest(folder: Path) -> None:
    """`manifest.json` into a folder: the size and the digest of every file in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sampled_sha256": _digest(path)}
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def find_manifest_mismatch(folder: Path) -> str | None:
    """How a folder differs from its manifest; None when it does not, or has none."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, {entry['bytes']:,} were written"
        if _digest(file) != entry["sampled_sha256"]:
            return f"{name} is not what was written"
    return None


def _digest(file: Path) -> str:
    """SHA-256 of a file of up to 64 MiB; of a larger one, of 64 pieces of 1 MiB spread over it, the ends among them.

    A checkpoint of hundreds of gigabytes is checked in seconds so; the sizes, which are checked too, tell what was
    cut off or copied by half.
    """
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as stream:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for index in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def remove_staging_directories(folder: Path) -> list[Path]:
    """Staging folders that a killed process left in `folder`; removed."""
    leftovers = [path for path in folder.glob(f"{_PREFIX}*{_MARK}") if path.is_dir()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a write failed for want of room on the folder's disk.

    Libraries that write tensors hide the system's error in one of their own; then the room that is left tells.
    """
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return True
    writes_tensors = "iostream" in str(error) or "file write" in str(error) or "unexpected pos" in str(error)
    return "No space left" in str(error) or (writes_tensors and shutil.disk_usage(folder).free < _LITTLE_ROOM)


def fsync(path: str | Path) -> None:
    """Brings a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
