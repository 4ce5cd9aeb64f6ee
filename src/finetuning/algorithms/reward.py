"""Reward models: a score for an answer, higher for the chosen answer of a pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, TrainerInputs, reraise_as_config_error, trainer_kwargs
from finetuning.config.sections.experiment import RewardExperiment

if TYPE_CHECKING:
    import torch
    import transformers
    from datasets import Dataset, IterableDataset
    from torch import nn

    from finetuning.data.prepared import PreparedData
    from finetuning.data.preprocessor import Inspector
    from finetuning.trainer.initial_loss import ExpectedLoss

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def prepare(
    experiment: RewardExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
    inspector: Inspector | None = None,
) -> PreparedData:
    """Return token ids of prompts, chosen and rejected answers; no answer is truncated."""
    from finetuning.data.pipeline import prepare_reward

    return prepare_reward(
        experiment.data_conf,
        experiment.training_args.max_length,
        tokenizer,
        workers,
        stop_tokens=stop_tokens,
        inspector=inspector,
    )


def build_trainer(inputs: TrainerInputs) -> transformers.Trainer:
    """Return TRL's RewardTrainer on tokenized rows.

    A new head is initialized with zeros (`model/load.py`), so the first loss is ln 2, which is checked.

    Raises:
        ConfigError: TRL rejects the combination of model and options.
    """
    from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

    from finetuning.trainer.initial_loss import ExpectedLoss, InitialLossMixin
    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.trainer.row_mean import RowMeanMixin

    has_zero_head = _has_zero_head(inputs.model)

    class PromptAnswerCollator(DataCollatorForPreference):
        """Concatenates prompts and answers, which TRL's collator takes as one sequence."""

        def torch_call(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            return super().torch_call(
                [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in examples]
            )

    class CheckedRewardTrainer(RowMeanMixin, TrainerMixin, InitialLossMixin, RewardTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
        def _prepare_dataset(
            self, dataset: Dataset | IterableDataset, *args: object, **kwargs: object
        ) -> Dataset | IterableDataset:
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = COLUMNS

        def expected_first_loss(self, inputs: Mapping[str, torch.Tensor]) -> ExpectedLoss | None:
            if not has_zero_head:
                return None
            return ExpectedLoss(
                math.log(2),
                "the loss of a new head",
                reason="every score is 0",
                likely_cause="the head is not the one that was initialized",
                hint="This is a bug in finetuning; please report it.",
            )

    pad_token_id: Any = inputs.tokenizer.tokenizer.pad_token_id
    collator = PromptAnswerCollator(pad_token_id, pad_to_multiple_of=inputs.arguments.pad_to_multiple_of)
    with reraise_as_config_error("reward"):
        return inputs.extended(CheckedRewardTrainer)(data_collator=collator, **trainer_kwargs(inputs))


def _has_zero_head(model: nn.Module) -> bool:
    """Return whether all weights of the model's score head are zero. Weights sharded by DeepSpeed are not readable."""
    from finetuning.model.load import SEQUENCE_CLASSIFICATION

    weights = [weight for name, weight in model.named_parameters() if SEQUENCE_CLASSIFICATION.is_head_weight(name)]
    return bool(weights) and not any(hasattr(weight, "ds_shape") or bool(weight.any()) for weight in weights)


ALGORITHM = Algorithm(
    title="a reward model of preferences",
    experiment=RewardExperiment,
    prepare=prepare,
    build_trainer=build_trainer,
    has_score_head=True,
)
