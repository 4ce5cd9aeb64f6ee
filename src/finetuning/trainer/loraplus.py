"""LoRA+: the B matrices of LoRA learn at a rate of their own."""

from __future__ import annotations

from typing import Any

_B = (".lora_B.", ".lora_embedding_B.")


class LoraPlusMixin:
    """Stands left of a transformers Trainer. Without a ratio the optimizer is the Trainer's own.

    PEFT's `create_loraplus_optimizer` is not used: it gives the higher rate to biases and norms as well, and a fixed
    one to embeddings. Source: Hayou et al., LoRA+, 2024.
    """

    loraplus_lr_ratio: float | None = None
    """The learning rate of the B matrices over that of all else."""

    def create_optimizer(self, model: Any = None) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.loraplus_lr_ratio is not None:
            named = (self.model if model is None else model).named_parameters()
            chosen = {id(weight) for name, weight in named if any(part in name for part in _B)}
            _set_apart(optimizer, chosen, self.loraplus_lr_ratio)
        return optimizer


def _set_apart(optimizer: Any, chosen: set[int], ratio: float) -> None:
    """Moves the chosen weights of each group into a group of their own, with its settings and a higher rate."""
    for group in list(optimizer.param_groups):
        fast = [weight for weight in group["params"] if id(weight) in chosen]
        if not fast:
            continue
        settings = {key: value for key, value in group.items() if key != "params"}
        group["params"] = [weight for weight in group["params"] if id(weight) not in chosen]
        optimizer.add_param_group({**settings, "params": fast, "lr": settings["lr"] * ratio})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
