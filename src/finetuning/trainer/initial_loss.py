"""Checks of losses at their start, where their value is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetuning.errors import GuardStopped
from finetuning.trainer import TrainerBase

if TYPE_CHECKING:
    from torch import nn

_TOLERANCE = 0.02
"""Relative. Sums of token log-probabilities in half precision differ by less between two equal models."""


@dataclass(frozen=True)
class ExpectedLoss:
    """The loss that a run must start at, and why."""

    value: float
    name: str
    """The loss and its settings, for the error message."""
    reason: str = "the policy equals the reference"
    likely_cause: str = "the loss is computed by another formula"
    hint: str = "The loss is not the one that the config names; report this as a bug."


class InitialLossMixin(TrainerBase):
    """Stop the run when its first loss is not the expected one. Its place is to the right of `TrainerMixin`."""

    _is_first_loss_checked = False

    def expected_first_loss(self, inputs: Mapping[str, torch.Tensor]) -> ExpectedLoss | None:
        """Return the loss of the first batch; None where it is unknown."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step == 0 and self.model.training and not self._is_first_loss_checked:
            self._is_first_loss_checked = True
            expected = self.expected_first_loss(inputs)
            if expected is not None:
                loss = output[0] if isinstance(output, tuple) else output
                check_initial_loss(float(loss.detach()), expected)
        return output


def check_initial_loss(loss: float, expected: ExpectedLoss) -> None:
    """Compare the first loss with the expected one.

    Raises:
        GuardStopped: the losses differ.
    """
    if abs(loss - expected.value) <= _TOLERANCE * max(abs(expected.value), 0.1):
        return
    raise GuardStopped(
        f"the first loss is {loss:.4f}, but {expected.name} must start at {expected.value:.4f} while"
        f" {expected.reason}: {expected.likely_cause}.",
        hint=expected.hint,
    )
