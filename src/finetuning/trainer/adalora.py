"""AdaLoRA: rank moves to where it matters, after each optimizer step and the same way in a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

FILE_NAME = "adalora_importance.safetensors"
_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_PATTERN = "rank_pattern"


class AllocateRank(TrainerCallback):
    """Lets PEFT weigh and mask the ranks, while the gradients of the step are still there."""

    def __init__(self, model: Any) -> None:
        self._model = model.base_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._model.update_and_allocate(state.global_step)


def is_adalora(model: Any) -> bool:
    """Whether the model wears an AdaLoRA adapter."""
    return hasattr(getattr(model, "base_model", None), "rankallocator")


@contextmanager
def ranks_kept_whole(model: Any) -> Iterator[None]:
    """Within it, the adapter is saved with all its ranks, the masked ones zero: cut to shape, as PEFT saves it, it
    could not be trained on by the optimizer's states."""
    if not is_adalora(model):
        yield
        return
    config = model.active_peft_config
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def write_importance(model: Any, folder: Path) -> None:
    """What has been learned of the ranks, beside the adapter; nothing for other models."""
    if not is_adalora(model):
        return
    allocator = model.base_model.rankallocator
    tensors = {
        f"{kind}:{name}": tensor.detach().cpu().contiguous()
        for kind in _KINDS
        for name, tensor in getattr(allocator, kind).items()
    }
    pattern = model.active_peft_config.rank_pattern
    save_file(tensors, folder / FILE_NAME, metadata={_PATTERN: json.dumps(pattern)})


def read_importance(model: Any, folder: Path) -> None:
    """Puts back what `write_importance` wrote; nothing where it wrote nothing."""
    file = folder / FILE_NAME
    if not file.is_file() or not is_adalora(model):
        return
    allocator = model.base_model.rankallocator
    weights = dict(model.base_model.model.named_parameters())
    allocator.reset_ipt()
    with safe_open(file, framework="pt") as stream:
        for key in stream.keys():  # noqa: SIM118  safe_open is no dict
            kind, _, name = key.partition(":")
            device = weights[name].device if name in weights else None
            getattr(allocator, kind)[name] = stream.get_tensor(key).to(device)
        model.active_peft_config.rank_pattern = json.loads(stream.metadata()[_PATTERN])
