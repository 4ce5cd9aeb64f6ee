"""Contrastive preference optimisation, SimPO and AlphaPO: preferences without a reference."""

from __future__ import annotations

from finetuning.algorithms import orpo_cpo as reference_free
from finetuning.config.sections.experiment import CPOExperiment

METHOD = reference_free.method(
    CPOExperiment,
    "contrastive preference optimisation, SimPO among it (experimental)",
    "trl.experimental.cpo:CPOTrainer",
)
