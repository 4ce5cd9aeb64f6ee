"""Which checkpoints of a run are kept, and how the others go.

The optimizer's settings, which a checkpoint holds beside its states.

The encoders of prompt adapters in a checkpoint: PEFT saves only the prompt that they give, which cannot go on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetuning.atomic_io import staging_path


def rotate_checkpoints(newest: Path, most: int | None, best: Path | None) -> None:
    """Removes the checkpoints beside `newest` that are more than `most` with it; the best one stays, too.

    Those of a later step go first: this run has passed them over. Each loses its name before its files, so that what is
    called a checkpoint is whole even when the removal is cut. None is removed where `most` is None or 0.
    """
    if not most or most < 0:
        return
    step = _step(newest)
    others = [
        path
        for path in newest.parent.glob(f"{newest.name.rpartition('-')[0]}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit() and path not in (newest, best)
    ]
    others.sort(key=lambda path: (_step(path) < step, _step(path)))
    kept = {newest, best} - {None}
    for path in others[: max(len(others) + len(kept) - most, 0)]:
        retired = staging_path(path)
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(path, retired)
        shutil.rmtree(retired, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


Settings = list[dict[str, Any]]


def optimizer_settings(optimizer: Any) -> Settings:
    """The settings of each group of weights: learning rate, decay, betas and the like."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_optimizer_settings(optimizer: Any, scheduler: Any, settings: Settings) -> None:
    """Puts the settings back over those that a checkpoint brought, and the learning rate where the schedule has it at
    this step."""
    factors = [
        group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0 for group in optimizer.param_groups
    ]
    shapes = getattr(scheduler, "lr_lambdas", None)
    if shapes is not None:
        factors = [shape(scheduler.last_epoch) for shape in shapes]
    for group, wanted, factor in zip(optimizer.param_groups, settings, factors, strict=True):
        group.update(wanted)
        group["lr"] = wanted.get("initial_lr", wanted["lr"]) * factor
    rates = {
        "base_lrs": [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups],
        "_last_lr": [group["lr"] for group in optimizer.param_groups],
    }
    state = scheduler.state_dict()
    scheduler.load_state_dict(state | {name: rate for name, rate in rates.items() if name in state})


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
