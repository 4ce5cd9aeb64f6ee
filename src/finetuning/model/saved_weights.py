"""Load saved weights into a model in memory, and compare the two value by value.

transformers renames and fuses weights when it loads a model (the experts of a layer become one tensor, say), and
reverts that when it saves. Names in memory and in the file are therefore different for many architectures. Loading goes
through `from_pretrained`, comparing through the conversion of `save_pretrained`: each is the other's check.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from finetuning.errors import CheckpointError
from finetuning.model.peft.adapter_files import (
    EMBEDDING_NAMES,
    adapter_state_dict,
    is_peft_model,
    live_lora_tensors,
    tensor_digest,
)
from finetuning.model.safetensors_io import (
    ADAPTER_WEIGHTS,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    TensorEntry,
    read_header,
    read_model_headers,
)

if TYPE_CHECKING:
    from torch import nn

_CHUNK_BYTES = 1 << 24
_SMALL_BYTES = 1 << 20
"""Comparing fewer bytes takes less time than handing them to a thread."""
_NUM_THREADS = min(8, os.cpu_count() or 1)
_MAX_SAMPLES = 1 << 16
_NUM_VALUES = 1 << 12

# Releases the interpreter's lock, so that threads compare in parallel.
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


def load_saved_weights(model: PreTrainedModel, folder: Path) -> None:
    """Replace all weights of a model by those in a folder that `save_pretrained` wrote for it.

    The weights are read on the CPU, and stay in the dtype and on the device that they have in the model.

    Raises:
        CheckpointError: the folder does not have each weight of the model, or has others.
    """
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    result: object = type(model).from_pretrained(
        folder,
        config=model.config,
        # float32 holds the values of every smaller dtype, so a model of several dtypes gets them all unchanged.
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        local_files_only=True,
        output_loading_info=True,
    )
    assert isinstance(result, tuple)
    loaded, info = result
    restore_padding_rows(loaded, folder)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(key):
            first = sorted(str(name) for name in info[key])[0]
            raise CheckpointError(f"cannot load {folder}: {len(info[key])} {key.replace('_', ' ')}, such as {first}")
    model.load_state_dict(loaded.state_dict(), strict=True)


def restore_padding_rows(model: PreTrainedModel, folder: Path) -> list[str]:
    """Copy the padding token's row of each embedding from a model's files, where loading has set it to zero.

    transformers initializes what the files lack. Some classes (Youtu) take the row for such a part of a loaded tensor.

    Returns:
        The names of the embeddings.
    """
    zeroed = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and _has_zero_padding_row(module)
    }
    entries = read_model_headers(folder) if zeroed else {}
    restored: list[str] = []
    for name, module in zeroed.items():
        entry, index = entries.get(name), module.padding_idx
        if entry is None or index is None or entry.shape != tuple(module.weight.shape):
            continue
        with safe_open(entry.file, framework="pt") as tensors, torch.no_grad():
            row = tensors.get_slice(name)[index : index + 1]
            if row.any():
                module.weight[index] = row[0].to(module.weight)
                restored.append(name)
    return restored


def _has_zero_padding_row(embedding: torch.nn.Embedding) -> bool:
    weight, index = embedding.weight, embedding.padding_idx
    # Under ZeRO-3 the weight of a shard is empty.
    has_row = index is not None and not weight.is_meta and weight.dim() == 2 and len(weight) > index
    return has_row and not bool(weight[index].any())


def tensors_as_saved(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a model or of its adapter under the names, and in the form, that they are saved in.

    Args:
        state_dict: the gathered weights of a sharded model; the model's own by default.
    """
    if is_peft_model(model):
        return adapter_state_dict(model, state_dict)
    weights = model.state_dict() if state_dict is None else state_dict
    if not isinstance(model, PreTrainedModel):
        return dict(weights)
    # Functions that `save_pretrained` calls in the same order. Both may change the dictionary they are given.
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {name: tensor for name, tensor in weights.items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))


def has_safetensors(folder: Path) -> bool:
    """Return whether the weights of a checkpoint are in safetensors files, and can be compared with memory."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_WEIGHTS))


def compare_with_files(
    model: nn.Module,
    folder: Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapters: Iterable[str] | None = None,
) -> list[str]:
    """Return how the weights in memory differ from those in a folder; [] if every name, dtype and value is equal.

    Reads the files tensor by tensor, through the page cache.

    Args:
        state_dict: the gathered weights of a sharded model; the model's own by default.
        adapters: names of the adapters to compare; the active one by default.

    Raises:
        ModelError: a safetensors file is missing or damaged.
    """
    if not is_peft_model(model):
        return compare_tensors(tensors_as_saved(model, state_dict), read_model_headers(folder))
    differences: list[str] = []
    for name in adapters or model.active_adapters[:1]:
        # PEFT writes the adapter "default" into the folder itself, and others into folders of their names.
        entries = read_header((folder if name == "default" else folder / name) / ADAPTER_WEIGHTS)
        expected = live_lora_tensors(model, name) if state_dict is None else {}
        if entries.keys() != expected.keys():
            # The adapter has other tensors than LoRA's own, or the file does not have all of these.
            expected = adapter_state_dict(model, state_dict, adapter=name) | expected
        if any(_is_embedding(extra) for extra in entries.keys() - expected.keys()):
            # PEFT saves whole embeddings with an adapter that targets them, or whose base was resized.
            whole = adapter_state_dict(model, state_dict, adapter=name, embeddings=True)
            expected |= {extra: whole[extra] for extra in entries.keys() & whole.keys() if _is_embedding(extra)}
        differences += compare_tensors(expected, entries)
    return differences


def _is_embedding(name: str) -> bool:
    return any(part in name for part in EMBEDDING_NAMES)


def compare_tensors(expected: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return how tensors in memory differ from those in files; [] if every name, dtype and value is equal."""
    missing, extra = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    differing = sorted(_differing(expected, entries))
    differences: list[str] = []
    if missing:
        files = {entry.file.name for entry in entries.values()}
        where = files.pop() if len(files) == 1 else f"{len(files)} files"
        differences.append(f"{where}: {len(missing)} of {len(expected)} tensors are missing, such as {_some(missing)}")
    if extra:
        where = entries[extra[0]].file.name
        differences.append(f"{where}: {len(extra)} tensors are not the model's, such as {_some(extra)}")
    if differing:
        first = differing[0]
        with safe_open(entries[first].file, framework="pt") as tensors:
            how = _describe_difference(expected[first], tensors.get_tensor(first))
        what = f"{entries[first].file.name}: {len(differing)} of {len(expected)} tensors differ from those in memory"
        differences.append(f"{what}, such as {_some(differing)} (the first: {how})")
    return differences


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3])


def _differing(expected: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return the names in both whose dtype, shape or values are not equal."""
    files = sorted({entry.file for entry in entries.values()})
    return [name for file in files for name in _differing_in_file(file, expected, entries)]


def _differing_in_file(
    file: Path, expected: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]
) -> list[str]:
    with safe_open(file, framework="pt") as tensors:

        def differs(name: str) -> bool:
            return not is_equal(expected[name], tensors.get_tensor(name))

        names = [name for name in tensors.keys() if name in expected]  # noqa: SIM118 - safe_open is no mapping
        large = [name for name in names if entries[name].num_bytes > _SMALL_BYTES]
        differing = list(filter(differs, set(names).difference(large)))
        if large:
            with ThreadPoolExecutor(_NUM_THREADS) as threads:
                differing += [name for name, differ in zip(large, threads.map(differs, large), strict=True) if differ]
        return differing


def is_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits: NaN equals NaN, and 0.0 differs from -0.0.

    Compared on the CPU, piece by piece, so that a tensor on a GPU is not copied as a whole.
    """
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (first, second)):
        return _memcmp(first.data_ptr(), second.data_ptr(), first.nbytes) == 0
    pieces = zip(_bits(first).split(_CHUNK_BYTES), _bits(second).split(_CHUNK_BYTES), strict=True)
    return all(_same_bytes(left.cpu(), right.cpu()) for left, right in pieces)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    # torch.equal is 1.6 times as slow for 8-byte integers, and needs them aligned; for bytes it is 5 times as slow.
    return _memcmp(first.data_ptr(), second.data_ptr(), first.numel()) == 0


def _describe_difference(memory: torch.Tensor, saved: torch.Tensor) -> str:
    """Describe how a saved tensor differs from the one in memory."""
    if saved.dtype != memory.dtype:
        return f"{_name(saved.dtype)} instead of {_name(memory.dtype)}"
    if saved.shape != memory.shape:
        return f"shape {list(saved.shape)} instead of {list(memory.shape)}"
    if not saved.any():
        return "all values are zero"
    left, right = (tensor.detach().cpu().double() for tensor in (memory, saved))
    num_differing = int((left != right).sum())
    return f"{num_differing:,} of {saved.numel():,} values differ, by up to {float((left - right).abs().max()):.3g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_partitioned(weight: torch.Tensor) -> bool:
    """Return whether this process holds a part of a weight only, or none of it."""
    return hasattr(weight, "ds_shape") or weight.is_meta or isinstance(weight, DTensor)


def sampled_digests(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return a digest of at most 128 Ki values of each tensor, at equal distances, in float32; {} if they are sharded.

    Equal values have equal digests in every dtype that float32 can hold. The cost is bounded whatever the size.
    """
    if any(is_partitioned(tensor) for tensor in weights.values()):
        return {}
    # The distance is odd, so that the samples of a matrix are not all of the same columns.
    return {
        name: tensor_digest(tensor.detach().reshape(-1)[:: tensor.numel() // _MAX_SAMPLES | 1].float())
        for name, tensor in weights.items()
    }


def sample_matrices(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return 2048 to 4096 values of each matrix on the CPU, at equal distances; {} if the weights are sharded.

    Embeddings are left out, as only rows of tokens in the data are trained, and so are norms and biases.
    """
    if any(is_partitioned(tensor) for tensor in weights.values()):
        return {}
    return {name: _values(weight) for name, weight in weights.items() if weight.ndim > 1 and not _is_embedding(name)}


def changed_share(before: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> float | None:
    """Return the share of the values of `sample_matrices` that are different now; None if there are none."""
    pairs = [(values, _values(weights[name])) for name, values in before.items() if name in weights]
    total = sum(values.numel() for values, _ in pairs)
    return sum(int((values != now).sum()) for values, now in pairs) / total if total else None


def _values(weight: torch.Tensor) -> torch.Tensor:
    step = max(weight.numel() // _NUM_VALUES, 1) | 1
    return weight.detach().reshape(-1)[::step].float().cpu().clone()


def convert_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the floating-point weights of a model in place, except those that transformers keeps in float32."""
    plan = model._get_dtype_plan(dtype) if isinstance(model, PreTrainedModel) else {}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not any(kept in name for kept in plan):
            weight.data = weight.data.to(dtype)
