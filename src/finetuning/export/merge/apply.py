"""Edits carried out on one tensor, bit by bit as PEFT's safe merge does, in blocks that stay in the processor's cache.

PEFT raises an adapter of 16-bit numbers to float32 when it loads it, so each delta is computed in float32, rounded to
the base's dtype, and added there. Source: peft@0.21 tuners/lora/layer.py (merge, get_delta_weight), variants.py (DoRA),
tuners/trainable_tokens/layer.py (merge).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from finetuning.errors import ModelError
from finetuning.export.merge.deltas import BiasUpdate, LowRankUpdate, ReplaceRows, ReplaceWeight, WeightDelta
from finetuning.export.safetensors_writer import read_into
from finetuning.model.safetensors_io import TensorEntry

# r rank, O out_features, I in_features

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCK_ELEMENTS = 1 << 19
# Matrix kernels work in tiles of 16 to 64 rows; blocks that begin at a tile's edge get the bits of the whole product.
_TILE_ROWS = 192


def load_tensor(entry: TensorEntry, memory: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that an entry points to: in `memory`, bytes of which it takes the first, or in memory of its own.

    Raises:
        ModelError: its number type is none that can be merged.
    """
    if entry.dtype not in DTYPES:
        raise ModelError(f"{entry.file} holds numbers of type {entry.dtype}, which cannot be merged")
    raw = torch.empty(entry.num_bytes, dtype=torch.uint8) if memory is None else memory[: entry.num_bytes]
    read_into(entry, memoryview(raw.numpy()))
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as safetensors stores them."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def apply_deltas(name: str, weight: torch.Tensor, edits: Sequence[WeightDelta]) -> torch.Tensor:
    """The tensor after its edits; `weight` is changed in place where its shape allows.

    Raises:
        ModelError: the result is not finite.
    """
    for edit in edits:
        if isinstance(edit, ReplaceWeight):
            weight = load_tensor(edit.value).to(weight.dtype)
        elif isinstance(edit, ReplaceRows):
            weight.index_copy_(0, torch.tensor(edit.rows), load_tensor(edit.value).to(weight.dtype))
        elif isinstance(edit, BiasUpdate):
            weight = (weight + _load_upcast(edit.value) * edit.scaling).to(weight.dtype)
        elif edit.magnitude is not None:
            _add_dora(weight, edit)
        else:
            _add_lora(weight, edit)
        _check_finite(name, weight)
    return weight


def _add_lora(weight_OI: torch.Tensor, edit: LowRankUpdate) -> None:
    a_rI, b_Or = _load_upcast(edit.a), _load_upcast(edit.b)
    if edit.transposed:
        delta_IO = torch.mm(b_Or, a_rI).mul_(edit.scaling).t()
        for rows in _blocks(weight_OI):
            weight_OI[rows].add_(delta_IO[rows].to(weight_OI.dtype))
        return
    scratch: torch.Tensor | None = None
    for rows in _blocks(weight_OI):
        b_block = b_Or[rows]
        if scratch is None or len(scratch) != len(b_block):
            scratch = torch.empty(len(b_block), a_rI.shape[1])
        torch.mm(b_block, a_rI, out=scratch).mul_(edit.scaling)
        weight_OI[rows].add_(scratch.to(weight_OI.dtype))


def _add_dora(weight: torch.Tensor, edit: LowRankUpdate) -> None:
    """DoRA: each output's row of weight plus delta is brought to the trained length."""
    delta = torch.mm(_load_upcast(edit.b), _load_upcast(edit.a)).mul_(edit.scaling)
    magnitude = _load_upcast(edit.magnitude)
    if edit.is_embedding:
        # The length of an embedding is counted per hidden dimension, across the vocabulary.
        moved = weight + delta.t()
        factor = (magnitude / torch.linalg.norm(weight.t() + delta, dim=1)).view(1, -1)
        weight.copy_((factor * moved).to(weight.dtype))
        return
    if edit.transposed:
        factor = (magnitude / torch.linalg.norm(weight.t() + delta, dim=1)).view(-1, 1).t()
        weight.copy_((factor * (weight + delta.t())).to(weight.dtype))
        return
    for rows in _blocks(weight):
        moved_OI = weight[rows] + delta[rows]
        factor_O1 = (magnitude[rows] / torch.linalg.norm(moved_OI, dim=1)).view(-1, 1)
        weight[rows].copy_((factor_O1 * moved_OI).to(weight.dtype))


def _load_upcast(entry: TensorEntry) -> torch.Tensor:
    tensor = load_tensor(entry)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension; the last takes what is left, so that none is smaller than a tile."""
    rows = len(weight)
    step = max(_TILE_ROWS, _BLOCK_ELEMENTS // max(weight[0].numel(), 1) // _TILE_ROWS * _TILE_ROWS)
    start = 0
    while start < rows:
        stop = start + step if rows - start >= 2 * step else rows
        yield slice(start, stop)
        start = stop


def _check_finite(name: str, weight: torch.Tensor) -> None:
    # The extremes carry any value that is not finite, at a tenth of the price of looking at each.
    lowest, highest = torch.aminmax(weight)
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise ModelError(f"{name} is not finite after the merge; the adapter or the base is broken")
