"""Contrastive preference optimisation, SimPO and AlphaPO: preferences without a reference."""

from __future__ import annotations

from finetuning.algorithms import reference_free
from finetuning.config.experiment import CPOExperiment

METHOD = reference_free.method(
    CPOExperiment,
    "contrastive preference optimisation, SimPO among it (experimental)",
    "trl.experimental.cpo:CPOTrainer",
)
