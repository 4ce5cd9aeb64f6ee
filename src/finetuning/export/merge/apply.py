"""Apply an adapter's deltas to one tensor, bit-identical to PEFT's safe merge, in blocks that fit the CPU cache.

The order of roundings matters for identical bits. PEFT casts 16-bit adapters to float32 when it loads them. So a delta
is computed in float32, rounded to the base's dtype, and then added in the base's dtype. DoRA's normalization mixes a
base weight in its own dtype with a float32 delta, which promotes to float32, and rounds once at the end.
Source: peft 0.21, tuners/lora/layer.py (merge, get_delta_weight), tuners/lora/variants.py (DoRA),
tuners/trainable_tokens/layer.py (merge). tests/export/test_merge.py compares the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetuning.errors import ModelError
from finetuning.export.merge.deltas import BiasUpdate, LowRankUpdate, ReplaceRows, ReplaceWeight, WeightDelta
from finetuning.export.safetensors_writer import read_into
from finetuning.model.safetensors_io import TensorEntry

# Suffixes of tensor names: r rank, O out_features, I in_features.

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
# BLAS kernels sum in an order that depends on the position of a row within a tile of 16 to 64 rows. Blocks that start
# at a multiple of all of these (192) get the same bits as one product of the whole matrix.
_TILE_ROWS = 192
# Counting takes as long as adding: a quarter of the blocks is a large enough sample.
_COUNTED_EVERY = 4


@dataclass
class ChangedElements:
    """How many elements of the base an adapter changes, and how many still differ after rounding to its dtype.

    Counted in a quarter of the blocks of large tensors.
    """

    changed: int = 0
    surviving: int = 0

    @property
    def surviving_share(self) -> float | None:
        """The share that survives rounding; None where no element was counted."""
        return self.surviving / self.changed if self.changed else None

    def count(self, changed: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a block of elements: whether each changes before rounding, and its value before and after the merge."""
        self.changed += int(torch.count_nonzero(changed))
        self.surviving += int(torch.count_nonzero(before != after))


def is_rounded(dtype: torch.dtype) -> bool:
    """Whether a merge into this dtype rounds off much: in float32, only changes of a ten-millionth are lost."""
    return dtype in (torch.bfloat16, torch.float16)


def load_tensor(entry: TensorEntry, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor, into the first bytes of `memory` (uint8) if it is given, else into new memory.

    Raises:
        ModelError: its dtype cannot be merged, such as float8.
    """
    if entry.dtype not in DTYPES:
        raise ModelError(f"{entry.file} has tensors of dtype {entry.dtype}, which cannot be merged")
    raw = torch.empty(entry.num_bytes, dtype=torch.uint8) if memory is None else memory[: entry.num_bytes]
    read_into(entry, raw.numpy().data)
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor as safetensors stores them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def apply_deltas(
    name: str, weight: torch.Tensor, deltas: Sequence[WeightDelta], elements: ChangedElements | None = None
) -> torch.Tensor:
    """Return the tensor with the deltas applied in order; `weight` is changed in place if its shape stays.

    Args:
        elements: counts what rounding loses of low-rank updates, if the tensor's dtype rounds off much.

    Raises:
        ModelError: the result is not finite.
    """
    if not is_rounded(weight.dtype):
        elements = None
    for delta in deltas:
        if isinstance(delta, ReplaceWeight):
            weight = load_tensor(delta.value).to(weight.dtype)
        elif isinstance(delta, ReplaceRows):
            weight.index_copy_(0, torch.tensor(delta.rows), load_tensor(delta.value).to(weight.dtype))
        elif isinstance(delta, BiasUpdate):
            weight = (weight + _load_upcast(delta.value) * delta.scaling).to(weight.dtype)
        elif delta.magnitude is not None:
            before = weight.clone() if elements is not None else weight
            _add_dora(weight, delta)
            if elements is not None:
                # DoRA rescales whole rows, which changes every element.
                elements.count(torch.ones_like(weight, dtype=torch.bool), before, weight)
        else:
            _add_lora(weight, delta, elements)
        _check_finite(name, weight)
    return weight


def _add_lora(weight_OI: torch.Tensor, update: LowRankUpdate, elements: ChangedElements | None) -> None:
    a_rI, b_Or = _load_upcast(update.a), _load_upcast(update.b)
    if update.transposed:
        # The weight is (I, O) here. The product is computed as PEFT does, then transposed, to get the same bits.
        delta_IO = torch.mm(b_Or, a_rI).mul_(update.scaling).t()
        for index, rows in enumerate(_blocks(weight_OI)):
            _add_block(weight_OI[rows], delta_IO[rows], elements if index % _COUNTED_EVERY == 0 else None)
        return
    scratch: torch.Tensor | None = None
    for index, rows in enumerate(_blocks(weight_OI)):
        b_block = b_Or[rows]
        if scratch is None or len(scratch) != len(b_block):
            scratch = torch.empty(len(b_block), a_rI.shape[1])
        torch.mm(b_block, a_rI, out=scratch).mul_(update.scaling)
        _add_block(weight_OI[rows], scratch, elements if index % _COUNTED_EVERY == 0 else None)


def _add_block(weight: torch.Tensor, delta: torch.Tensor, elements: ChangedElements | None) -> None:
    if elements is None:
        weight.add_(delta.to(weight.dtype))
        return
    before = weight.clone()
    weight.add_(delta.to(weight.dtype))
    elements.count(delta, before, weight)


def _add_dora(weight: torch.Tensor, update: LowRankUpdate) -> None:
    """Apply DoRA: W' = m * (W + scaling * BA) / ||W + scaling * BA||, with one norm per output feature.

    Source: Liu et al. (2024), DoRA, equation 5, https://arxiv.org/abs/2402.09353
    """
    assert update.magnitude is not None
    delta = torch.mm(_load_upcast(update.b), _load_upcast(update.a)).mul_(update.scaling)
    magnitude = _load_upcast(update.magnitude)
    if update.is_embedding:
        # PEFT takes the norm of an embedding per hidden dimension, over the whole vocabulary.
        updated = weight + delta.t()
        factor = (magnitude / torch.linalg.norm(weight.t() + delta, dim=1)).view(1, -1)
        weight.copy_((factor * updated).to(weight.dtype))
        return
    if update.transposed:
        factor = (magnitude / torch.linalg.norm(weight.t() + delta, dim=1)).view(-1, 1).t()
        weight.copy_((factor * (weight + delta.t())).to(weight.dtype))
        return
    for rows in _blocks(weight):
        updated_OI = weight[rows] + delta[rows]
        factor_O1 = (magnitude[rows] / torch.linalg.norm(updated_OI, dim=1)).view(-1, 1)
        weight[rows].copy_((factor_O1 * updated_OI).to(weight.dtype))


def _load_upcast(entry: TensorEntry) -> torch.Tensor:
    """Read an adapter's tensor in float32, as PEFT loads it; float64 stays."""
    tensor = load_tensor(entry)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension; the last one takes the remainder, so that none is smaller than a tile."""
    rows = len(weight)
    step = max(_TILE_ROWS, _BLOCK_ELEMENTS // max(weight[0].numel(), 1) // _TILE_ROWS * _TILE_ROWS)
    start = 0
    while start < rows:
        stop = start + step if rows - start >= 2 * step else rows
        yield slice(start, stop)
        start = stop


def _check_finite(name: str, weight: torch.Tensor) -> None:
    # Minimum and maximum are NaN or infinite if any element is, and take a tenth of the time of isfinite().all().
    lowest, highest = torch.aminmax(weight)
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise ModelError(f"{name} is not finite after the merge: the adapter or the base is damaged")
