"""Direct preference optimisation and its family: the chosen answer above the rejected one, near the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import (
    Algorithm,
    TrainingParts,
    load_reference_model,
    reraise_as_config_error,
    trainer_kwargs,
)
from finetuning.config.sections.experiment import DPOExperiment
from finetuning.trainer.initial_loss import CompleteReferenceMixin, ExpectedLoss, InitialLossMixin

if TYPE_CHECKING:
    import transformers

    from finetuning.data.prepared import PreparedData

_LN2 = math.log(2)
_MEANS_OVER_PAIRS = {"sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard"} | {
    "apo_zero",
    "apo_down",
    "discopop",
}
"""Losses that hold each pair by itself; the others compare pairs of a batch with one another."""


def prepare(
    experiment: DPOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """Token ids of prompts, chosen and rejected answers."""
    from finetuning.data.pipeline import prepare_dpo

    return prepare_dpo(
        experiment.data_conf, experiment.training_args.max_length, tokenizer, workers, stop_tokens=stop_tokens
    )


def first_loss(loss_types: list[str], weights: list[float], beta: float, smoothing: float) -> float | None:
    """The loss when the policy equals the reference, where it is known: every log-ratio is then 0.

    None for a mix that holds `sft`, whose loss is the model's own. Source: the loss formulas in the papers named at
    each branch of TRL 1.16's `DPOTrainer._compute_loss`, with both log-ratios set to 0.
    """
    known = {
        "sigmoid": _LN2,
        "sigmoid_norm": _LN2,
        "robust": _LN2,
        "aot": _LN2,
        "aot_unpaired": _LN2,
        "hinge": 1.0,
        "ipo": (1 / (2 * beta)) ** 2,
        "nca_pair": 2 * _LN2,
        "bco_pair": 2 * _LN2,
        "sppo_hard": 2 * (0.5 / beta) ** 2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": 0.5 * _LN2 + 0.5,
    }
    if smoothing > 0:
        known["exo_pair"] = -_LN2 - 0.5 * (math.log1p(-smoothing) + math.log(smoothing))
    if not set(loss_types) <= set(known):
        return None
    return sum(known[name] * weight for name, weight in zip(loss_types, weights, strict=True))


def build_trainer(parts: TrainingParts) -> transformers.Trainer:
    """TRL's DPOTrainer on rows that are tokenised already, its first loss checked against the known one.

    Raises:
        ConfigError: TRL refuses the combination of model and options.
    """
    import trl

    from finetuning.trainer.mixin import TrainerMixin

    class DPOTrainer(TrainerMixin, InitialLossMixin, CompleteReferenceMixin, trl.DPOTrainer):
        """TRL's DPOTrainer with the mixin, ready rows and the check of the first loss."""

        divides_batches = set(parts.arguments.loss_type) <= _MEANS_OVER_PAIRS

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def known_first_loss(self, inputs: Any) -> ExpectedLoss | None:
            args = self.args
            if args.use_weighting or args.f_divergence_type != "reverse_kl" or self.aux_loss_enabled:
                return None
            value = first_loss(list(args.loss_type), self.loss_weights, args.beta, args.label_smoothing)
            name = f"{'+'.join(args.loss_type)} with beta {args.beta:g}"
            return None if value is None else ExpectedLoss(value, name)

    with reraise_as_config_error("DPO"):
        return DPOTrainer(ref_model=load_reference_model(parts), peft_config=parts.peft_config, **trainer_kwargs(parts))


METHOD = Algorithm(
    name="dpo",
    title="direct preference optimisation and its family",
    experiment=DPOExperiment,
    arguments="trl.trainer.dpo_config:DPOConfig",
    prepare=prepare,
    build_trainer=build_trainer,
    wraps_model=True,
)
