"""`training_args` of the methods that learn from ratings and preferences, but DPO: KTO, reward models, ORPO, CPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetuning.config.sections.training import TrainingArgs


class KTOTrainingArgs(TrainingArgs):
    """Arguments of the KTO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the reference model: the higher, the closer the policy stays to it."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss: `kto`, or `apo_zero_unpaired`, which estimates no divergence and is for answers better than the
    model's own."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss of desirable answers."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss of undesirable answers. Both weights times their rows should be about equal."""
    max_length: int | None = Field(default=2048, gt=0)
    """Most tokens of prompt and completion together; a longer completion is cut."""


class RewardTrainingArgs(TrainingArgs):
    """Arguments of the reward trainer."""

    learning_rate: float = Field(default=1e-4, ge=0)
    """Peak learning rate."""
    center_rewards_coefficient: float | None = Field(default=None, ge=0)
    """Weight of a penalty on the squared sum of a pair's two scores, which keeps their mean near zero; 0.01 is
    usual."""
    max_length: int | None = Field(default=2048, gt=0)
    """Most tokens of prompt and answer together; a pair with a longer answer is left out."""


class ORPOTrainingArgs(TrainingArgs):
    """Arguments of the ORPO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, ge=0)
    """Weight of the odds ratio beside the loss of the chosen text; λ in the paper."""
    max_length: int | None = Field(default=2048, gt=0)
    """Most tokens of prompt and answer together; a longer answer is cut."""


class CPOTrainingArgs(TrainingArgs):
    """Arguments of the CPO trainer, which SimPO and AlphaPO share."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, gt=0)
    """Factor on the difference between the two answers' log-probabilities."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    """The loss. SimPO is `simpo` with `cpo_alpha: 0`; `alphapo` sets both itself."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the chosen answer's cross-entropy beside the preference loss."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Margin by which the chosen answer shall win, for `loss_type: simpo`."""
    alpha: float = 0.0
    """Shape of AlphaPO's reward; 0 leaves log-probabilities as they are."""
    max_length: int | None = Field(default=2048, gt=0)
    """Most tokens of prompt and answer together; a longer answer is cut."""
