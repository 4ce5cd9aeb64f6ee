"""Stop a run at values that are not finite without making the GPU wait for the host at each step.

The device decides: if the loss or the gradient norm of a step is not finite, the optimizer leaves weights and states as
they are. The host reads the two values one step later, when they have long arrived, and stops the run. They are read
before anything is saved or logged, so nothing of such a step is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepValues:
    """The loss and the gradient norm of a step, before its update."""

    step: int
    loss: float
    gradient_norm: float


class LateGuard:
    """Makes an optimizer skip steps that are not finite, and keeps the values of the last step for the host."""

    leaves_weights = True
    """Whether a step that was not finite has changed nothing."""

    def __init__(self) -> None:
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None

    def submit(self, step: int, loss: torch.Tensor, norm: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Skip the coming update on the device unless both values are finite, and begin to copy them to the host.

        Args:
            loss, norm: scalars. The values of the step before must have been read.
        """
        values = torch.stack([loss.detach().to(norm.device, torch.float32).reshape(()), norm.detach().float()])
        self.leaves_weights = skip_update(optimizer, ~values.isfinite().all())
        if values.device.type != "cuda":
            self._pending = (step, values, None)
            return
        host = torch.empty(2, dtype=torch.float32, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = (step, host, arrived)

    def read(self) -> StepValues | None:
        """Return the values of the last step, once; None if they were read before."""
        if self._pending is None:
            return None
        (step, values, arrived), self._pending = self._pending, None
        if arrived is not None:
            arrived.synchronize()
        loss, norm = values.tolist()
        return StepValues(step, loss, norm)


def skip_update(optimizer: torch.optim.Optimizer, is_skipped: torch.Tensor) -> bool:
    """Make the next update leave weights and optimizer states as they are, if a value on the device says so.

    Fused optimizers of torch take the flag, as they do from a loss scaler. Others get gradients of 0: their weights
    stay finite, although momentum and weight decay still change them.

    Args:
        is_skipped: bool, scalar.

    Returns:
        Whether a skipped update changes nothing at all.
    """
    inner = optimizer
    while isinstance(wrapped := getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = wrapped
    if inner.defaults.get("fused"):
        # Attributes that torch's fused optimizers read and do not declare.
        vars(inner).update(grad_scale=None, found_inf=is_skipped.float())
        return True
    for group in inner.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.masked_fill_(is_skipped, 0.0)
    return False
