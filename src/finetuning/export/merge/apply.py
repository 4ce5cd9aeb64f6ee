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

import numpy as np
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
# BLAS kernels sum in an order that depends on the position of a row or a column within a tile of 16 to 64 of them.
# Blocks that start at a multiple of all of these (192) get the same bits as one product of the whole matrix.
_TILE = 192
# A block in float32, its rounded copy and the weight's together fit the 2 MB of a core's cache.
_BLOCK_ROWS, _BLOCK_COLUMNS = _TILE, 4 * _TILE
_COUNTED_EVERY = 4
"""One block of so many is counted, which is a large enough sample."""


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
        """Add a block of elements.

        Args:
            changed: not zero where an element changes before rounding.
            before: the elements before the merge, in a dtype of 16 bits.
            after: the elements after the merge.
        """
        # numpy compares and counts ten times as fast as torch. It has no bfloat16, but different values are different
        # 16-bit integers.
        bits_before, bits_after = (values.detach().cpu().view(torch.int16).numpy() for values in (before, after))
        self.changed += int(np.count_nonzero(changed.detach().cpu().numpy() != 0))
        self.surviving += int(np.count_nonzero(bits_before != bits_after))


def is_rounded(dtype: torch.dtype) -> bool:
    """Whether a merge into this dtype rounds off much: in float32, only changes of a ten-millionth are lost."""
    return dtype in (torch.bfloat16, torch.float16)


def load_tensor(entry: TensorEntry, memory: torch.Tensor | None = None, *, keep_cached: bool = True) -> torch.Tensor:
    """Read a tensor, into the first bytes of `memory` (uint8) if it is given, else into new memory.

    Args:
        keep_cached: whether its bytes stay in the page cache.

    Raises:
        ModelError: its dtype cannot be merged, such as float8.
    """
    if entry.dtype not in DTYPES:
        raise ModelError(f"{entry.file} has tensors of dtype {entry.dtype}, which cannot be merged")
    raw = torch.empty(entry.num_bytes, dtype=torch.uint8) if memory is None else memory[: entry.num_bytes]
    read_into(entry, raw.numpy().data, keep_cached=keep_cached)
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
        if not is_finite(weight):
            raise ModelError(f"{name} is not finite after the merge: the adapter or the base is damaged")
    return weight


def _add_lora(weight_OI: torch.Tensor, update: LowRankUpdate, elements: ChangedElements | None) -> None:
    a_rI, b_Or = _load_upcast(update.a), _load_upcast(update.b)
    # The weight is (I, O) if the update is transposed. Then the product is computed as PEFT does, and transposed
    # afterwards, to get the same bits.
    whole_IO = torch.mm(b_Or, a_rI).mul_(update.scaling).t() if update.transposed else None
    # Reused by the blocks: memory that is allocated for each of them leaves the cache.
    memory = torch.empty(4 * _BLOCK_ROWS * _BLOCK_COLUMNS, dtype=a_rI.dtype)
    rounded = memory if memory.dtype == weight_OI.dtype else torch.empty_like(memory, dtype=weight_OI.dtype)
    for index, (rows, columns) in enumerate(_blocks(weight_OI)):
        block = weight_OI[rows, columns]
        delta = memory[: block.numel()].view(block.shape)
        if whole_IO is not None:
            delta.copy_(whole_IO[rows, columns])
        else:
            torch.mm(b_Or[rows], a_rI[:, columns], out=delta).mul_(update.scaling)
        before = block.clone() if elements is not None and index % _COUNTED_EVERY == 0 else None
        block.add_(rounded[: block.numel()].view(block.shape).copy_(delta) if rounded is not memory else delta)
        if elements is not None and before is not None:
            elements.count(delta, before, block)


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
    for rows in _parts(len(weight), _BLOCK_ROWS):
        updated_OI = weight[rows] + delta[rows]
        factor_O1 = (magnitude[rows] / torch.linalg.norm(updated_OI, dim=1)).view(-1, 1)
        weight[rows].copy_((factor_O1 * updated_OI).to(weight.dtype))


def _load_upcast(entry: TensorEntry) -> torch.Tensor:
    """Read an adapter's tensor in float32, as PEFT loads it; float64 stays."""
    tensor = load_tensor(entry)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _blocks(weight: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of rows and columns, of less than twice the size of a block in each direction."""
    for rows in _parts(weight.shape[0], _BLOCK_ROWS):
        for columns in _parts(weight.shape[1], _BLOCK_COLUMNS):
            yield rows, columns


def _parts(length: int, step: int) -> Iterator[slice]:
    """Yield slices of a dimension; the last one takes the remainder, so that none is smaller than a tile."""
    start = 0
    while start < length:
        stop = start + step if length - start >= 2 * step else length
        yield slice(start, stop)
        start = stop


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # Minimum and maximum are NaN or infinite if any element is, and take a tenth of the time of isfinite().all().
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
