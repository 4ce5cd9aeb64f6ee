"""The end of a run that succeeded: the tuned model where it is wanted, and the mark that all is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetuning.atomic_io import staged, staging_path
from finetuning.config.sections.experiment import Experiment
from finetuning.errors import Place, StorageError

COMPLETE = ".complete"
_KEY = "save_model_dir"


def check_delivery(experiment: Experiment) -> None:
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
        raise StorageError(f"{experiment.save_model_dir} cannot be written", place=Place(key=_KEY))


def deliver(experiment: Experiment) -> Path | None:
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
            place=Place(key=_KEY),
            hint=f"It is in {final}.",
        ) from error
    return target


def _copy(final: Path, target: Path) -> None:
    if not target.exists():
        with staged(target) as folder:
            shutil.copytree(final, folder, dirs_exist_ok=True)
        return
    files = sorted((path for path in final.rglob("*") if path.is_file()), key=lambda path: path.suffix == ".json")
    for file in files:
        place = target / file.relative_to(final)
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = staging_path(place)
        shutil.copyfile(file, staging)
        os.replace(staging, place)
