"""Contrastive preference optimisation, SimPO and AlphaPO: preferences without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetuning.algorithms import reference_free
from finetuning.algorithms.method import Method, TrainingParts
from finetuning.config.experiment import CPOExperiment

if TYPE_CHECKING:
    import transformers


def build_trainer(parts: TrainingParts) -> transformers.Trainer:
    """TRL's experimental CPOTrainer on rows that are tokenised already.

    Raises:
        ConfigError: TRL refuses the combination of model and options.
    """
    from trl.experimental.cpo import CPOTrainer

    return reference_free.build("CPO", parts, CPOTrainer)


METHOD = Method(
    name="cpo",
    title="contrastive preference optimisation, SimPO among it (experimental)",
    experiment=CPOExperiment,
    arguments=CPOExperiment.trainer_config,
    prepare=reference_free.prepare,
    build_trainer=build_trainer,
    is_experimental=True,
)
