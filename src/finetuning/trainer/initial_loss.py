"""Checks of preference losses at their start: the loss has a known value while the policy equals the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetuning.errors import GuardStopped, ModelError
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
    likely_cause: str = "the reference is not the model that is trained"
    hint: str = "An adapter whose initialization changes the model (such as PiSSA) needs NO_PEFT or another init."
    requires_no_dropout: bool = True


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
                check_initial_loss(float(loss.detach()), expected, has_dropout=has_dropout(self.model))
        return output


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model in training mode applies dropout."""
    return any(getattr(module, "p", 0) > 0 for module in model.modules() if "Dropout" in type(module).__name__)


def check_initial_loss(loss: float, expected: ExpectedLoss, *, has_dropout: bool) -> None:
    """Compare the first loss with the expected one.

    Raises:
        ModelError: dropout makes the policy differ from the reference.
        GuardStopped: the losses differ, because of a wrong reference or a broken mask.
    """
    if abs(loss - expected.value) <= _TOLERANCE * max(abs(expected.value), 0.1):
        return
    if expected.requires_no_dropout and has_dropout:
        raise ModelError(
            f"the first loss is {loss:.4f}, not {expected.value:.4f}: dropout makes the policy differ from the"
            " reference; set training_args.disable_dropout: true"
        )
    raise GuardStopped(
        f"the first loss is {loss:.4f}, but {expected.name} must start at {expected.value:.4f} while"
        f" {expected.reason}: {expected.likely_cause}.",
        hint=expected.hint,
    )


_TRAINED_ADAPTER, _REFERENCE_ADAPTER = "default", "ref"


class CompleteReferenceMixin(TrainerBase):
    """Complete TRL's frozen copy of an adapter, which is the reference of a run that continues with that adapter.

    TRL 1.16 copies the tensors below a module with the adapter's name. It misses tensors that have that name
    themselves: the rows of trainable tokens, and the vectors of IA3.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete_reference(self.model)


def complete_reference(model: nn.Module) -> None:
    """Copy every tensor named after the trained adapter to its namesake in the reference adapter, if there is one."""
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        reference = tensors.get(f"{parent}.{_REFERENCE_ADAPTER}") if last == _TRAINED_ADAPTER else None
        if reference is not None:
            reference.data.copy_(tensor.data)
