"""Kahneman-Tversky optimization: learn from unpaired preferences, close to the reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from finetuning.algorithms.algorithm import (
    Algorithm,
    TrainerInputs,
    load_reference_if_needed,
    reraise_as_config_error,
    trainer_kwargs,
)
from finetuning.config.sections.experiment import KTOExperiment

if TYPE_CHECKING:
    import torch
    import transformers
    from datasets import Dataset
    from trl.trainer.kto_config import KTOConfig

    from finetuning.data.prepared import PreparedData
    from finetuning.data.preprocessor import Inspector
    from finetuning.trainer.initial_loss import ExpectedLoss


def prepare(
    experiment: KTOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
    inspector: Inspector | None = None,
) -> PreparedData:
    """Return token ids of prompts and answers, each with its label, in training order."""
    from finetuning.data.pipeline import prepare_kto

    args = experiment.training_args
    return prepare_kto(
        experiment.data_conf,
        args.max_length,
        args.seed,
        tokenizer,
        workers,
        stop_tokens=stop_tokens,
        inspector=inspector,
    )


def initial_loss(desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float) -> float:
    """Return the loss of a batch when the policy equals the reference, so that log-ratios and divergence are 0.

    The loss of each answer is 1 - sigmoid(0) times its weight, for both loss types. Source: equation 7 of arXiv
    2402.01306, and arXiv 2408.06266 for the unpaired APO-zero.

    >>> initial_loss(3, 1, 1.0, 1.0), initial_loss(3, 1, 1.0, 3.0)
    (0.5, 0.75)
    """
    total = desirable * desirable_weight + undesirable * undesirable_weight
    return 0.5 * total / (desirable + undesirable)


def build_trainer(inputs: TrainerInputs) -> transformers.Trainer:
    """Return TRL's KTOTrainer on tokenized rows, with a check of its reference and of the first loss.

    Raises:
        ConfigError: TRL rejects the combination of model and options.
    """
    from trl.trainer.kto_trainer import KTOTrainer

    from finetuning.data.processors.preference import with_kl_completions
    from finetuning.trainer.deferred_metrics import CountingCollator, DeferredMetricsMixin
    from finetuning.trainer.initial_loss import ExpectedLoss
    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.trainer.reference import CompleteReferenceMixin, ReferenceCheckMixin
    from finetuning.trainer.step_divergence import StepDivergenceMixin

    class CheckedKTOTrainer(  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        StepDivergenceMixin,
        TrainerMixin,
        ReferenceCheckMixin,
        CompleteReferenceMixin,
        DeferredMetricsMixin,
        KTOTrainer,
    ):
        load_reference = staticmethod(inputs.load_reference) if inputs.load_reference else None
        # Its divergence, which is none, is estimated before.
        supports_batch_splitting = True
        precomputed_columns = ("ref_logps", "ref_KL_logps")

        def _prepare_dataset(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, dataset: Dataset, processing_class: object, args: KTOConfig, dataset_name: str
        ) -> Dataset:
            if not self.calculate_KL:
                return dataset
            rows_of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            return with_kl_completions(dataset, rows_of_step if dataset_name == "train" else max(len(dataset), 1))

        def expected_first_loss(self, inputs: Mapping[str, torch.Tensor]) -> ExpectedLoss | None:
            desirable = int(inputs["label"].sum())
            weights = (self.desirable_weight, self.undesirable_weight)
            value = initial_loss(desirable, len(inputs["label"]) - desirable, *weights)
            return ExpectedLoss(value, f"{self.loss_type} with weights {weights[0]:g} and {weights[1]:g}")

        def precomputed_log_probs(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            kl_log_probs = [inputs["ref_KL_logps"]] if self.calculate_KL else []
            return [*kl_log_probs, inputs["ref_logps"]]

    with reraise_as_config_error("KTO"):
        trainer = inputs.extended(CheckedKTOTrainer)(
            ref_model=load_reference_if_needed(inputs), peft_config=inputs.peft_config, **trainer_kwargs(inputs)
        )
    trainer.data_collator = CountingCollator(trainer.data_collator)
    return trainer


ALGORITHM = Algorithm(
    title="Kahneman-Tversky optimization, on unpaired preferences",
    experiment=KTOExperiment,
    prepare=prepare,
    build_trainer=build_trainer,
    trainer_adds_adapter=True,
    pads_right=True,
)
