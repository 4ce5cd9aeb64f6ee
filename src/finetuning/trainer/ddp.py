"""What the processes of a job share at each step: their gradients, and nothing that need not be.

The rows of a step, shared out by their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heapreplace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_pt_utils import BatchRebalanceSampler

MOST_WAITING = 2**27
"""Up to so many trained weights, gradients are shared after the backward pass; beyond, while it computes."""
_CHUNK_BYTES = 64 * 2**20
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


class DDPMixin:
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


def balanced_shares(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Positions of rows in so many shares of about as many tokens each, none of them empty while rows last.

    The longest row first, each to the share that holds least. Source: Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969: no share is larger than 4/3 of the largest that the best division has.

    >>> shares([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(number)]
    sizes = [(0, share) for share in range(number)]
    heapify(sizes)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size, share = sizes[0]
        found[share].append(row)
        heapreplace(sizes, (size + lengths[row], share))
    return found


class TokenBalancedSampler(BatchRebalanceSampler):
    """transformers' sampler for rows without padding: it counts what it shares out as padded, this one the tokens."""

    @classmethod
    def in_place_of(cls, other: BatchRebalanceSampler, seed: int) -> TokenBalancedSampler:
        """Steps of as many rows, drawn by this seed as accelerate draws them where nothing is shared out."""
        return cls(
            other.lengths,
            other.effective_batch_size,
            other.dp_size,
            other.grad_accum,
            shuffle=other.shuffle,
            seed=seed,
            rank=other.rank,
            drop_last=other.drop_last,
        )

    def _assign(self, indices: Sequence[int], lengths: Sequence[int]) -> list[list[list[int]]]:
        """Rows by process and by batch of the step; the largest shares are computed at one time."""
        found = balanced_shares(lengths, self.dp_size * self.grad_accum)
        found.sort(key=lambda share: -sum(lengths[row] for row in share))
        return [
            [[indices[row] for row in found[batch * self.dp_size + process]] for batch in range(self.grad_accum)]
            for process in range(self.dp_size)
        ]
