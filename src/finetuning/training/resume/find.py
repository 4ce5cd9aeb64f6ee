"""Which checkpoint a run goes on from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from finetuning.atomic_io import MANIFEST, find_manifest_mismatch
from finetuning.errors import CheckpointError, Location

_KEY = "run_conf.resume_from_checkpoint"
_STATE, _OPTIMIZER = "trainer_state.json", ("optimizer.pt", "optimizer.bin")
# Written by every stock Trainer, and taken away by ours, which writes a manifest.
_STOCK = "training_args.bin"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to go on from, None to start afresh, and what was passed over on the way to it."""

    checkpoint: Path | None
    notes: tuple[str, ...] = ()


def find_resume_point(output_dir: Path, wanted: bool | str) -> ResumePoint:
    """The newest whole checkpoint of an output directory, or the one that was asked for.

    Raises:
        CheckpointError: the checkpoint that must be there is not, or is not whole.
    """
    if wanted is False or (isinstance(wanted, str) and wanted.lower() == "false"):
        return ResumePoint(None)
    if isinstance(wanted, str) and wanted.lower() not in ("auto", "true"):
        fault = _fault(Path(wanted))
        if fault:
            raise CheckpointError(f"cannot resume from {wanted}: {fault}", place=Location(key=_KEY))
        return ResumePoint(Path(wanted))
    notes = []
    for checkpoint in checkpoints_of(output_dir):
        fault = _fault(checkpoint) or _remains(checkpoint)
        if fault is None:
            return ResumePoint(checkpoint, tuple(notes))
        notes.append(f"{checkpoint.name} passed over: {fault}")
    must = wanted is True or (isinstance(wanted, str) and wanted.lower() == "true")
    if must:
        found = f" ({'; '.join(notes)})" if notes else ""
        raise CheckpointError(
            f"no whole checkpoint in {output_dir}{found}",
            place=Location(key=_KEY),
            hint="auto starts afresh when none is.",
        )
    return ResumePoint(None, tuple(notes))


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The checkpoint folders of an output directory, newest first."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def _remains(checkpoint: Path) -> str | None:
    """How a folder shows that its removal was cut short; None when it does not."""
    kept = {path.name for path in checkpoint.iterdir()}
    return None if kept & {MANIFEST, _STOCK} else f"{MANIFEST} is missing"


def _fault(checkpoint: Path) -> str | None:
    """Why a folder cannot be resumed from; None when it can."""
    if not checkpoint.is_dir():
        return "no such folder"
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{_STATE} is missing"
    except ValueError:
        return f"{_STATE} is cut off"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{_STATE} does not say its step"
    names = {path.name for path in checkpoint.iterdir()}
    sharded = any(name.startswith(("global_step", "pytorch_model_fsdp", "optimizer_")) for name in names)
    if not sharded and not names & set(_WEIGHTS):
        return "it has no weights"
    if not sharded and not names & set(_OPTIMIZER):
        return "it has no optimizer state (saved with save_only_model)"
    return find_manifest_mismatch(checkpoint)
