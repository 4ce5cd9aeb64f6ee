"""A run's first loss, held against what it must be before anything is learnt.

The frozen copy of an adapter, which a preference loss refers to where the run goes on with that adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetuning.errors import GuardStopped, ModelError

_TOLERANCE = 0.02
"""Relative: half-precision sums of token log-probabilities differ by less between two equal models."""


@dataclass(frozen=True)
class ExpectedLoss:
    """The loss that a run must start at, and why."""

    value: float
    name: str
    """What is computed, in words: the loss and its settings."""
    because: str = "the policy equals the reference"
    otherwise: str = "the reference is not the model that is trained"
    hint: str = "An adapter whose initialisation changes the model (PiSSA and the like) needs NO_PEFT or another init."
    needs_no_dropout: bool = True


class InitialLossMixin:
    """Stands left of a trainer and right of `TrainerMixin`: stops the run when its first loss is not the known one."""

    _first_loss_checked = False

    def known_first_loss(self, inputs: Any) -> ExpectedLoss | None:
        """What the loss of this first batch must be; None where that is not known."""
        raise NotImplementedError

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 0 and self.model.training and not self._first_loss_checked:
            self._first_loss_checked = True
            known = self.known_first_loss(inputs)
            if known is not None:
                found = float((loss[0] if isinstance(loss, tuple) else loss).detach())
                check_initial_loss(found, known, drops=drops_values(self.model))
        return loss


def drops_values(model: Any) -> bool:
    """Whether a model in training has dropout on."""
    return any(getattr(module, "p", 0) > 0 for module in model.modules() if "Dropout" in type(module).__name__)


def check_initial_loss(loss: float, known: ExpectedLoss, *, drops: bool) -> None:
    """Nothing, when the loss is the known one.

    Raises:
        ModelError: dropout keeps it from being so.
        GuardStopped: a wrong reference, or a broken mask.
    """
    if abs(loss - known.value) <= _TOLERANCE * max(abs(known.value), 0.1):
        return
    if known.needs_no_dropout and drops:
        raise ModelError(
            f"the first loss is {loss:.4f}, not {known.value:.4f}: dropout makes the policy differ from the reference;"
            " set training_args.disable_dropout: true"
        )
    raise GuardStopped(
        f"the first loss is {loss:.4f}, but {known.name} must start at {known.value:.4f} while {known.because}:"
        f" {known.otherwise}.",
        hint=known.hint,
    )


_TRAINED, _FROZEN = "default", "ref"


class CompleteReferenceMixin:
    """Stands next to the trainer, on its left: the copy holds all that the adapter holds.

    TRL copies what lies in layers of the adapter's name, and passes over tensors that bear the name themselves: the
    rows of trained tokens, or the vectors of IA3.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete_reference(self.model)


def complete_reference(model: Any) -> None:
    """Copies every tensor that is named after the adapter to the frozen copy, where there is one."""
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        frozen = tensors.get(f"{parent}.{_FROZEN}") if last == _TRAINED else None
        if frozen is not None:
            frozen.data.copy_(tensor.data)
