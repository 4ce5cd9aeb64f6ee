"""What this package adds to the trainers of transformers and TRL, and the base that its mixins are typed against."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import accelerate
    import torch
    import transformers
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler

    class _Accelerator(accelerate.Accelerator):
        """An accelerator that reduces tensors only; accelerate's own takes nested ones and has no types."""

        def reduce(self, tensor: torch.Tensor, reduction: str = "sum", scale: float = 1.0) -> torch.Tensor: ...

    class _Arguments(transformers.TrainingArguments):
        """Arguments whose `__post_init__` has run, which sets the output folder."""

        output_dir: str  # pyright: ignore[reportIncompatibleVariableOverride]

    class TrainerBase(transformers.Trainer):
        """A transformers Trainer whose constructor has run: attributes that may be None in general are set."""

        accelerator: _Accelerator  # pyright: ignore[reportIncompatibleVariableOverride]
        args: _Arguments  # pyright: ignore[reportIncompatibleVariableOverride]
        model: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
        model_wrapped: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
        optimizer: torch.optim.Optimizer  # pyright: ignore[reportIncompatibleVariableOverride]
        lr_scheduler: LRScheduler  # pyright: ignore[reportIncompatibleVariableOverride]
        _signature_columns: list[str]  # pyright: ignore[reportIncompatibleVariableOverride]

else:
    TrainerBase = object
    """At run time the mixins have no base: they are combined with trainers of transformers and of TRL."""
