"""What the processes of a job share at each step: their gradients, and nothing that need not be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

MOST_WAITING = 2**27
"""Up to so many trained weights, gradients are shared after the backward pass; beyond, while it computes."""
_CHUNK_BYTES = 64 * 2**20
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


class SharingMixin:
    """Stands left of a transformers Trainer, and sets how DistributedDataParallel shares what it shares."""

    computes_alone = False
    """Whether the loss of a batch takes no word from the other processes."""

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        if self.args.ddp_find_unused_parameters is None and uses_every_weight(self.model):
            self.args.ddp_find_unused_parameters = False
        if self.args.ddp_broadcast_buffers is None:
            # Those of language models are constants: every process has computed the same.
            self.args.ddp_broadcast_buffers = False
        return super()._build_accelerator_args(**kwargs)

    def _gradients_wait(self, model: Any) -> bool:
        """Whether the gradients of a step are shared when all of them are there, so that no process waits for another
        in the middle of its forward or backward pass."""
        return (
            self.computes_alone
            and isinstance(model, DistributedDataParallel)
            and not model.broadcast_buffers
            and sum(weight.numel() for weight in model.parameters() if weight.requires_grad) <= MOST_WAITING
        )


def uses_every_weight(model: Any) -> bool:
    """Whether it is plain that every trained weight takes part in every batch: a language model of text alone, without
    experts, all of it or LoRA trained."""
    adapters = getattr(model, "peft_config", {}).values()
    base = model.get_base_model() if adapters else model
    config = getattr(base, "config", None)
    if config is None or getattr(config, "sub_configs", None):
        return False
    return (
        all(adapter.peft_type.value == "LORA" for adapter in adapters)
        and not any(getattr(config, name, None) for name in _EXPERTS)
        and not any(value for name, value in vars(config).items() if name.endswith("layerdrop"))
    )


def average_gradients(weights: Iterable[torch.nn.Parameter], world_size: int) -> None:
    """Gives each weight the mean of its gradients over all processes, a missing one counting as zeros; a weight that
    none has a gradient of keeps none. Every process calls this with the same weights in the same order."""
    trained = list(weights)
    has_gradient = torch.tensor([weight.grad is not None for weight in trained], dtype=torch.uint8)
    has_gradient = has_gradient.to(trained[0].device)
    torch.distributed.all_reduce(has_gradient, op=torch.distributed.ReduceOp.MAX)
    used = [weight for weight, has in zip(trained, has_gradient.tolist(), strict=True) if has]
    for weight in used:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    for chunk in _chunks([weight.grad for weight in used]):
        together = torch.cat([gradient.flatten() for gradient in chunk]).div_(world_size)
        torch.distributed.all_reduce(together)
        parts = together.split([gradient.numel() for gradient in chunk])
        for gradient, part in zip(chunk, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _chunks(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The gradients in their order, as many of one type at a time as a message holds."""
    chunk: list[torch.Tensor] = []
    for gradient in gradients:
        num_bytes = sum(one.numel() for one in [*chunk, gradient]) * gradient.element_size()
        if chunk and (gradient.dtype != chunk[0].dtype or num_bytes > _CHUNK_BYTES):
            yield chunk
            chunk = []
        chunk.append(gradient)
    if chunk:
        yield chunk
