"""Odds ratio preference optimisation: the chosen answer learnt and preferred at once, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetuning.algorithms import reference_free
from finetuning.algorithms.method import Method, TrainingParts
from finetuning.config.experiment import ORPOExperiment

if TYPE_CHECKING:
    import transformers


def build_trainer(parts: TrainingParts) -> transformers.Trainer:
    """TRL's experimental ORPOTrainer on rows that are tokenised already.

    Raises:
        ConfigError: TRL refuses the combination of model and options.
    """
    from trl.experimental.orpo import ORPOTrainer

    return reference_free.build("ORPO", parts, ORPOTrainer)


METHOD = Method(
    name="orpo",
    title="odds ratio preference optimisation (experimental)",
    experiment=ORPOExperiment,
    arguments=ORPOExperiment.trainer_config,
    prepare=reference_free.prepare,
    build_trainer=build_trainer,
    is_experimental=True,
)
