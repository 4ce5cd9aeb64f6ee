"""The whole YAML of a run."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from finetuning.config.sections.controller import LossGuardConfig, TrainerController
from finetuning.config.sections.data import DataConfig
from finetuning.config.sections.model import NoQuantization, PeftConfig, QuantConfig, RunConfig, ScorePeftConfig
from finetuning.config.sections.section import ConfigSection
from finetuning.config.sections.tracking import TelemetryConfig
from finetuning.config.sections.training import (
    BatchSizeConfig,
    CPOTrainingArgs,
    DPOTrainingArgs,
    GRPOArgs,
    GRPOTrainingArgs,
    KTOTrainingArgs,
    ORPOTrainingArgs,
    Overrides,
    RewardTrainingArgs,
    SFTArgs,
    SFTTrainingArgs,
    TrackingConfig,
    TrainingArgs,
)


class Experiment(ConfigSection):
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
    batchsize_conf: BatchSizeConfig
    """The batch that the optimizer sees, and the most that one device holds."""
    peft_conf: PeftConfig
    """What is trained of the model: all of it, or an adapter."""
    run_conf: RunConfig = Field(default_factory=RunConfig)
    """The model, and how the run begins and ends."""
    quant_conf: QuantConfig = NoQuantization()
    """Quantisation of the base model."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """What a run tells about its own speed."""
    tracking: TrackingConfig | None = None
    """MLflow."""
    trainer_controller: Annotated[str, Field(min_length=1)] | TrainerController | None = None
    """Rules that steer the run while it trains, or the YAML file that holds them."""
    guard: LossGuardConfig = LossGuardConfig()
    """What stops a run whose loss has exploded."""
    logging_dir: str | None = Field(default=None, min_length=1)
    """Where the losses are written as they come, in `training_logs.jsonl`; by default `output_dir`."""
    save_model_dir: str | None = Field(default=None, min_length=1)
    """Where the tuned model or adapter is put once more when the run ends; it may be `output_dir` itself, a folder in
    it, or slower storage that checkpoints shall not be written to."""


class SFTExperiment(Experiment):
    """A supervised fine-tuning run."""

    method_name: ClassVar[str] = "sft"

    training_args: SFTTrainingArgs
    """Arguments of the trainer."""
    sft_args: SFTArgs = SFTArgs()
    """Supervised fine-tuning."""


class DPOExperiment(Experiment):
    """A preference optimisation run."""

    method_name: ClassVar[str] = "dpo"
    trainer_config: ClassVar[str] = "trl.trainer.dpo_config:DPOConfig"

    training_args: DPOTrainingArgs
    """Arguments of the DPO trainer."""


class KTOExperiment(Experiment):
    """An optimisation run on rated answers."""

    method_name: ClassVar[str] = "kto"
    trainer_config: ClassVar[str] = "trl.trainer.kto_config:KTOConfig"

    training_args: KTOTrainingArgs
    """Arguments of the KTO trainer."""


class RewardExperiment(Experiment):
    """A run that trains a reward model."""

    method_name: ClassVar[str] = "reward"
    trainer_config: ClassVar[str] = "trl.trainer.reward_config:RewardConfig"

    training_args: RewardTrainingArgs
    """Arguments of the reward trainer."""
    peft_conf: ScorePeftConfig
    """What is trained of the model: all of it, or an adapter with the new head."""


class GRPOExperiment(Experiment):
    """A group relative policy optimisation run."""

    method_name: ClassVar[str] = "grpo"
    trainer_config: ClassVar[str] = "trl.trainer.grpo_config:GRPOConfig"

    training_args: GRPOTrainingArgs
    """Arguments of the GRPO trainer."""
    grpo_args: GRPOArgs
    """What completions are rewarded for."""


class ORPOExperiment(Experiment):
    """An odds ratio preference optimisation run. Experimental: TRL may change or drop it in any release."""

    method_name: ClassVar[str] = "orpo"
    trainer_config: ClassVar[str] = "trl.experimental.orpo.orpo_config:ORPOConfig"

    training_args: ORPOTrainingArgs
    """Arguments of the ORPO trainer."""


class CPOExperiment(Experiment):
    """A contrastive preference optimisation run. Experimental: TRL may change or drop it in any release."""

    method_name: ClassVar[str] = "cpo"
    trainer_config: ClassVar[str] = "trl.experimental.cpo.cpo_config:CPOConfig"

    training_args: CPOTrainingArgs
    """Arguments of the CPO trainer."""


EXPERIMENTS: dict[str, type[Experiment]] = {
    experiment.method_name: experiment
    for experiment in (
        SFTExperiment,
        DPOExperiment,
        KTOExperiment,
        RewardExperiment,
        GRPOExperiment,
        ORPOExperiment,
        CPOExperiment,
    )
}
"""The YAML of each method."""
