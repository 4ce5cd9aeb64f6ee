"""The interface of an algorithm, and what the algorithms that use TRL's trainers share.

Nothing here imports torch: the console script reads the table of algorithms before it loads anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from finetuning.config.pretrained_config import find_pretrained_config
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import NoPeft
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    import transformers
    from peft import PeftConfig

    from finetuning.data.collators import Rows
    from finetuning.data.images.processor import ImageTextProcessor
    from finetuning.data.prepared import PreparedData
    from finetuning.model.stop_tokens import EndOfTurn
    from finetuning.model.tokenizer import LoadedTokenizer
    from finetuning.trainer.mixin import TrainerMixin

T = TypeVar("T", bound="transformers.Trainer")
logger = logging.getLogger("finetuning")


@dataclass(frozen=True)
class BatchLayout:
    """How rows form a batch: padded to one length, or concatenated without padding, and why."""

    padded: bool
    reason: str
    takes_constant_mask: bool = False
    """Whether padding-free batches come with a mask that keeps transformers from looking for rows on the device."""

    def __str__(self) -> str:
        return f"{'padded' if self.padded else 'padding-free'}: {self.reason}"


@dataclass(frozen=True)
class TrainerInputs:
    """Everything that a trainer is built from."""

    experiment: Any
    """An instance of the algorithm's `experiment` class."""
    arguments: Any
    """An instance of the class that `experiment.trainer_config` names, a subclass of TrainingArguments."""
    data: PreparedData
    tokenizer: LoadedTokenizer
    model: Any
    peft_config: PeftConfig | None
    """Set when the trainer adds a new adapter to the model; None when `model` is ready."""
    load_reference: Callable[[], transformers.PreTrainedModel] | None
    """Loads a frozen copy of the model as it was before training."""
    layout: BatchLayout
    callbacks: Sequence[transformers.TrainerCallback]
    end_of_turn: EndOfTurn = None
    """The texts that end assistant turns in the chat template; None for the end-of-sequence token."""

    def extended(self, trainer_class: type[T]) -> type[T]:
        """Return a class of trainers with the methods of `run_conf.trainer_mixin` before its own.

        Raises:
            ConfigError: the user's class cannot be loaded, or does not fit.
        """
        path = self.experiment.run_conf.trainer_mixin
        if path is None:
            return trainer_class
        from finetuning.trainer.user_code import extend_trainer

        return extend_trainer(trainer_class, path)


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: its config, how its rows are prepared, and its trainer."""

    title: str
    """What it is, for `--help`."""
    experiment: type[Experiment]
    """The model of its YAML file."""
    prepare: Callable[..., PreparedData]
    """`(experiment, tokenizer, workers, stop_tokens, inspector)` to tokenized rows; the last two are optional."""
    build_trainer: Callable[[TrainerInputs], transformers.Trainer]
    supports_padding_free: bool = False
    """Whether its trainer can compute rows that are concatenated without padding."""
    trainer_adds_adapter: bool = False
    """Whether the trainer itself adds a new adapter to the model, and uses the model without it as the reference."""
    pads_right: bool = False
    """Whether all batches of its trainer are padded on the right: attention then needs no mask."""
    has_score_head: bool = False
    """Whether the model has a head with a single output instead of the vocabulary."""
    is_experimental: bool = False
    """Whether its trainer is one that TRL may change or remove in any release."""

    @property
    def name(self) -> str:
        return self.experiment.method_name


@contextmanager
def reraise_as_config_error(name: str) -> Iterator[None]:
    """Turn what a trainer raises about an unsupported combination of options into a ConfigError.

    Raises:
        ConfigError: the trainer rejects the model, the options or both together, or lacks a package.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ConfigError(
            f"the {name} trainer rejects this config: {error}", location=Location(key="training_args")
        ) from error


def load_reference_if_needed(inputs: TrainerInputs) -> transformers.PreTrainedModel | None:
    """Return a frozen copy of the model as it is before training, if the trainer needs one.

    It needs none when the model without its adapter is the reference, or when the reference log-probabilities are
    computed before training begins.
    """
    is_needed = isinstance(inputs.experiment.peft_conf, NoPeft) and not getattr(
        inputs.arguments, "precompute_ref_log_probs", False
    )
    return inputs.load_reference() if is_needed and inputs.load_reference else None


def images_of(
    experiment: Experiment, tokenizer: transformers.PreTrainedTokenizerBase, excluding: Mapping[str, bool]
) -> ImageTextProcessor | str:
    """Return the processor of the model's images, or why rows with images are refused.

    Args:
        excluding: settings that images do not work together with, and whether they are set.
    """
    run_conf, data_conf = experiment.run_conf, experiment.data_conf
    if not isinstance((find_pretrained_config(run_conf.model) or {}).get("vision_config"), dict):
        return f"and {run_conf.model} is a model that takes text only"
    if any(excluding.values()):
        return f"and images do not work together with {next(key for key, is_set in excluding.items() if is_set)}"
    from finetuning.data.images.processor import processor_for

    return processor_for(run_conf, data_conf.images, tokenizer)


def check_images(trainer: TrainerMixin, collate: Callable[[Rows], Mapping[str, object]] | None = None) -> None:
    """Check the image tokens of the first rows, and whether batches with images can be split when memory runs out.

    Args:
        collate: makes a batch of a row where the trainer's collator does not.

    Raises:
        GuardStopped: a row has another number of image tokens than of features.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    from peft import PeftModel

    from finetuning.trainer.image_check import check_image_tokens, why_not_split

    collator = collate or cast("Callable[[Rows], Mapping[str, object]]", trainer.data_collator)
    model, rows = trainer.model, trainer.train_dataset
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    logger.info("%s", check_image_tokens(cast("transformers.PreTrainedModel", base), collator, rows))
    reason = why_not_split(collator, rows) if trainer.supports_batch_splitting else None
    if reason:
        trainer.supports_batch_splitting = False
        logger.info("batches with images are not split when memory runs out: %s", reason)


def trainer_kwargs(inputs: TrainerInputs) -> dict[str, Any]:
    """Return the arguments that every trainer takes."""
    return {
        "model": inputs.model,
        "args": inputs.arguments,
        "train_dataset": inputs.data.train,
        "eval_dataset": inputs.data.validation,
        "processing_class": inputs.tokenizer.tokenizer,
        "callbacks": list(inputs.callbacks),
    }
