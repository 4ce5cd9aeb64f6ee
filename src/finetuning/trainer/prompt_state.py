"""The encoders of prompt adapters in a checkpoint: PEFT saves only the prompt that they give, which cannot go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FILE_NAME = "prompt_encoder.safetensors"
_PART = "prompt_encoder."


def write_encoders(model: torch.nn.Module, folder: Path) -> None:
    """`prompt_encoder.safetensors`, where the model wears a prompt adapter; nothing where it does not."""
    tensors = {name: weight.detach().cpu().clone() for name, weight in _encoders(model).items()}
    if tensors:
        save_file(tensors, folder / FILE_NAME)


def read_encoders(model: torch.nn.Module, folder: Path) -> None:
    """Puts back what `write_encoders` wrote; nothing where it wrote nothing."""
    file = folder / FILE_NAME
    if not file.is_file():
        return
    weights = _encoders(model)
    with torch.no_grad():
        for name, tensor in load_file(file).items():
            weights[name].copy_(tensor)


def _encoders(model: torch.nn.Module) -> dict[str, Any]:
    return {name: weight for name, weight in model.named_parameters() if _PART in name}
