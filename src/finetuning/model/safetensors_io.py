"""safetensors files by their headers: what is in them, without reading the weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetuning.errors import ModelError

ADDED_TOKENS = "added_tokens_info.json"
"""How many tokens a tuned model has that its base has not."""
UNTRAINED_TOKENS = "untrained_tokens.json"
"""The tokens of a grown base whose rows are in no training yet: an adapter of it has to train them."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its number type as safetensors spells it, its shape, and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte from the beginning of the file."""
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name.

    Raises:
        ModelError: the file is not there, cut off, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"its header of {length} bytes does not fit into the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        entries = {
            name: TensorEntry(file, item["dtype"], tuple(item["shape"]), *(base + at for at in item["data_offsets"]))
            for name, item in header.items()
        }
    except FileNotFoundError:
        raise ModelError(f"{file} is missing") from None
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no whole safetensors file: {error}") from error
    end = max((entry.stop for entry in entries.values()), default=base)
    if end > size:
        raise ModelError(f"{file} is cut off: it has {size} bytes and its header speaks of {end}")
    for name, entry in entries.items():
        bits = _BITS.get(entry.dtype)
        if bits is not None and math.prod(entry.shape) * bits // 8 != entry.num_bytes:
            raise ModelError(f"{file} is damaged: the bytes of {name} do not fit its shape {list(entry.shape)}")
    return entries


def read_model_headers(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model by name, from one file or from the shards that its index names.

    Raises:
        ModelError: a file is missing or damaged, or a tensor that the index names is in no shard.
    """
    index = folder / INDEX
    if not index.is_file():
        return read_header(folder / SINGLE)
    weight_map = _read_index(index)
    missing = sorted(name for name in set(weight_map.values()) if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{folder} is incomplete: {INDEX} names {', '.join(missing)}, which is not there")
    entries: dict[str, TensorEntry] = {}
    for name in sorted(set(weight_map.values())):
        entries |= read_header(folder / name)
    absent = sorted(set(weight_map) - set(entries))
    if absent:
        raise ModelError(f"{folder} is damaged: {', '.join(absent[:5])} is in {INDEX} but in none of its files")
    return entries


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("it names files outside of its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from error
    return weight_map
