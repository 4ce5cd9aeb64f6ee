"""Odds ratio preference optimisation: the chosen answer learnt and preferred at once, without a reference."""

from __future__ import annotations

from finetuning.algorithms import orpo_cpo as reference_free
from finetuning.config.sections.experiment import ORPOExperiment

METHOD = reference_free.method(
    ORPOExperiment, "odds ratio preference optimisation (experimental)", "trl.experimental.orpo:ORPOTrainer"
)
