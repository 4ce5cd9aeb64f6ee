"""What building a trainer of TRL takes, whichever it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetuning.algorithms.algorithm import TrainingParts
from finetuning.config.sections.model import NoPeft
from finetuning.errors import ConfigError, Place


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turns what a trainer says about a combination that it does not take into an error for people.

    Raises:
        ConfigError: the trainer refuses the model, the options or both together, or misses a package.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"the {name} trainer refuses this: {error}", place=Place(key="training_args")) from error


def reference_of(parts: TrainingParts) -> Any:
    """A frozen copy of the model as it is before training; None where the model without its adapter is one, or its
    log-probabilities are computed before training begins."""
    is_needed = isinstance(parts.experiment.peft_conf, NoPeft) and not getattr(
        parts.arguments, "precompute_ref_log_probs", False
    )
    return parts.load_reference() if is_needed and parts.load_reference else None


def trainer_inputs(parts: TrainingParts) -> dict[str, Any]:
    """The arguments that every trainer takes."""
    return {
        "model": parts.model,
        "args": parts.arguments,
        "train_dataset": parts.data.train,
        "eval_dataset": parts.data.validation,
        "processing_class": parts.tokenizer.tokenizer,
        "callbacks": list(parts.callbacks),
    }
