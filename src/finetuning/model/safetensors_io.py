"""Read the headers of safetensors files: names, dtypes, shapes and offsets, without the weights and without torch.

Format: https://github.com/huggingface/safetensors#format. The file starts with the header's length as a little-endian
uint64, then the header as JSON, then the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetuning.errors import ModelError, read_json_object, reading

SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
SAFE_WEIGHTS_NAME = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
ADDED_TOKENS_FILE = "added_tokens_info.json"
"""How many tokens a fine-tuned model has in addition to its base; the file format is fms-hf-tuning's."""
UNTRAINED_TOKENS_FILE = "untrained_tokens.json"
"""Tokens added to an extended base model whose embedding rows are untrained: an adapter on it has to train them."""

_IN_LAYER = re.compile(r"(?P<layer>.*?\.\d+)\.(?P<part>.+)$")
# Same limit as the safetensors library's.
_MAX_HEADER_BYTES = 100_000_000
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: its dtype as safetensors spells it, its shape, and the position of its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte from the start of the file."""
    stop: int
    """Offset after the last byte."""

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a file by name.

    Raises:
        ModelError: the file is missing, truncated, or not in safetensors format.
    """
    if not file.is_file():
        raise ModelError(f"{file} is missing")
    with reading(f"{file} is not a valid safetensors file"):
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"its header of {length} bytes does not fit into the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        # Offsets in the header are relative to the first byte after it.
        base = 8 + length
        entries = {
            name: TensorEntry(
                file, item["dtype"], _integers(item["shape"]), *(base + at for at in _integers(item["data_offsets"]))
            )
            for name, item in header.items()
        }
    end = max((entry.stop for entry in entries.values()), default=base)
    if end > size:
        raise ModelError(f"{file} is truncated: it has {size} of {end} bytes")
    for name, entry in entries.items():
        bits = _BITS.get(entry.dtype)
        if bits is not None and math.prod(entry.shape) * bits // 8 != entry.num_bytes:
            raise ModelError(f"{file} is damaged: the size of {name} does not match its shape {list(entry.shape)}")
    return entries


def _integers(values: object) -> tuple[int, ...]:
    """Return a list of a header as sizes; json accepts anything there."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"expected a list of sizes, found {str(values)[:60]}")
    return tuple(values)


def read_model_headers(folder: Path) -> dict[str, TensorEntry]:
    """Return all tensors of a model by name, from a single file or the shards in its index.

    Raises:
        ModelError: a file is missing or damaged, or no shard has a tensor that the index lists.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return read_header(folder / SAFE_WEIGHTS_NAME)
    weight_map = _read_weight_map(index)
    missing = sorted(name for name in set(weight_map.values()) if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{folder} is incomplete: {SAFE_WEIGHTS_INDEX_NAME} lists {', '.join(missing)}, which is missing"
        )
    entries: dict[str, TensorEntry] = {}
    for name in sorted(set(weight_map.values())):
        entries |= read_header(folder / name)
    absent = sorted(set(weight_map) - set(entries))
    if absent:
        raise ModelError(
            f"{folder} is damaged: {SAFE_WEIGHTS_INDEX_NAME} lists {', '.join(absent[:5])}, which none of its shards"
            " contains"
        )
    return entries


def _read_weight_map(index: Path) -> Mapping[str, str]:
    with reading(f"{index} cannot be read"):
        weight_map = read_json_object(index)["weight_map"]
        # A path from an untrusted index must not reach files elsewhere.
        if any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("it lists files outside its folder")
        return weight_map


def shared_by_layers(names: Iterable[str], stored: Collection[str]) -> list[str]:
    """Return the tensors that a model's files have for another layer only, because all layers share them (Zamba).

    A layer that the model does not have at all is not shared.
    """
    matches = [match for name in stored if (match := _IN_LAYER.match(name))]
    layers, parts = {match["layer"] for match in matches}, {match["part"] for match in matches}
    missing = [match for name in names if name not in stored and (match := _IN_LAYER.match(name))]
    return [match.group() for match in missing if match["layer"] in layers and match["part"] in parts]
