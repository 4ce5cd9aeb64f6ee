"""What an algorithm is made of.

What building a trainer of TRL takes, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import NoPeft
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    import transformers

    from finetuning.data.prepared import PreparedData
    from finetuning.model.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a batch lie: padded to one length, or end to end, and why."""

    padded: bool
    reason: str

    def __str__(self) -> str:
        return f"{'padded' if self.padded else 'end to end, no padding'}: {self.reason}"


@dataclass(frozen=True)
class TrainingParts:
    """All that a trainer is built from."""

    experiment: Experiment
    arguments: transformers.TrainingArguments
    data: PreparedData
    tokenizer: LoadedTokenizer
    model: Any
    peft_config: Any
    """Set when the trainer itself shall wrap the model in a new adapter; None when `model` is ready."""
    load_reference: Callable[[], Any] | None
    """Loads a frozen copy of the model as it was before training."""
    layout: BatchLayout
    callbacks: Sequence[transformers.TrainerCallback]
    end_of_turn: str | None = None
    """The text that the chat template ends an assistant's turn with; None for the end-of-sequence token."""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm: its name, its config, how its rows are prepared, and its trainer."""

    name: str
    title: str
    experiment: type[Experiment]
    arguments: str
    """`module:class` of the trainer's config class, which pass-through fields are checked against."""
    prepare: Callable[..., PreparedData]
    build_trainer: Callable[[TrainingParts], transformers.Trainer]
    lays_end_to_end: bool = False
    """Whether its trainer can compute rows that lie end to end."""
    wraps_model: bool = False
    """Whether the trainer wraps a new adapter round the model itself, keeping the bare model as its reference."""
    gives_scores: bool = False
    """Whether the model ends in one score instead of the vocabulary."""
    is_experimental: bool = False
    """Whether its trainer is one that TRL may change or drop in any release."""


@contextmanager
def reraise_as_config_error(name: str) -> Iterator[None]:
    """Turns what a trainer says about a combination that it does not take into an error for people.

    Raises:
        ConfigError: the trainer refuses the model, the options or both together, or misses a package.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"the {name} trainer refuses this: {error}", place=Location(key="training_args")) from error


def load_reference_model(parts: TrainingParts) -> Any:
    """A frozen copy of the model as it is before training; None where the model without its adapter is one, or its
    log-probabilities are computed before training begins."""
    is_needed = isinstance(parts.experiment.peft_conf, NoPeft) and not getattr(
        parts.arguments, "precompute_ref_log_probs", False
    )
    return parts.load_reference() if is_needed and parts.load_reference else None


def trainer_kwargs(parts: TrainingParts) -> dict[str, Any]:
    """The arguments that every trainer takes."""
    return {
        "model": parts.model,
        "args": parts.arguments,
        "train_dataset": parts.data.train,
        "eval_dataset": parts.data.validation,
        "processing_class": parts.tokenizer.tokenizer,
        "callbacks": list(parts.callbacks),
    }
