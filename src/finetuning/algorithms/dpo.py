"""Direct preference optimization and its family: prefer the chosen answer, and stay close to the reference model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from finetuning.algorithms.algorithm import (
    Algorithm,
    TrainerInputs,
    check_images,
    images_of,
    load_reference_if_needed,
    reraise_as_config_error,
    trainer_kwargs,
)
from finetuning.config.sections.experiment import DPOExperiment

if TYPE_CHECKING:
    import torch
    import transformers
    from datasets import Dataset, IterableDataset
    from trl.trainer.dpo_config import DPOConfig

    from finetuning.data.prepared import PreparedData
    from finetuning.data.preprocessor import Inspector
    from finetuning.trainer.initial_loss import ExpectedLoss

IMAGE_REFERENCES = "image_references"
"""The column of the images in the trainer's rows."""
_LN2 = math.log(2)
_MEANS_OVER_PAIRS = {"sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard"} | {
    "apo_zero",
    "apo_down",
    "discopop",
}
"""Losses that are means over pairs; the others compare the pairs of a batch with each other."""


def prepare(
    experiment: DPOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
    inspector: Inspector | None = None,
) -> PreparedData:
    """Return token ids of prompts, chosen and rejected answers."""
    from finetuning.data.pipeline import prepare_dpo

    args = experiment.training_args
    return prepare_dpo(
        experiment.data_conf,
        args.max_length,
        tokenizer,
        workers,
        stop_tokens=stop_tokens,
        max_prompt_length=args.max_prompt_length,
        inspector=inspector,
        images=images_of(experiment, tokenizer, {}),
    )


def initial_loss(loss_types: list[str], weights: list[float], beta: float, smoothing: float) -> float | None:
    """Return the loss when the policy equals the reference, so that every log-ratio is 0; None where it is unknown.

    A mix that contains `sft` has no known initial loss. Source: the formulas in the papers named at each branch of TRL
    1.16's `DPOTrainer._compute_loss`, with both log-ratios set to 0.
    """
    losses = {
        "sigmoid": _LN2,
        "sigmoid_norm": _LN2,
        "robust": _LN2,
        "aot": _LN2,
        "aot_unpaired": _LN2,
        "hinge": 1.0,
        "ipo": (1 / (2 * beta)) ** 2,
        "nca_pair": 2 * _LN2,
        "bco_pair": 2 * _LN2,
        "sppo_hard": 2 * (0.5 / beta) ** 2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": 0.5 * _LN2 + 0.5,
    }
    if smoothing > 0:
        losses["exo_pair"] = -_LN2 - 0.5 * (math.log1p(-smoothing) + math.log(smoothing))
    if not set(loss_types) <= set(losses):
        return None
    return sum(losses[name] * weight for name, weight in zip(loss_types, weights, strict=True))


def _known_first_loss(args: DPOConfig) -> float | None:
    if args.use_weighting or args.f_divergence_type != "reverse_kl":
        return None
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    return initial_loss(list(args.loss_type), weights, args.beta, args.label_smoothing)


def _row_means(arguments: DPOConfig) -> set[str]:
    """Return the losses that rows add up to. WPO multiplies the token mean `sft` by a mean over pairs."""
    return _MEANS_OVER_PAIRS if arguments.use_weighting else _MEANS_OVER_PAIRS | {"sft"}


def build_trainer(inputs: TrainerInputs) -> transformers.Trainer:
    """Return TRL's DPOTrainer on tokenized rows, with a check of its reference and of the first loss.

    Raises:
        ConfigError: TRL rejects the combination of model and options.
    """
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    from finetuning.trainer.deferred_metrics import CountingCollator, DeferredMetricsMixin
    from finetuning.trainer.initial_loss import ExpectedLoss
    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.trainer.reference import CompleteReferenceMixin, ReferenceCheckMixin
    from finetuning.trainer.row_mean import ChosenTermMixin

    class CheckedDPOTrainer(  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        ChosenTermMixin, TrainerMixin, ReferenceCheckMixin, CompleteReferenceMixin, DeferredMetricsMixin, DPOTrainer
    ):
        args: DPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
        load_reference = staticmethod(inputs.load_reference) if inputs.load_reference else None
        has_chosen_loss = "sft" in inputs.arguments.loss_type and not inputs.arguments.use_weighting
        supports_batch_splitting = loss_is_row_mean = set(inputs.arguments.loss_type) <= _row_means(inputs.arguments)
        precomputed_columns = ("ref_chosen_logps", "ref_rejected_logps")
        collator_columns = (IMAGE_REFERENCES, "text") if inputs.data.has_images else ()
        # The loss `sft` selects the chosen tokens once more.
        token_masks = ("chosen",) * list(inputs.arguments.loss_type).count("sft") + ("chosen", "rejected")

        def _prepare_dataset(
            self, dataset: Dataset | IterableDataset, *args: object, **kwargs: object
        ) -> Dataset | IterableDataset:
            return dataset

        def expected_first_loss(self, inputs: Mapping[str, torch.Tensor]) -> ExpectedLoss | None:
            value = _known_first_loss(self.args)
            name = f"{'+'.join(self.args.loss_type)} with beta {self.args.beta:g}"
            return None if value is None else ExpectedLoss(value, name)

        def precomputed_log_probs(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            return [torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])]

        def weigh_log_probs(self, log_probs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            mask = inputs["completion_mask"][:, 1:]
            # Virtual tokens of prompt tuning come first.
            log_probs = log_probs[:, -mask.shape[1] :]
            if self.ld_alpha is None:
                return log_probs
            shared = torch.minimum(*mask.sum(-1).chunk(2)).repeat(2)[:, None]
            return torch.where(mask.cumsum(-1) > shared, self.ld_alpha * log_probs, log_probs)

    kwargs = trainer_kwargs(inputs) | (_with_images(inputs) if inputs.data.has_images else {})
    with reraise_as_config_error("DPO"):
        trainer = inputs.extended(CheckedDPOTrainer)(
            ref_model=load_reference_if_needed(inputs), peft_config=inputs.peft_config, **kwargs
        )
    if inputs.data.has_images:
        check_images(trainer)
    trainer.data_collator = CountingCollator(trainer.data_collator)
    return trainer


def _with_images(inputs: TrainerInputs) -> dict[str, object]:
    """Return the arguments of the trainer that differ for rows with images.

    TRL 1.16 takes a column `images` for images that its own collator is to process.
    """
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from finetuning.data.images.collator import preference_collator

    experiment = inputs.experiment
    tokenizer = inputs.tokenizer.tokenizer
    splits = {"train_dataset": inputs.data.train, "eval_dataset": inputs.data.validation}
    renamed = {
        name: None if split is None else split.rename_column("images", IMAGE_REFERENCES)
        for name, split in splits.items()
    }
    collator = preference_collator(
        experiment.run_conf,
        experiment.data_conf.images,
        tokenizer,
        DataCollatorForPreference(pad_token_id=cast("int", tokenizer.pad_token_id)),
        IMAGE_REFERENCES,
    )
    return {**renamed, "data_collator": collator}


ALGORITHM = Algorithm(
    title="direct preference optimization and its family, such as IPO",
    experiment=DPOExperiment,
    prepare=prepare,
    build_trainer=build_trainer,
    trainer_adds_adapter=True,
    pads_right=True,
)
