"""safetensors files written tensor by tensor, without the whole in memory and without torch."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from finetuning.errors import StorageError
from finetuning.model.safetensors_io import TensorEntry

_CHUNK_BYTES = 8 << 20
_ALIGNMENT = 8


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written: what its header says, and what writes its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    write: Callable[[BinaryIO], None]


def copied_tensor(name: str, entry: TensorEntry) -> OutputTensor:
    """A tensor whose bytes are those of `entry`, under another name or the same."""

    def write(stream: BinaryIO) -> None:
        for chunk in read_chunks(entry):
            stream.write(chunk)

    return OutputTensor(name, entry.dtype, entry.shape, entry.num_bytes, write)


def read_chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of one tensor, piece by piece; a piece is valid until the next is asked for."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(entry.num_bytes, 1))))
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        left = entry.num_bytes
        while left:
            chunk = buffer[: min(left, len(buffer))]
            _fill(chunk, stream, entry.file)
            yield chunk
            left -= len(chunk)


def read_into(entry: TensorEntry, place: memoryview) -> None:
    """Fills `place`, which is as long as the tensor, with its bytes."""
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        _fill(place, stream, entry.file)


def _fill(place: memoryview, stream: FileIO, file: Path) -> None:
    at = 0
    while at < len(place):
        count = stream.readinto(place[at:])
        if not count:
            raise StorageError(f"{file} became shorter while it was read")
        at += count


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """True when two tensors have one number type, one shape and the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(mine == theirs for mine, theirs in zip(read_chunks(one), read_chunks(other), strict=True))


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself beside its tensors."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)).get("__metadata__") or {}


def write_tensor_file(file: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose tensors stand in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for tensor in tensors:
            tensor.write(stream)
        stream.flush()
        written = stream.tell()
    if written != 8 + len(text) + at:
        raise StorageError(f"{file} has {written} bytes instead of {8 + len(text) + at}")


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Nothing, or a StorageError when the disk under `folder` has no room for so many bytes.

    `folder` need not exist yet; its nearest parent that does is asked.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    disk = os.statvfs(existing)
    free = disk.f_bavail * disk.f_frsize
    if free < num_bytes:
        raise StorageError(
            f"{existing} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are needed.",
            hint="Free some space, or choose another output directory.",
        )
