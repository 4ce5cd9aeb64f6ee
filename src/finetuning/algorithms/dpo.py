"""Direct preference optimisation and its family: the chosen answer above the rejected one, near the reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.method import Method, TrainingParts
from finetuning.config.experiment import DPOExperiment
from finetuning.config.model import NoPeft
from finetuning.errors import ConfigError, GuardStopped, ModelError, Place

if TYPE_CHECKING:
    import transformers

    from finetuning.data.prepare import PreparedData

_LN2 = math.log(2)
_TOLERANCE = 0.02
"""Relative: half-precision sums of token log-probabilities differ by less between two equal models."""


def prepare(experiment: DPOExperiment, tokenizer: transformers.PreTrainedTokenizerFast, workers: int) -> PreparedData:
    """Token ids of prompts, chosen and rejected answers."""
    from finetuning.data.prepare import prepare_dpo

    return prepare_dpo(experiment.data_conf, experiment.training_args.max_length, tokenizer, workers)


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

    from finetuning.algorithms.trainer import TrainerMixin

    class DPOTrainer(TrainerMixin, trl.DPOTrainer):
        """TRL's DPOTrainer with the mixin, ready rows and the identity check."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 0 and self.model.training and not self._identity_checked:
                self._identity_checked = True
                _check_identity(self, float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

        _identity_checked = False

    needs_reference = isinstance(parts.experiment.peft_conf, NoPeft) and not parts.arguments.precompute_ref_log_probs
    try:
        return DPOTrainer(
            model=parts.model,
            ref_model=parts.load_reference() if needs_reference and parts.load_reference else None,
            args=parts.arguments,
            train_dataset=parts.data.train,
            eval_dataset=parts.data.validation,
            processing_class=parts.tokenizer.tokenizer,
            peft_config=parts.peft_config,
            callbacks=list(parts.callbacks),
        )
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"the DPO trainer refuses this: {error}", place=Place(key="training_args")) from error


def _check_identity(trainer: Any, loss: float) -> None:
    """Stop when the first loss is not what it must be: a wrong reference, dropout left on, or a broken mask."""
    args = trainer.args
    if args.use_weighting or args.f_divergence_type != "reverse_kl" or trainer.aux_loss_enabled:
        return
    expected = first_loss(list(args.loss_type), trainer.loss_weights, args.beta, args.label_smoothing)
    if expected is None or abs(loss - expected) <= _TOLERANCE * max(abs(expected), 0.1):
        return
    if not args.disable_dropout:
        raise ModelError(
            f"the first DPO loss is {loss:.4f}, not {expected:.4f}: dropout makes the policy differ from the reference;"
            " set training_args.disable_dropout: true"
        )
    raise GuardStopped(
        f"the first DPO loss is {loss:.4f}, but {'+'.join(args.loss_type)} with beta {args.beta:g} must start at"
        f" {expected:.4f} while the policy equals the reference: the reference is not the model that is trained.",
        hint="An adapter whose initialisation changes the model (PiSSA and the like) needs NO_PEFT or another init.",
    )


METHOD = Method(
    name="dpo",
    title="direct preference optimisation and its family",
    experiment=DPOExperiment,
    arguments="trl.trainer.dpo_config:DPOConfig",
    prepare=prepare,
    build_trainer=build_trainer,
    wraps_model=True,
)
