"""The trainer that the mixins are typed against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn

    class TrainerBase(transformers.Trainer):
        """A transformers Trainer whose constructor has run: attributes that may be None in general are set."""

        accelerator: Any
        args: Any
        model: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
        model_wrapped: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
        optimizer: torch.optim.Optimizer  # pyright: ignore[reportIncompatibleVariableOverride]
        _signature_columns: list[str]  # pyright: ignore[reportIncompatibleVariableOverride]

else:
    TrainerBase = object
    """At run time the mixins have no base: they are combined with trainers of transformers and of TRL."""
