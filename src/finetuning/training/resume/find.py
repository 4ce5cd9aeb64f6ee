"""Find the checkpoint that a run resumes from, and verify it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.atomic_io import MANIFEST, find_manifest_mismatch
from finetuning.errors import CheckpointError, Location, ModelError, read_json_object, reading
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import Experiment
    from finetuning.distributed import ProcessTopology

_KEY = "run_conf.resume_from_checkpoint"
_STATE, _SCHEDULE, _OPTIMIZER = "trainer_state.json", "scheduler.pt", ("optimizer.pt", "optimizer.bin")
# Every stock Trainer writes it. Ours removes it, and writes a manifest instead.
_STOCK_TRAINER_FILE = "training_args.bin"
_WEIGHTS = (
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    ADAPTER_WEIGHTS,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
_READ_ON_RESUME = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", _STATE, "run_config.json", "stream.json",
    "reference/*.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to resume from, None for a new run, and notes on checkpoints that were skipped."""

    checkpoint: Path | None
    notes: tuple[str, ...] = ()


def find_resume_point(output_dir: Path, requested: bool | str, *, compares_content: bool = True) -> ResumePoint:
    """Return the newest valid checkpoint of an output directory, or the requested one.

    Args:
        requested: `run_conf.resume_from_checkpoint`: false, true, auto, or a path.
        compares_content: whether to compare the content of the files with the manifest. One process of a run does.

    Raises:
        CheckpointError: the requested checkpoint does not exist or is invalid.
    """
    mode = str(requested).lower()
    if mode == "false":
        return ResumePoint(None)
    if mode not in ("auto", "true"):
        path = Path(str(requested))
        if problem := _problem(path, compares_content):
            raise CheckpointError(f"cannot resume from {path}: {problem}", location=Location(key=_KEY))
        return ResumePoint(path, _notes(path))
    notes: list[str] = []
    for checkpoint in checkpoints_of(output_dir):
        problem = _problem(checkpoint, compares_content)
        if problem is None:
            return ResumePoint(checkpoint, (*notes, *_notes(checkpoint)))
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
        if path.is_dir() and path.name.rpartition("-")[2].isdecimal()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def check_sharding(checkpoint: Path, experiment: Experiment, topology: ProcessTopology) -> None:
    """Check that a job can load the states in a checkpoint: those of FSDP2 at any number of processes, ZeRO's at one.

    Raises:
        CheckpointError: the checkpoint is sharded in another way, or by DeepSpeed over another number of processes.
    """
    args, location = experiment.training_args, Location(key=_KEY)
    by_config = "deepspeed" if args.deepspeed else "fsdp" if (args.model_extra or {}).get("fsdp") else None
    sharded_by, world_size = topology.sharded_by or by_config, topology.world_size
    num_shards = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    saved_by = "deepspeed" if num_shards else "fsdp" if any(checkpoint.glob("pytorch_model_fsdp*")) else None
    if saved_by is not None and saved_by != sharded_by:
        raise CheckpointError(
            f"{checkpoint.name} was saved under {_SHARDINGS[saved_by]}, and this job runs without",
            location=location,
            hint="Start it with the --preset or --accelerate-config that saved it.",
        )
    if sharded_by == "deepspeed" and saved_by is None:
        raise CheckpointError(
            f"{checkpoint.name} was not saved under {_SHARDINGS['deepspeed']}, as this job runs",
            location=location,
            hint="Start it without, as the checkpoint was saved.",
        )
    if sharded_by == "deepspeed" and num_shards != world_size:
        raise CheckpointError(
            f"{checkpoint.name} holds the optimizer states of DeepSpeed for {num_shards} processes, and this job has"
            f" {world_size}",
            location=location,
            hint=f"Resume it with {num_shards} processes. Checkpoints of --preset fsdp2 resume with any number.",
        )


_SHARDINGS = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}


def _problem(checkpoint: Path, compares_content: bool) -> str | None:
    """Return why a folder cannot be resumed from; None when it can."""
    if not checkpoint.is_dir():
        return "no such folder"
    if not (checkpoint / _STATE).is_file():
        return f"{_STATE} is missing"
    try:
        state = _read_state(checkpoint)
    except CheckpointError as error:
        return str(error)
    if type(state.get("global_step")) is not int:
        return f"{_STATE} has no global_step"
    names = {path.name for path in checkpoint.iterdir()}
    sharded = any(name.startswith(("global_step", "pytorch_model_fsdp", "optimizer_")) for name in names)
    if not sharded and not names & set(_WEIGHTS):
        return "it has no weights"
    if not sharded and not names & set(_OPTIMIZER):
        return "it has no optimizer state (saved with save_only_model)"
    if not sharded and _SCHEDULE not in names:
        # Without it transformers loads neither the schedule nor the optimizer, and goes on.
        return f"{_SCHEDULE} is missing"
    if _is_from_stock_trainer(checkpoint):
        return _stock_problem(checkpoint, state["global_step"]) if compares_content else None
    if MANIFEST not in names:
        # An interrupted copy or removal leaves such a folder.
        return f"{MANIFEST} is missing"
    return find_manifest_mismatch(checkpoint, _READ_ON_RESUME) if compares_content else None


_NUMBERS = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state of the trainer.

    Raises:
        CheckpointError: it is damaged.
    """
    from transformers import TrainerState

    with reading(f"{_STATE} is truncated or damaged", CheckpointError):
        state = read_json_object(checkpoint / _STATE)
        loaded = TrainerState.load_from_json(str(checkpoint / _STATE))
        # The Trainer calculates with them before it looks at them. A state that it wrote has all of them.
        is_complete = "log_history" in state
        values = {name: getattr(loaded, name) if is_complete else state.get(name, 0) for name in _NUMBERS}
        wrong = [name for name, value in values.items() if not isinstance(value, int | float)]
        log = state.get("log_history", [])
        if wrong or not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
            raise ValueError(f"{', '.join(wrong) or 'log_history'} has a value of a wrong type")
    return state


def _is_from_stock_trainer(checkpoint: Path) -> bool:
    """Return whether transformers' own Trainer saved the checkpoint: it never had a manifest."""
    return not (checkpoint / MANIFEST).exists() and (checkpoint / _STOCK_TRAINER_FILE).is_file()


def _notes(checkpoint: Path) -> tuple[str, ...]:
    if not _is_from_stock_trainer(checkpoint):
        return ()
    return (
        f"{checkpoint.name} has no {MANIFEST}: transformers' Trainer saved it. The checksums of optimizer, schedule and"
        " random states were verified; of safetensors weights only names, shapes and sizes",
    )


def _stock_problem(checkpoint: Path, global_step: int) -> str | None:
    """Return what is wrong with a checkpoint that has no manifest, as far as its files show it themselves."""
    from finetuning.model.safetensors_io import read_header, read_model_headers

    step = checkpoint.name.rpartition("-")[2]
    if step.isdecimal() and int(step) != global_step:
        return f"{_STATE} is of step {global_step}"
    try:
        if (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
            read_model_headers(checkpoint)
        for file in checkpoint.glob("*.safetensors"):
            read_header(file)
    except ModelError as error:
        return str(error)
    for pattern in ("*.pt", "*.pth", "*.bin"):
        for file in sorted(checkpoint.glob(pattern)):
            if file.name != _STOCK_TRAINER_FILE and (problem := _archive_problem(file)) is not None:
                return problem
    return None


def _archive_problem(file: Path) -> str | None:
    """Return what is wrong with a file of torch.save, whose zip archive has a checksum of each tensor."""
    try:
        with reading(f"{file.name} is damaged", CheckpointError), zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except CheckpointError as error:
        return str(error)
    return None if damaged is None else f"{file.name} is damaged: {damaged} has another checksum"
