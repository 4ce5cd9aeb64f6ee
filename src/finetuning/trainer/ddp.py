"""What the processes of a data-parallel run exchange at each step: gradients, and nothing that is not needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from finetuning.model.peft.adapters import peft_type_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

MAX_DEFERRED_WEIGHTS = 2**27
"""Up to this many trained weights, gradients are reduced after the backward pass; above, DDP overlaps the two."""
_CHUNK_BYTES = 64 * 2**20
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def set_ddp_defaults(args: TrainingArguments, model: nn.Module) -> None:
    """Turn off what DistributedDataParallel would do at each step without need, unless the user set it."""
    if args.ddp_find_unused_parameters is None and uses_all_weights(model):
        args.ddp_find_unused_parameters = False
    if args.ddp_broadcast_buffers is None:
        # The buffers of language models are constants; every process has computed the same ones.
        args.ddp_broadcast_buffers = False


def use_bucket_views(arguments: dict[str, object]) -> dict[str, object]:
    """Let gradients be views of the buffers that DistributedDataParallel reduces, instead of copies of the same size.

    Args:
        arguments: those of accelerate's `Accelerator`.
    """
    handlers: Any = arguments.get("kwargs_handlers") or ()
    for handler in handlers:
        if isinstance(handler, DistributedDataParallelKwargs):
            handler.gradient_as_bucket_view = True
    return arguments


def defers_gradients(model: nn.Module) -> bool:
    """Return whether gradients can be reduced once all are computed, so that no process waits inside a pass."""
    return (
        isinstance(model, DistributedDataParallel)
        and not model.broadcast_buffers
        and sum(weight.numel() for weight in model.parameters() if weight.requires_grad) <= MAX_DEFERRED_WEIGHTS
    )


def uses_all_weights(model: nn.Module) -> bool:
    """Return whether every trained weight certainly takes part in every batch.

    True for text-only language models without experts and layer drop, fully fine-tuned or with LoRA.
    """
    adapters = getattr(model, "peft_config", {}).values()
    base = model.get_base_model() if adapters else model  # pyright: ignore[reportCallIssue]
    config = getattr(base, "config", None)
    if config is None or getattr(config, "sub_configs", None):
        return False
    return (
        all(peft_type_of(adapter) == "LORA" for adapter in adapters)
        and not any(getattr(config, name, None) for name in _EXPERTS)
        and not any(value for name, value in vars(config).items() if name.endswith("layerdrop"))
    )


def average_gradients(weights: Iterable[nn.Parameter], world_size: int) -> None:
    """Set each gradient to its mean over all processes. Collective: same weights in the same order everywhere.

    A gradient that a process lacks counts as zeros; a weight without a gradient on any process keeps none.
    """
    trained = list(weights)
    has_gradient = torch.tensor([weight.grad is not None for weight in trained], dtype=torch.uint8)
    has_gradient = has_gradient.to(trained[0].device)
    torch.distributed.all_reduce(has_gradient, op=torch.distributed.ReduceOp.MAX)
    gradients = []
    for weight, is_used in zip(trained, has_gradient.tolist(), strict=True):
        if is_used:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
    for chunk in _chunks(gradients):
        # Divide before the sum, as DDP does, so that the sum cannot overflow half precision.
        flattened = torch.cat([gradient.flatten() for gradient in chunk]).div_(world_size)
        torch.distributed.all_reduce(flattened)
        for gradient, mean in zip(chunk, flattened.split([gradient.numel() for gradient in chunk]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _chunks(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the gradients in order, in groups of one dtype and at most `_CHUNK_BYTES`."""
    chunk: list[torch.Tensor] = []
    for gradient in gradients:
        num_bytes = sum(tensor.numel() for tensor in [*chunk, gradient]) * gradient.element_size()
        if chunk and (gradient.dtype != chunk[0].dtype or num_bytes > _CHUNK_BYTES):
            yield chunk
            chunk = []
        chunk.append(gradient)
    if chunk:
        yield chunk
