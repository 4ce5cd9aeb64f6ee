"""Odds ratio preference optimisation: the chosen answer learnt and preferred at once, without a reference."""

from __future__ import annotations

from finetuning.algorithms import reference_free
from finetuning.config.experiment import ORPOExperiment

METHOD = reference_free.method(
    ORPOExperiment, "odds ratio preference optimisation (experimental)", "trl.experimental.orpo:ORPOTrainer"
)
