"""The top level of a config: one `Experiment` class per algorithm, and `GenerationConfig` for `generate`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetuning.config.sections.controller import LossGuardConfig, TrainerController
from finetuning.config.sections.data import DataConfig, DatasetSource, ImagesConfig
from finetuning.config.sections.model import (
    ModelArgs,
    NoQuantization,
    PeftConfig,
    QuantConfig,
    RunConfig,
    ScorePeftConfig,
)
from finetuning.config.sections.rewards import GRPOArgs
from finetuning.config.sections.section import ConfigSection
from finetuning.config.sections.tracking import TelemetryConfig, TrackingConfig
from finetuning.config.sections.training import (
    BatchSizeConfig,
    CPOTrainingArgs,
    DPOTrainingArgs,
    FinalEvaluation,
    GRPOTrainingArgs,
    KTOTrainingArgs,
    ORPOTrainingArgs,
    Overrides,
    RewardTrainingArgs,
    SFTArgs,
    SFTTrainingArgs,
    TrainingArgs,
)


class Experiment(ConfigSection):
    """The sections that all algorithms share."""

    method_name: ClassVar[str] = ""
    trainer_config: ClassVar[str] = "transformers.training_args:TrainingArguments"
    """`module:class` of the trainer's config class, whose other fields `training_args` passes through."""

    method: str | None = None
    """Algorithm of this config. If set, it must match the subcommand."""
    data_conf: DataConfig
    """Training and validation data, chat template and padding."""
    training_args: TrainingArgs
    """Arguments of the trainer."""
    overrides: Overrides = Overrides()
    """Learning-rate adjustments."""
    batchsize_conf: BatchSizeConfig
    """Total batch size per optimizer step, and the maximum per device."""
    peft_conf: PeftConfig
    """Full fine-tuning, or the adapter to train."""
    run_conf: RunConfig = Field(default_factory=RunConfig)
    """Model, checkpoints and limits of the run."""
    quant_conf: QuantConfig = NoQuantization()
    """Quantization of the base model."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Performance telemetry: spans, events and metrics."""
    tracking: TrackingConfig | None = None
    """Experiment tracking with MLflow and other trackers."""
    trainer_controller: Annotated[str, Field(min_length=1)] | TrainerController | None = None
    """Rules that act on the run while it trains, or the path of a YAML file with them."""
    guard: LossGuardConfig = LossGuardConfig()
    """Stop a run whose loss diverges."""
    logging_dir: str | None = Field(default=None, min_length=1)
    """Folder for the training log `training_logs.jsonl`. Defaults to `output_dir`."""
    save_model_dir: str | None = Field(default=None, min_length=1)
    """Folder to which the final model or adapter is saved in addition, at the end of the run: `output_dir`, a folder in
    it, or other storage, such as storage that is too slow for checkpoints."""


# An algorithm narrows the types of some sections. That is sound because sections are frozen, which a type checker does
# not see in `model_config`.


class SFTExperiment(Experiment):
    """Supervised fine-tuning."""

    method_name: ClassVar[str] = "sft"

    training_args: SFTTrainingArgs  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of the trainer."""
    sft_args: SFTArgs = SFTArgs()
    """Sequence length, loss mask and batching."""
    final_evaluation: FinalEvaluation | None = None
    """Held-out rows to evaluate the final model on."""


class DPOExperiment(Experiment):
    """Direct preference optimization."""

    method_name: ClassVar[str] = "dpo"
    trainer_config: ClassVar[str] = "trl.trainer.dpo_config:DPOConfig"

    training_args: DPOTrainingArgs  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of the DPO trainer."""


class KTOExperiment(Experiment):
    """Kahneman-Tversky optimization, from unpaired ratings."""

    method_name: ClassVar[str] = "kto"
    trainer_config: ClassVar[str] = "trl.trainer.kto_config:KTOConfig"

    training_args: KTOTrainingArgs  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of the KTO trainer."""


class RewardExperiment(Experiment):
    """Reward modeling."""

    method_name: ClassVar[str] = "reward"
    trainer_config: ClassVar[str] = "trl.trainer.reward_config:RewardConfig"

    training_args: RewardTrainingArgs  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of the reward trainer."""
    peft_conf: ScorePeftConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    """Full fine-tuning, or the adapter to train together with the score head."""


class GRPOExperiment(Experiment):
    """Group relative policy optimization."""

    method_name: ClassVar[str] = "grpo"
    trainer_config: ClassVar[str] = "trl.trainer.grpo_config:GRPOConfig"

    training_args: GRPOTrainingArgs  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of the GRPO trainer."""
    grpo_args: GRPOArgs
    """Reward functions and prompt length."""


class ORPOExperiment(Experiment):
    """Odds ratio preference optimization. Experimental: TRL may change or remove it in any release."""

    method_name: ClassVar[str] = "orpo"
    trainer_config: ClassVar[str] = "trl.experimental.orpo.orpo_config:ORPOConfig"

    training_args: ORPOTrainingArgs  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of the ORPO trainer."""


class CPOExperiment(Experiment):
    """Contrastive preference optimization. Experimental: TRL may change or remove it in any release."""

    method_name: ClassVar[str] = "cpo"
    trainer_config: ClassVar[str] = "trl.experimental.cpo.cpo_config:CPOConfig"

    training_args: CPOTrainingArgs  # pyright: ignore[reportIncompatibleVariableOverride]
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
"""The config class of each algorithm."""


class OpenInput(ConfigSection):
    """A single prompt."""

    type: Literal["open-input"]
    input: str = ""
    """Text of the prompt."""
    num_samples: int = Field(default=1, gt=0)
    """Number of completions to generate."""


class EvalData(ConfigSection):
    """Prompts from a dataset."""

    type: Literal["eval-data"]
    data: DatasetSource
    """Dataset of prompts, read like a training dataset. Rows have a column `messages`, `prompt_messages` or `prompt`,
    and optionally `correct_answers`."""
    images: ImagesConfig = ImagesConfig()
    """Images in the rows: where they are, and their sizes. Sizes that are left out are those of the model's files."""


class GenerationModel(ConfigSection):
    """Model, adapter and tokenizer to generate with."""

    model: str = Field(min_length=1)
    """Local path or Hugging Face Hub id of the model."""
    model_args: ModelArgs = ModelArgs()
    """Arguments passed to `AutoModelForCausalLM.from_pretrained`."""
    adapter: str | None = None
    """Local path or Hub id of a PEFT adapter to load on top of the model."""
    tokenizer: str | None = None
    """Local path or Hub id of the tokenizer. Defaults to the adapter's tokenizer if present, otherwise the model's."""


class VllmConfig(ConfigSection):
    """How vLLM is started, for `backend: vllm`."""

    program: str = Field(default="vllm", min_length=1)
    """The program `vllm`, or its path in another environment."""
    flags: list[str] = Field(default_factory=list)
    """Further flags of `vllm serve`, such as `--max-model-len=4096`."""


class GenerationConfig(ConfigSection):
    """Prompts, model and generation parameters."""

    prompt_conf: Annotated[OpenInput | EvalData, Field(discriminator="type")]
    """Prompts to complete."""
    model_conf: GenerationModel
    """Model, adapter and tokenizer to generate with."""
    hf_gen_params: dict[str, Any] = Field(default_factory=dict)
    """Generation parameters: the fields of `transformers.GenerationConfig`, such as `max_new_tokens`."""
    quant_conf: QuantConfig = NoQuantization()
    """Quantization of the model."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What generates: transformers, in batches of prompts of similar length; or an installed vLLM, which takes a new
    prompt into its batch as soon as another is finished."""
    vllm_conf: VllmConfig = VllmConfig()
    """How vLLM is started."""
