"""Write directories atomically: a reader sees the complete directory or none."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from finetuning.errors import StorageError, reading

MANIFEST = "manifest.json"
_PREFIX, _SUFFIX = ".", ".partial"
_MIN_FREE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**20
_SUM_BLOCK_BYTES = 2**20
_SUM_SEGMENT_BYTES = 2**26
_SUM_THREADS = 4


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
    entries = digest_files(folder, (path for path in folder.rglob("*") if path.name != MANIFEST))
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def digest_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Return size and digest of the files among some paths in a folder, by their relative names."""
    return {path.relative_to(folder).as_posix(): _manifest_entry(path) for path in sorted(paths) if path.is_file()}


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
    size = file.stat().st_size
    entry: dict[str, int | str] = {"bytes": size, "sampled_sha256": _digest(file)}
    if size > _SAMPLES * _SAMPLE_BYTES:
        entry["sums_sha256"] = hashlib.sha256(block_sums(file, 0, size)).hexdigest()
    return entry


def find_manifest_mismatch(folder: Path, patterns: Iterable[str] = ()) -> str | None:
    """Return how a folder differs from its manifest; None if it does not.

    Args:
        patterns: files that match one of these must be listed: they are read, so an unlisted one is not trusted.
    """
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        with reading(f"{MANIFEST} cannot be read", StorageError):
            entries: object = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except StorageError:
        return f"{MANIFEST} cannot be read"
    if not isinstance(entries, dict) or not entries:
        return f"{MANIFEST} lists no files"
    try:
        for name, entry in entries.items():
            if (mismatch := _entry_mismatch(folder, name, entry)) is not None:
                return mismatch
        read = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    unlisted = sorted(read - set(entries))
    return f"{unlisted[0]} is not listed in {MANIFEST}" if unlisted else None


def _entry_mismatch(folder: Path, name: str, entry: object) -> str | None:
    file = folder / name
    if not isinstance(entry, Mapping) or not isinstance(size := entry.get("bytes"), int):
        return f"{MANIFEST} has no size of {name}"
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size:,} bytes, {size:,} were written"
    # Manifests of earlier versions have no sums.
    sums = entry.get("sums_sha256")
    if _digest(file) != entry.get("sampled_sha256") or (
        sums is not None and hashlib.sha256(block_sums(file, 0, size)).hexdigest() != sums
    ):
        return f"{name} is not what was written"
    return None


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file; above 64 MiB, that of 64 chunks of 1 MiB at equal distances, including both ends.

    This way a checkpoint of hundreds of gigabytes is hashed in seconds. `block_sums` covers the bytes in between.
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


def block_sums(file: Path, start: int, stop: int) -> bytes:
    """Return the sum of each MiB of a range of bytes in a file, as little-endian 64-bit words modulo 2^64.

    One changed value always changes its block's sum. Words that swap places within a MiB leave it as it is. The sums
    take about a quarter of the time of SHA-256, which makes it affordable to read every byte of a large file.
    """
    segments = [(begin, min(begin + _SUM_SEGMENT_BYTES, stop)) for begin in range(start, stop, _SUM_SEGMENT_BYTES)]
    if len(segments) <= 1:
        return b"".join(_segment_sums(file, *segment) for segment in segments)
    with ThreadPoolExecutor(_SUM_THREADS) as pool:
        return b"".join(pool.map(lambda segment: _segment_sums(file, *segment), segments))


def _segment_sums(file: Path, start: int, stop: int) -> bytes:
    import numpy as np

    buffer, sums = bytearray(_SUM_BLOCK_BYTES), bytearray()
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        for begin in range(start, stop, _SUM_BLOCK_BYTES):
            length = min(_SUM_BLOCK_BYTES, stop - begin)
            filled = 0
            with memoryview(buffer) as view:
                while filled < length and (count := stream.readinto(view[filled:length])):
                    filled += count
            # The last block ends with zeros up to a whole word.
            buffer[filled : -(-filled // 8) * 8] = bytes(-filled % 8)
            words = np.frombuffer(buffer, "<u8", -(-filled // 8))
            sums += int(words.sum(dtype=np.uint64)).to_bytes(8, "little")
    return bytes(sums)


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed, without waiting, for all processes of this machine.

    Returns:
        False if another process holds the lock, None if the file system has no locks (Lustre and NFS without `flock`).
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


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
