"""Summed cross-entropy whose logits are computed in chunks, and recomputed in the backward pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

logger = logging.getLogger(__name__)


class ChunkedCrossEntropy:
    """Compute the loss of large batches without holding all their logits.

    The head is called as a module, so a bias, an adapter, tied or quantized weights and autocast work as they do
    without chunks. `torch.nn.functional.linear_cross_entropy` accepts a weight only.
    """

    def __init__(self, model: nn.Module, labels_per_chunk: int, unsupported: str | None):
        """
        Args:
            unsupported: why this run cannot compute logits in chunks; None when it can.
        """
        self._model: Any = model
        self._labels_per_chunk = labels_per_chunk
        self._unsupported = unsupported
        self._is_checked = False
        if unsupported:
            self._warn()

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor
    ) -> tuple[ModelOutput, torch.Tensor] | None:
        """Return the model's outputs without logits and the loss summed over the labels; None where it is unsupported.

        Args:
            model: the model as the trainer wraps it.
            inputs: with `logits_to_keep`, a bool mask of shape (batch, tokens) with as many True as there are labels.
            targets: shape (labels,), token ids.
        """
        if not self._is_supported(inputs):
            return None
        head = self._head()
        hidden_states: list[torch.Tensor] = []

        # The model's forward gets one position through the head, and this replaces its output by the losses.
        def keep_hidden_states(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            hidden_states.append(arguments[0])
            return (arguments[0][..., :1, :],)

        def replace_output(module: nn.Module, arguments: object, logits: torch.Tensor) -> torch.Tensor:
            # Before the chunks are computed, because they call the same module.
            pre_hook.remove()
            hook.remove()
            return _chunked_losses(module, hidden_states[0], targets, self._labels_per_chunk)

        pre_hook = head.register_forward_pre_hook(keep_hidden_states)
        hook = head.register_forward_hook(replace_output)
        try:
            outputs = model(**inputs)
        finally:
            pre_hook.remove()
            hook.remove()
        total = outputs.logits.sum()
        outputs.logits = None
        return outputs, total

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
        """Return whether the model returns what its head does, without scaling or capping, for the first label."""
        head = self._head()
        if head is None:
            return False
        head_outputs: list[torch.Tensor] = []

        def keep_output(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
            head_outputs.append(output)

        mask = inputs["logits_to_keep"]
        first = torch.zeros_like(mask).view(-1).scatter_(0, mask.view(-1).int().argmax()[None], True)
        hook = head.register_forward_hook(keep_output)
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                logits = self._model(**{**inputs, "logits_to_keep": first.view_as(mask)}).logits
        finally:
            hook.remove()
            self._model.train(was_training)
        return len(head_outputs) == 1 and torch.equal(head_outputs[0].float().flatten(), logits.float().flatten())


def _chunked_losses(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, per_chunk: int) -> torch.Tensor:
    """Return the loss of each label, float32 of shape (1, labels).

    Args:
        hidden: input of the head, shape (..., labels, hidden size).
        targets: shape (labels,), token ids.
    """

    def losses(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(states).flatten(0, -2).float()
        return cross_entropy(logits, labels.to(logits.device), reduction="none")

    chunks = zip(hidden.split(per_chunk, dim=-2), targets.split(per_chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses(*chunk) for chunk in chunks])[None]
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])[None]  # pyright: ignore[reportArgumentType]
