"""Reward models: one score for an answer, higher for the chosen one of a pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, TrainingParts, reraise_as_config_error, trainer_kwargs
from finetuning.config.sections.experiment import RewardExperiment
from finetuning.trainer.initial_loss import ExpectedLoss, InitialLossMixin

if TYPE_CHECKING:
    import transformers

    from finetuning.data.prepared import PreparedData


def prepare(
    experiment: RewardExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """Token ids of prompts, chosen and rejected answers, each answer whole."""
    from finetuning.data.pipeline import prepare_reward

    return prepare_reward(
        experiment.data_conf, experiment.training_args.max_length, tokenizer, workers, stop_tokens=stop_tokens
    )


def build_trainer(parts: TrainingParts) -> transformers.Trainer:
    """TRL's RewardTrainer on rows that are tokenised already.

    A new head starts at zero (`model/heads.py`), so that the first loss is ln 2, which is checked.

    Raises:
        ConfigError: TRL refuses the combination of model and options.
    """
    import trl
    from trl.trainer.reward_trainer import DataCollatorForPreference

    from finetuning.trainer.mixin import TrainerMixin

    starts_at_zero = _scores_nothing(parts.model)

    class PairCollator(DataCollatorForPreference):
        """Whole texts, made of prompts and answers."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            return super().torch_call(
                [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in examples]
            )

    class RewardTrainer(TrainerMixin, InitialLossMixin, trl.RewardTrainer):
        """TRL's RewardTrainer with the mixin, ready rows and the check of the first loss."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]

        def known_first_loss(self, inputs: Any) -> ExpectedLoss | None:
            if not starts_at_zero:
                return None
            return ExpectedLoss(
                math.log(2),
                "the loss of a new head",
                because="every score is 0",
                otherwise="the head is not the one that was made",
                hint="This is a defect of the engine.",
                needs_no_dropout=False,
            )

    collator = PairCollator(
        pad_token_id=parts.tokenizer.tokenizer.pad_token_id, pad_to_multiple_of=parts.arguments.pad_to_multiple_of
    )
    with reraise_as_config_error("reward"):
        return RewardTrainer(data_collator=collator, **trainer_kwargs(parts))


def _scores_nothing(model: Any) -> bool:
    """Whether the head of a model, or of the model within an adapter, is zero. DeepSpeed's shards cannot be read."""
    from finetuning.model.load import SEQUENCE_CLASSIFICATION

    weights = [weight for name, weight in model.named_parameters() if SEQUENCE_CLASSIFICATION.is_head_weight(name)]
    return bool(weights) and not any(hasattr(weight, "ds_shape") or bool(weight.any()) for weight in weights)


METHOD = Algorithm(
    name="reward",
    title="a reward model of preferences",
    experiment=RewardExperiment,
    arguments=RewardExperiment.trainer_config,
    prepare=prepare,
    build_trainer=build_trainer,
    gives_scores=True,
)
