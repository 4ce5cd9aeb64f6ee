"""Selective gradient checkpointing: keep what is dear to compute in relation to its size, and recompute the rest.

Of a decoder layer these are the output of attention, and the results of the large matrix products. Norms, activation
functions, rotary embeddings and the products of LoRA are computed again in the backward pass. It needs about half of
the memory of no checkpointing, and about half of the time that full checkpointing adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from torch import Tensor

    from finetuning.trainer.data_dependence import Operator

_PRODUCTS = ("mm", "addmm", "gemm_4bit")
_ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention", "varlen_attn", "efficient_attention")
"""Parts of the names of operations: those of torch and of the FlashAttention packages."""
MIN_INNER_SIZE = 256
"""Products over fewer numbers are those of LoRA's B matrices: as large as a layer's output, and cheap."""


def selective_kwargs(kwargs: Mapping[str, object] | None) -> dict[str, object]:
    """Return the keyword arguments of `torch.utils.checkpoint.checkpoint` for selective checkpointing.

    Args:
        kwargs: those of the config, which are kept.
    """
    context = partial(create_selective_checkpoint_contexts, keep_or_recompute)
    return {**(kwargs or {}), "use_reentrant": False, "context_fn": context}


def keep_or_recompute(context: object, operation: Operator, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Return whether to keep the result of an operation until the backward pass.

    A product that is narrower than its input is not kept: the backward pass does not need the output of an MLP, and
    keys and values of grouped heads are cheap.
    """
    name = operation.name().rpartition("::")[2].partition(".")[0]
    if any(part in name for part in _ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    if name in _PRODUCTS:
        inner, outer = _sizes(name, args)
        if MIN_INNER_SIZE <= inner <= outer:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _sizes(name: str, args: Sequence[object]) -> tuple[int, int]:
    """Return the numbers of columns of the left matrix of a product, and of its result."""
    if name == "gemm_4bit":
        # bitsandbytes: the input, the packed weight, and the shape of the weight, (outputs, inputs).
        shape: Sequence[int] = args[2]  # pyright: ignore[reportAssignmentType]
        return shape[1], shape[0]
    left, right = args[-2:]
    matrices: tuple[Tensor, Tensor] = (left, right)  # pyright: ignore[reportAssignmentType]
    return matrices[0].shape[1], matrices[1].shape[1]
