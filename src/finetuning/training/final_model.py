"""The tuned model: saved whole, opened again, and told about.

The end of a run that succeeded: the tuned model where it is wanted, and the mark that all is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from finetuning.atomic_io import atomic_directory, is_disk_full, staging_path
from finetuning.config.sections.experiment import Experiment
from finetuning.errors import GuardStopped, Location, StorageError
from finetuning.export.verify import verify_saved
from finetuning.model.save import is_peft_model, save_model
from finetuning.model.stop_tokens import align_stop_tokens
from finetuning.training.resume.find import checkpoints_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from finetuning.model.embeddings import EmbeddingInfo
    from finetuning.model.fingerprint import Fingerprint

_REFERENCE_ADAPTER = "ref"
_SAMPLE = "The quick brown fox, 12 × 7 = 84: déjà vu."


@dataclass(frozen=True)
class FinalModel:
    """What a run made, where it lies, and what was checked about it."""

    kind: str
    """`model` or `adapter`."""
    folder: str
    base: str | None
    """The model that an adapter goes with."""
    num_bytes: int
    checks: tuple[str, ...]
    stop_tokens: str | None
    """What generation stops at; None for a model that gives scores."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def publish_final(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end_of_turn: str | None,
    base_fingerprint: Fingerprint | None,
    initial: Mapping[str, str],
    vocabulary: EmbeddingInfo,
) -> FinalModel | None:
    """The tuned model or adapter in `folder`, where it appears once it is opened again and found sound; None on all
    processes but the main one.

    Every process calls this: a sharded model is gathered by all.

    Raises:
        StorageError: it cannot be written.
        GuardStopped: what was written is not sound.
    """
    trainer.settle_weights()
    state_dict = _gathered(trainer)
    if not trainer.is_world_process_zero():
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapted = is_peft_model(model)
    if adapted and _REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(_REFERENCE_ADAPTER)
    base = model.get_base_model() if adapted else model
    writes = base.can_generate()
    stop_tokens = align_stop_tokens(tokenizer, base.generation_config, end_of_turn) if writes else None
    with _room_for(folder), atomic_directory(folder) as candidate:
        save_model(
            model,
            tokenizer,
            candidate,
            stop_tokens=stop_tokens,
            base_fingerprint=base_fingerprint if adapted else None,
            state_dict=state_dict,
            embeddings=vocabulary,
        )
        with _named(folder):
            verified = verify_saved(
                candidate,
                initial=initial if adapted and state_dict is None else None,
                sample_texts={_SAMPLE: tokenizer.encode(_SAMPLE, add_special_tokens=False)},
            )
    return FinalModel(
        kind=verified.kind,
        folder=str(folder),
        base=base.name_or_path if adapted else None,
        num_bytes=verified.num_bytes,
        checks=verified.checks,
        stop_tokens=stop_tokens.report if stop_tokens else None,
    )


def _gathered(trainer: Trainer) -> dict[str, Any] | None:
    """The weights that processes hold parts of; None where this process has them all."""
    if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What is not sound is told of the folder that was to be, not of the one beside it where it was put together."""
    try:
        yield
    except GuardStopped as error:
        place = Location(file=str(folder))
        problems = [replace(problem, place=place, hint="It was not published.") for problem in error.problems]
        raise GuardStopped(problems) from error


@contextmanager
def _room_for(folder: Path) -> Iterator[None]:
    """Says what is safe when there is no room for the tuned model.

    Raises:
        StorageError: the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error, folder.parent):
            raise
        newest = next((path.name for path in checkpoints_of(folder.parent)), None)
        raise StorageError(
            f"no room for the tuned model in {folder}: {str(error).partition(chr(10))[0]}",
            hint=f"{newest} is whole: free some space and run again with run_conf.resume_from_checkpoint: auto."
            if newest
            else "Free some space; there is no checkpoint to go on from.",
        ) from error


COMPLETE = ".complete"
_KEY = "save_model_dir"


def check_save_model_dir(experiment: Experiment) -> None:
    """Nothing, when `save_model_dir` can be written.

    Raises:
        StorageError: it cannot, which is better said before training.
    """
    if experiment.save_model_dir is None:
        return
    existing = Path(experiment.save_model_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError(f"{experiment.save_model_dir} cannot be written", place=Location(key=_KEY))


def copy_to_save_model_dir(experiment: Experiment) -> Path | None:
    """Copies the tuned model to `save_model_dir`, if any, and marks `output_dir` with an empty file `.complete`.

    A new folder appears whole. In one that is there, each file replaces its namesake at once, weights before the
    configs that a reader looks for first; other files stay.

    Raises:
        StorageError: it cannot be written; the tuned model is in `output_dir` all the same.
    """
    output_dir = Path(experiment.training_args.output_dir)
    final = output_dir / experiment.run_conf.final_checkpoint_name
    target = Path(experiment.save_model_dir) if experiment.save_model_dir else None
    try:
        if target is not None and target.absolute() != final.absolute():
            _copy(final, target)
        (output_dir / COMPLETE).touch()
    except OSError as error:
        raise StorageError(
            f"the tuned model could not be copied to {target}: {error.strerror or error}",
            place=Location(key=_KEY),
            hint=f"It is in {final}.",
        ) from error
    return target


def _copy(final: Path, target: Path) -> None:
    if not target.exists():
        with atomic_directory(target) as folder:
            shutil.copytree(final, folder, dirs_exist_ok=True)
        return
    files = sorted((path for path in final.rglob("*") if path.is_file()), key=lambda path: path.suffix == ".json")
    for file in files:
        place = target / file.relative_to(final)
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = staging_path(place)
        shutil.copyfile(file, staging)
        os.replace(staging, place)
