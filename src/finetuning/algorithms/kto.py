"""Kahneman-Tversky optimisation: answers rated good or bad, each by itself, near the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import (
    Algorithm,
    TrainingParts,
    load_reference_model,
    reraise_as_config_error,
    trainer_kwargs,
)
from finetuning.config.sections.experiment import KTOExperiment
from finetuning.trainer.initial_loss import CompleteReferenceMixin, ExpectedLoss, InitialLossMixin

if TYPE_CHECKING:
    import transformers

    from finetuning.data.prepared import PreparedData


def prepare(
    experiment: KTOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """Token ids of prompts and answers, each with its label, in the order that they are trained in."""
    from finetuning.data.pipeline import prepare_kto

    args = experiment.training_args
    return prepare_kto(experiment.data_conf, args.max_length, args.seed, tokenizer, workers, stop_tokens=stop_tokens)


def first_loss(desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float) -> float:
    """The loss of a batch when the policy equals the reference: every log-ratio and the divergence are then 0.

    Each answer's loss is 1 - sigmoid(0) times its weight, for both loss types. Source: equation 7 of arXiv 2402.01306,
    and arXiv 2408.06266 for the unpaired APO-zero.

    >>> first_loss(3, 1, 1.0, 1.0), first_loss(3, 1, 1.0, 3.0)
    (0.5, 0.75)
    """
    total = desirable * desirable_weight + undesirable * undesirable_weight
    return 0.5 * total / (desirable + undesirable)


def build_trainer(parts: TrainingParts) -> transformers.Trainer:
    """TRL's KTOTrainer on rows that are tokenised already, its first loss checked against the known one.

    Raises:
        ConfigError: TRL refuses the combination of model and options.
    """
    import trl

    from finetuning.data.processors.preference import with_kl_completions
    from finetuning.trainer.mixin import TrainerMixin

    class KTOTrainer(TrainerMixin, InitialLossMixin, CompleteReferenceMixin, trl.KTOTrainer):
        """TRL's KTOTrainer with the mixin, ready rows and the check of the first loss."""

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            return with_kl_completions(dataset, args.per_device_train_batch_size) if self.calculate_KL else dataset

        def known_first_loss(self, inputs: Any) -> ExpectedLoss | None:
            if self.aux_loss_enabled:
                return None
            good = int(inputs["label"].sum())
            weights = (self.desirable_weight, self.undesirable_weight)
            value = first_loss(good, len(inputs["label"]) - good, *weights)
            return ExpectedLoss(value, f"{self.loss_type} with weights {weights[0]:g} and {weights[1]:g}")

    with reraise_as_config_error("KTO"):
        return KTOTrainer(ref_model=load_reference_model(parts), peft_config=parts.peft_config, **trainer_kwargs(parts))


METHOD = Algorithm(
    name="kto",
    title="optimisation on rated answers",
    experiment=KTOExperiment,
    arguments=KTOExperiment.trainer_config,
    prepare=prepare,
    build_trainer=build_trainer,
    wraps_model=True,
)
