"""Write safetensors files tensor by tensor, without torch and without the whole model in memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from finetuning.errors import StorageError, reading
from finetuning.model.safetensors_io import TensorEntry

_CHUNK_BYTES = 8 << 20
_ALIGNMENT = 8


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: its entry in the header, and a function that writes its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    write: Callable[[BinaryIO], None]


def copied_tensor(name: str, entry: TensorEntry) -> OutputTensor:
    """Return a tensor with the bytes of `entry`, under any name."""

    def write(stream: BinaryIO) -> None:
        for chunk in read_chunks(entry):
            stream.write(chunk)

    return OutputTensor(name, entry.dtype, entry.shape, entry.num_bytes, write)


def read_chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in chunks. The buffer is reused: a chunk is valid until the next one is requested."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(entry.num_bytes, 1))))
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        left = entry.num_bytes
        while left:
            chunk = buffer[: min(left, len(buffer))]
            _fill(chunk, stream, entry.file)
            yield chunk
            left -= len(chunk)


def read_into(entry: TensorEntry, buffer: memoryview) -> None:
    """Read the bytes of a tensor into a buffer of its size."""
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        _fill(buffer, stream, entry.file)


def _fill(buffer: memoryview, stream: FileIO, file: Path) -> None:
    position = 0
    # An unbuffered read may return less than was requested.
    while position < len(buffer):
        count = stream.readinto(buffer[position:])
        if not count:
            raise StorageError(f"{file} was truncated while it was read")
        position += count


def same_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(left == right for left, right in zip(read_chunks(first), read_chunks(second), strict=True))


def read_metadata(file: Path) -> dict[str, str]:
    """Return the `__metadata__` of a safetensors file."""
    with reading(f"{file} is not a valid safetensors file"), file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(min(length, file.stat().st_size))).get("__metadata__") or {}


def write_tensor_file(file: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the tensors in the given order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    # The data must start at a multiple of 8 bytes, so the header is padded with spaces.
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
    """Raise StorageError if the disk of `folder`, which need not exist yet, has less free space than `num_bytes`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    disk = os.statvfs(existing)
    free = disk.f_bavail * disk.f_frsize
    if free < num_bytes:
        raise StorageError(
            f"not enough disk space: {existing} has {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB are needed.",
            hint="Free some space, or choose another output directory.",
        )
