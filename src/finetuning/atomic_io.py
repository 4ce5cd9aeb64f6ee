"""Write directories atomically: a reader sees the complete directory or none."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.errors import StorageError

MANIFEST = "manifest.json"
_PREFIX, _SUFFIX = ".", ".partial"
_MIN_FREE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**20


def staging_path(target: Path) -> Path:
    """Return the temporary name of a directory: in the same parent, so that a rename publishes it atomically."""
    return target.with_name(f"{_PREFIX}{target.name}{_SUFFIX}")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty staging directory that is renamed to `target` if the block succeeds and removed if it raises.

    Raises:
        StorageError: `target` exists and is not empty. Published directories are never overwritten.
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
    """Raise StorageError unless `target` is missing or an empty directory."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} exists and is not empty; choose another place or remove it")


def publish(staging: Path, target: Path) -> None:
    """Flush a staged directory to disk, set the file modes from the umask, and rename it to `target`.

    safetensors creates files that only their owner can read, which a server of another user could not load.
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
    """Write `manifest.json` with the size and the digest of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {path.relative_to(folder).as_posix(): _manifest_entry(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def update_manifest(folder: Path, names: Iterable[str]) -> None:
    """Record the files of these names again in the folder's manifest, if it has one; other entries stay."""
    file = folder / MANIFEST
    if not file.is_file():
        return
    entries = json.loads(file.read_text(encoding="utf-8"))
    entries |= {name: _manifest_entry(folder / name) for name in names}
    staging = staging_path(file)
    staging.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, file)


def _manifest_entry(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sampled_sha256": _digest(file)}


def find_manifest_mismatch(folder: Path) -> str | None:
    """Return how a folder differs from its manifest; None if it does not, or has no manifest."""
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
    """Return the SHA-256 of a file; above 64 MiB, that of 64 chunks of 1 MiB at equal distances, including both ends.

    This way a checkpoint of hundreds of gigabytes is checked in seconds. Truncated files are detected by their size.
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
    """Remove staging directories that a killed process left in `folder`, and return their paths."""
    leftovers = [path for path in folder.glob(f"{_PREFIX}*{_SUFFIX}") if path.is_dir()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Return whether a write failed because the disk or the quota is full.

    torch and safetensors raise errors of their own without an errno. For those the free space decides.
    """
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return True
    writes_tensors = "iostream" in str(error) or "file write" in str(error) or "unexpected pos" in str(error)
    return "No space left" in str(error) or (writes_tensors and shutil.disk_usage(folder).free < _MIN_FREE_BYTES)


def fsync(path: str | Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
