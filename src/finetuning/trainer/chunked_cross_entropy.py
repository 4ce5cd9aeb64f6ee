"""The summed cross-entropy of many labels, whose logits are never all there at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)

SLICED_FROM = 1 << 28
"""Logits of a batch beyond which `auto` slices: 1 GiB of them in float32."""
AT_ONCE = 1 << 27
"""Logits that `auto` keeps at a time: 512 MiB in float32."""


class ChunkedCrossEntropyMixin:
    """Computes logits slice by slice, in the backward pass again, for the trainer of one model.

    The head is called as the module that it is, so that a bias, an adapter on it, tied or quantised weights and
    autocast are what they are without slices; `torch.nn.functional.linear_cross_entropy` takes a weight alone.
    """

    def __init__(self, model: Any, at_once: Literal["auto", "all"] | int, refusal: str | None):
        """
        Args:
            at_once: `sft_args.logits_at_once`.
            refusal: why the run forbids slices; None when it does not.
        """
        self._model = model
        self._at_once = at_once
        self._refusal = refusal
        self._is_checked = False
        if refusal and isinstance(at_once, int):
            self._tell()

    def rows(self, labels: int) -> int | None:
        """How many labels a slice has; None where so many are few enough to be computed at once."""
        if self._at_once == "all":
            return None
        vocabulary = self._model.config.get_text_config().vocab_size
        rows = max(AT_ONCE // vocabulary, 1) if self._at_once == "auto" else self._at_once
        few = labels * vocabulary <= SLICED_FROM if self._at_once == "auto" else labels <= rows
        return None if few else rows

    def total(self, model: Any, inputs: Mapping[str, Any], targets: torch.Tensor) -> tuple[Any, torch.Tensor] | None:
        """The model's outputs, without logits, and the loss summed over the labels; None where nothing is sliced.

        Args:
            model: the model as the trainer wraps it.
            inputs: with `logits_to_keep`, a mask of (batch, tokens) with as many True as there are labels.
            targets: (labels,), their token ids.
        """
        rows = self.rows(len(targets))
        if rows is None or not self._can_slice(inputs):
            return None
        head, found = self._head(), []

        def keep(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            found.append(arguments[0])
            return (arguments[0][..., :1, :],)

        def losses(module: torch.nn.Module, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
            # Before the slices: they call the same module.
            before.remove()
            after.remove()
            return _losses(module, found[0], targets, rows)

        before = head.register_forward_pre_hook(keep)
        after = head.register_forward_hook(losses)
        try:
            outputs = model(**inputs)
        finally:
            before.remove()
            after.remove()
        total = outputs.logits.sum()
        outputs.logits = None
        return outputs, total

    def _head(self) -> torch.nn.Module:
        base = self._model.get_base_model() if getattr(self._model, "peft_config", None) else self._model
        return base.get_output_embeddings()

    def _can_slice(self, inputs: Mapping[str, Any]) -> bool:
        if not self._is_checked:
            self._is_checked = True
            if self._refusal is None and not self._returns_what_the_head_does(inputs):
                self._refusal = "the model does more to its logits than its head"
            if self._refusal:
                self._tell()
        return self._refusal is None

    def _tell(self) -> None:
        self._is_checked = True
        logger.warning("the logits of all labels are computed at once: %s", self._refusal)

    def _returns_what_the_head_does(self, inputs: Mapping[str, Any]) -> bool:
        """Whether nothing is done to the logits behind the head, no scale and no cap, by this batch's first label."""
        head, seen = self._head(), []
        if head is None:
            return False
        wanted = inputs["logits_to_keep"]
        first = torch.zeros_like(wanted).view(-1).scatter_(0, wanted.view(-1).int().argmax()[None], True)
        hook = head.register_forward_hook(lambda module, arguments, logits: seen.append(logits))
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                logits = self._model(**{**inputs, "logits_to_keep": first.view_as(wanted)}).logits
        finally:
            hook.remove()
            self._model.train(was_training)
        return len(seen) == 1 and torch.equal(seen[0].float().flatten(), logits.float().flatten())


def _losses(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    """(1, labels) float32: the loss of each label.

    Args:
        hidden: (..., labels, size), what the head gets.
    """

    def part(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(states).flatten(0, -2).float()
        return cross_entropy(logits, labels.to(logits.device), reduction="none")

    slices = zip(hidden.split(rows, dim=-2), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([part(*each) for each in slices])[None]
    return torch.cat([checkpoint(part, *each, use_reentrant=False) for each in slices])[None]
