"""Compare the weights that FSDP2 saves in a checkpoint with the shards in memory, in each process by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from finetuning.model.peft.adapter_files import adapter_state_dict, is_peft_model
from finetuning.model.saved_weights import is_equal

# The names that accelerate gives them: of FULL_STATE_DICT, the default, and of SHARDED_STATE_DICT.
_GATHERED_FILE = "pytorch_model_fsdp.bin"
_SHARDED_FOLDER = "pytorch_model_fsdp_0"
_MAX_BATCH_BYTES = 1 << 28


def compare_sharded_weights(model: nn.Module, checkpoint: Path) -> list[str]:
    """Return how this process's shards differ from the weights in a checkpoint; [] if they are equal.

    A process on another machine than the files compares nothing.

    Args:
        model: a model or adapter that FSDP2 has sharded.
    """
    file, folder = checkpoint / _GATHERED_FILE, checkpoint / _SHARDED_FOLDER
    if file.is_file():
        # accelerate saves what is trained of an adapter's model, under the names in memory.
        options = StateDictOptions(ignore_frozen_params=is_peft_model(model))
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return _compare_gathered(_tensors(get_model_state_dict(model, options=options)), saved, file)
    if (folder / ".metadata").is_file():
        weights = adapter_state_dict(model) if is_peft_model(model) else get_model_state_dict(model)
        return _compare_sharded(_tensors(weights), folder)
    return []


def _tensors(state_dict: Mapping[str, object]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}


def _compare_gathered(weights: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    missing = sorted(weights.keys() - saved.keys())
    if missing:
        return [f"{file.name}: {len(missing)} of {len(weights)} tensors are missing, such as {missing[0]}"]
    differing = [
        name for name, weight in weights.items() if not is_equal(_local(weight), _own_part(weight, saved[name]))
    ]
    return _describe(differing, len(weights), file)


def _compare_sharded(weights: Mapping[str, torch.Tensor], folder: Path) -> list[str]:
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    stored = {name: metadata.get(f"model.{name}") for name in weights}
    missing = sorted(name for name, entry in stored.items() if not isinstance(entry, TensorStorageMetadata))
    if missing:
        return [f"{folder.name}: {len(missing)} of {len(weights)} tensors are missing, such as {missing[0]}"]
    # Loading converts to the dtype in memory.
    differing = [
        name
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and entry.properties.dtype != weights[name].dtype
    ]
    for names in _batches(weights):
        loaded = {name: torch.empty_like(weights[name]) for name in names}
        load({"model": loaded}, storage_reader=FileSystemReader(folder), no_dist=True)
        differing += [name for name in names if not is_equal(_local(weights[name]), _local(loaded[name]))]
    return _describe(differing, len(weights), folder)


def _batches(weights: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield the names in batches of limited size: each batch reads the metadata again."""
    batch: list[str] = []
    num_bytes = 0
    for name, weight in weights.items():
        batch.append(name)
        num_bytes += _local(weight).nbytes
        if num_bytes >= _MAX_BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _own_part(weight: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return the part of a whole tensor that this process holds as its shard of `weight`."""
    if not isinstance(weight, DTensor) or whole.shape != weight.shape:
        return whole
    if weight.to_local().numel() == 0:
        return whole.new_empty(weight.to_local().shape)
    (chunk,) = weight.__create_chunk_list__()
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def _describe(differing: list[str], num_tensors: int, path: Path) -> list[str]:
    if not differing:
        return []
    names = ", ".join(sorted(differing)[:3])
    return [f"{path.name}: {len(differing)} of {num_tensors} tensors differ from those in memory, such as {names}"]
