"""Find the checkpoint that a run resumes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from finetuning.atomic_io import MANIFEST, find_manifest_mismatch
from finetuning.errors import CheckpointError, Location

_KEY = "run_conf.resume_from_checkpoint"
_STATE, _OPTIMIZER = "trainer_state.json", ("optimizer.pt", "optimizer.bin")
# Every stock Trainer writes it. Ours removes it, and writes a manifest instead.
_STOCK_TRAINER_FILE = "training_args.bin"
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
    """The checkpoint to resume from, None for a new run, and notes on checkpoints that were skipped."""

    checkpoint: Path | None
    notes: tuple[str, ...] = ()


def find_resume_point(output_dir: Path, requested: bool | str) -> ResumePoint:
    """Return the newest valid checkpoint of an output directory, or the requested one.

    Args:
        requested: `run_conf.resume_from_checkpoint`: false, true, auto, or a path.

    Raises:
        CheckpointError: the requested checkpoint does not exist or is invalid.
    """
    mode = str(requested).lower()
    if mode == "false":
        return ResumePoint(None)
    if mode not in ("auto", "true"):
        path = Path(str(requested))
        if problem := _problem(path):
            raise CheckpointError(f"cannot resume from {path}: {problem}", location=Location(key=_KEY))
        return ResumePoint(path)
    notes = []
    for checkpoint in checkpoints_of(output_dir):
        problem = _problem(checkpoint) or _interrupted_removal(checkpoint)
        if problem is None:
            return ResumePoint(checkpoint, tuple(notes))
        notes.append(f"{checkpoint.name} skipped: {problem}")
    if mode == "true":
        skipped = f" ({'; '.join(notes)})" if notes else ""
        raise CheckpointError(
            f"no valid checkpoint in {output_dir}{skipped}",
            location=Location(key=_KEY),
            hint="Set auto to start a new run when there is none.",
        )
    return ResumePoint(None, tuple(notes))


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of an output directory, newest first."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def _interrupted_removal(checkpoint: Path) -> str | None:
    """Return why a folder looks as if its removal was interrupted; None when it does not."""
    names = {path.name for path in checkpoint.iterdir()}
    return None if names & {MANIFEST, _STOCK_TRAINER_FILE} else f"{MANIFEST} is missing"


def _problem(checkpoint: Path) -> str | None:
    """Return why a folder cannot be resumed from; None when it can."""
    if not checkpoint.is_dir():
        return "no such folder"
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{_STATE} is missing"
    except ValueError:
        return f"{_STATE} is truncated"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{_STATE} has no global_step"
    names = {path.name for path in checkpoint.iterdir()}
    sharded = any(name.startswith(("global_step", "pytorch_model_fsdp", "optimizer_")) for name in names)
    if not sharded and not names & set(_WEIGHTS):
        return "it has no weights"
    if not sharded and not names & set(_OPTIMIZER):
        return "it has no optimizer state (saved with save_only_model)"
    return find_manifest_mismatch(checkpoint)
