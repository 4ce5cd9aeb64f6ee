"""Summed cross-entropy at the labels of a batch, without the logits of all of them in memory at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from finetuning.trainer.hooks import select_head_input

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx
    from transformers.utils.generic import ModelOutput

logger = logging.getLogger(__name__)


class ChunkedCrossEntropy:
    """Compute the loss of large batches without holding all their logits.

    Where the head is a plain linear layer, the gradients of a chunk are computed together with its loss
    (`FusedLinearCrossEntropy`). Any other head is called as a module, so an adapter, quantized weights and autocast
    work as they do without chunks; its logits are recomputed in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        labels_per_chunk: int,
        unsupported: str | None,
        *,
        fused: bool = False,
        is_checked: bool = False,
    ):
        """
        Args:
            unsupported: why this run cannot compute logits in chunks; None when it can.
            fused: compute gradients together with the loss where the head is plain: faster on a GPU, and rounded in
                another way.
            is_checked: whether the model is known to return what its head does.
        """
        self._model: Any = model
        self._labels_per_chunk = labels_per_chunk
        self._unsupported = unsupported
        self._fused = fused
        self._is_checked = is_checked
        if unsupported:
            self._warn()

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        targets: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[ModelOutput, torch.Tensor] | None:
        """Return the model's outputs without logits and the loss summed over the labels; None where it is unsupported.

        Args:
            model: the model as the trainer wraps it.
            targets: shape (labels,), token ids.
            positions: shape (labels,), the positions of the labels in the flattened batch.
        """
        if not self._is_supported(inputs):
            return None
        with self._replaced_logits(targets, positions):
            outputs = model(**inputs)
        total = outputs.logits.sum()
        outputs.logits = None
        return outputs, total

    @contextmanager
    def _replaced_logits(self, targets: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
        """Replace the logits of a forward pass in the block by the losses at the labels."""
        head = self._head()
        hidden_states: list[torch.Tensor] = []

        # The model's forward gets one position through the head, and this replaces its output by the losses.
        def keep_hidden_states(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            hidden_states.append(arguments[0].flatten(0, -2).index_select(0, positions.to(arguments[0].device)))
            return (hidden_states[0][:1],)

        def replace_output(module: nn.Module, arguments: object, logits: torch.Tensor) -> torch.Tensor:
            # Before the chunks are computed, because they call the same module.
            pre_hook.remove()
            hook.remove()
            labels = targets.to(hidden_states[0].device)
            if self._fused and _is_plain(module):
                return _fused_loss(module, hidden_states[0], labels, self._labels_per_chunk)[None, None]
            return _chunked_losses(module, hidden_states[0], labels, self._labels_per_chunk)

        pre_hook = head.register_forward_pre_hook(keep_hidden_states)
        hook = head.register_forward_hook(replace_output)
        try:
            yield
        finally:
            pre_hook.remove()
            hook.remove()

    def _head(self) -> nn.Module:
        base = self._model.get_base_model() if getattr(self._model, "peft_config", None) else self._model
        return base.get_output_embeddings()

    def _is_supported(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        if not self._is_checked:
            self._is_checked = True
            if self._unsupported is None and not self._logits_are_head_output(inputs):
                self._unsupported = "the model transforms the output of its head"
            if self._unsupported:
                self._warn()
        return self._unsupported is None

    def _warn(self) -> None:
        self._is_checked = True
        logger.warning("computing the logits of all labels at once: %s", self._unsupported)

    def _logits_are_head_output(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the model returns what its head does, without scaling or capping, for the first position."""
        head = self._head()
        if head is None:
            return False
        head_outputs: list[torch.Tensor] = []

        def keep_output(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
            head_outputs.append(output)

        first = torch.zeros(1, dtype=torch.int64, device=inputs["input_ids"].device)
        hook = head.register_forward_hook(keep_output)
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), select_head_input(head, first):
                logits = self._model(**inputs).logits
        finally:
            hook.remove()
            self._model.train(was_training)
        return len(head_outputs) == 1 and torch.equal(head_outputs[0].float().flatten(), logits.float().flatten())


def _chunked_losses(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, per_chunk: int) -> torch.Tensor:
    """Return the loss of each label, float32 of shape (1, labels).

    Args:
        hidden: input of the head, shape (labels, hidden size).
        targets: shape (labels,), token ids.
    """

    def losses(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(states).flatten(0, -2).float()
        return cross_entropy(logits, labels.to(logits.device), reduction="none")

    chunks = zip(hidden.split(per_chunk, dim=-2), targets.split(per_chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses(*chunk) for chunk in chunks])[None]
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])[None]  # pyright: ignore[reportArgumentType]


def _is_plain(head: nn.Module) -> bool:
    """Return whether a head is a linear layer with a weight in a floating-point dtype, whole on this process."""
    weight = getattr(head, "weight", None)
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and isinstance(weight, torch.Tensor)
        and not isinstance(weight, DTensor)
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.numel() == head.in_features * head.out_features
    )


def _fused_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, per_chunk: int) -> torch.Tensor:
    """Return the loss summed over the labels, float32, computed in the dtype that the head computes in."""
    assert isinstance(head, nn.Linear)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        total = FusedLinearCrossEntropy.apply(hidden.to(dtype), head.weight.to(dtype), bias, targets, per_chunk)
    assert isinstance(total, torch.Tensor)
    return total


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear layer, whose gradients are computed with the loss, a chunk of labels at a time.

    Nothing is recomputed in the backward pass: it scales the gradients. `torch.nn.functional.linear_cross_entropy`
    (torch 2.13) does the same, but adds up the losses of bfloat16 inputs in bfloat16, which has three digits.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        per_chunk: int,
    ) -> torch.Tensor:
        """Return the loss, float32.

        Args:
            hidden: (labels, hidden size).
            weight: (vocabulary, hidden size).
            bias: (vocabulary,), or None.
            targets: (labels,), token ids.
            per_chunk: labels whose logits are in memory at once.
        """
        needs: tuple[bool, ...] = ctx.needs_input_grad  # pyright: ignore[reportAttributeAccessIssue]
        for_hidden = torch.empty_like(hidden) if needs[0] else None
        # Sums over chunks are kept in float32.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), per_chunk):
            chunk = slice(start, start + per_chunk)
            states, labels = hidden[chunk], targets[chunk, None]
            logits = torch.nn.functional.linear(states, weight, bias).float()
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (normalizer - logits.gather(1, labels)).sum()
            # Source: the gradient of the cross-entropy is the softmax, minus 1 at the target.
            slopes = logits.sub_(normalizer).exp_()
            slopes.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=slopes.dtype))
            if for_bias is not None:
                for_bias += slopes.sum(0)
            slopes = slopes.to(weight.dtype)
            if for_hidden is not None:
                torch.mm(slopes, weight, out=for_hidden[chunk])
            if for_weight is not None:
                for_weight += slopes.t() @ states
        gradients: Any = (
            for_hidden,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None or bias is None else for_bias.to(bias.dtype),
        )
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if saved is None else saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*scaled, None, None)
