"""The whole YAML of a run."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from finetuning.config.base import Section
from finetuning.config.data import DataConfig
from finetuning.config.model import NoQuantization, PeftConfig, QuantConfig, RunConfig
from finetuning.config.training import BatchsizeConfig, DPOTrainingArgs, Overrides, SFTArgs, Tracking, TrainingArgs


class Experiment(Section):
    """What every method's YAML holds."""

    method_name: ClassVar[str] = ""
    trainer_config: ClassVar[str] = "transformers.training_args:TrainingArguments"
    """`module:class` of the trainer's own config, whose other fields `training_args` passes on."""

    method: str | None = None
    """The method; it must agree with the command."""
    data_conf: DataConfig
    """What is trained on."""
    training_args: TrainingArgs
    """Arguments of the trainer."""
    overrides: Overrides = Overrides()
    """Changes to the training arguments that depend on the batch size."""
    batchsize_conf: BatchsizeConfig
    """The batch that the optimizer sees, and the most that one device holds."""
    peft_conf: PeftConfig
    """What is trained of the model: all of it, or an adapter."""
    run_conf: RunConfig = Field(default_factory=RunConfig)
    """The model, and how the run begins and ends."""
    quant_conf: QuantConfig = NoQuantization()
    """Quantisation of the base model."""
    tracking: Tracking | None = None
    """MLflow."""


class SFTExperiment(Experiment):
    """A supervised fine-tuning run."""

    method_name: ClassVar[str] = "sft"

    sft_args: SFTArgs = SFTArgs()
    """Supervised fine-tuning."""


class DPOExperiment(Experiment):
    """A preference optimisation run."""

    method_name: ClassVar[str] = "dpo"
    trainer_config: ClassVar[str] = "trl.trainer.dpo_config:DPOConfig"

    training_args: DPOTrainingArgs
    """Arguments of the DPO trainer."""


EXPERIMENTS: dict[str, type[Experiment]] = {"sft": SFTExperiment, "dpo": DPOExperiment}
"""The YAML of each method."""
