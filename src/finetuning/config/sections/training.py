"""`training_args` of each algorithm, `batchsize_conf`, `overrides` and `sft_args`."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from finetuning.config.sections.data import DatasetSource
from finetuning.config.sections.model import ModelPart
from finetuning.config.sections.section import ConfigSection, PathName


def _check_steps(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or a fraction of all steps below 1")
    return int(value) if value >= 1 else value


Steps = Annotated[float, Field(gt=0), AfterValidator(_check_steps)]
DEFAULT_LOGGING_STEPS = 10
"""A number of optimizer steps, or, below 1, a fraction of all steps."""
Strategy = Literal["no", "steps", "epoch"]


class TrainingArgs(ConfigSection):
    """Arguments of the trainer.

    The fields listed here have defaults and checks of their own. Every other field of the installed trainer's config
    class is passed through and checked against it. The batch size fields are derived from `batchsize_conf` and are
    errors here.
    """

    model_config = ConfigDict(extra="allow")

    output_dir: str = Field(default_factory=lambda: os.environ.get("CHECKPOINTS_PATH") or "./checkpoints", min_length=1)
    """Folder for checkpoints, the final model and the records of the run. Defaults to $CHECKPOINTS_PATH, or
    ./checkpoints."""
    num_train_epochs: float = Field(default=3.0)
    """Number of epochs. Ignored if `max_steps` is set."""
    max_steps: int = Field(default=-1, ge=-1)
    """Number of optimizer steps. Overrides `num_train_epochs` if positive."""
    learning_rate: float = Field(default=5e-5, ge=0)
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """Learning rate schedule: `linear`, `cosine`, `constant_with_warmup`, …"""
    warmup_steps: Annotated[float, AfterValidator(_check_steps)] = Field(default=0, ge=0)
    """Number of warmup steps, or, below 1, a fraction of all steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam beta1: exponential decay rate of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam beta2: exponential decay rate of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Adam epsilon, added to the denominator for numerical stability."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum gradient norm for gradient clipping. 0 disables clipping."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy: the share of the probability that is spread over all tokens."""
    optim: str = "adamw_torch"
    """Name of the optimizer, as in `transformers.TrainingArguments`."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Random seed of the data order, dropout and new weights."""
    bf16: bool = False
    """Mixed precision with bfloat16 autocast. If neither `bf16` nor `fp16` is set, GPUs that compute in bfloat16 take
    it, and CPUs for models of 8M parameters or more in float32, if a layer is at least 1.2 times as fast with it by a
    probe at the start. A run that resumes computes as before."""
    fp16: bool = False
    """Mixed precision with float16 autocast and loss scaling."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass instead of storing them. Saves memory, costs time. `selective` keeps
    the results of attention and of large matrix products: about half of the memory, for half of the time. If the key is
    not set, a run on a GPU takes the fastest of the three that fits into memory, and says so."""
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Keyword arguments of `torch.utils.checkpoint.checkpoint`, such as `use_reentrant`."""
    torch_compile: bool | Literal["layers"] = False
    """Compile the model with `torch.compile`, by `torch_compile_backend` and `torch_compile_mode`. `layers` compiles
    its decoder layers one by one: they share their graphs, and rows of other lengths need no other graphs."""
    logging_strategy: Strategy = "steps"
    """When to log metrics: never, every `logging_steps`, or every epoch."""
    logging_steps: Steps | None = None
    """Optimizer steps between two logs, or, below 1, a fraction of all steps. By default 10, and 1 in a run of at most
    20 steps. The last step is logged as well."""
    logging_first_step: bool | None = None
    """Also log the first step. By default only if `logging_strategy` is `steps`: a log of an epoch is the mean of its
    steps."""
    eval_strategy: Strategy = "no"
    """When to evaluate: never, every `eval_steps`, or every epoch."""
    eval_steps: Steps | None = None
    """Optimizer steps between two evaluations, or, below 1, a fraction of all steps. Default: `logging_steps` or 10."""
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """When to save a checkpoint: never, every `save_steps`, every epoch, or when the metric has improved."""
    save_steps: Steps = 500
    """Optimizer steps between two checkpoints, or, below 1, a fraction of all steps."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Maximum number of checkpoints to keep. By default all are kept."""
    load_best_model_at_end: bool = False
    """Load the best checkpoint at the end of the run, so that it becomes the final model."""
    metric_for_best_model: str | None = None
    """Metric that determines the best checkpoint. Defaults to the validation loss."""
    greater_is_better: bool | None = None
    """Whether a higher value of that metric is better."""
    report_to: str | list[str] = "none"
    """Experiment trackers in addition to MLflow, named as in transformers. Same effect as `tracking.trackers`."""
    logging_dir: str | None = Field(default=None, min_length=1)
    """Folder of TensorBoard's event files. Defaults to $TENSORBOARD_LOGGING_DIR or $LOGS_PATH; otherwise to ./logs if
    `output_dir` is left at its default, and else to the folder `tensorboard` of the output folder."""
    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed config: the path of a JSON file, or the config itself."""


class FinalEvaluation(ConfigSection):
    """Compare the final model with its base model on held-out rows, at the end of the run."""

    data: DatasetSource
    """Held-out rows, with a column `messages`, `prompt_messages` or `prompt`, and `correct_answers`; of `messages` the
    last one is the correct answer."""
    score: Literal["exact", "contains", "regex", "json"] = "exact"
    """How answers are compared with the correct ones."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens of an answer."""
    compare_base: bool = True
    """Also evaluate the base model."""


class SFTTrainingArgs(TrainingArgs):
    """Arguments of the SFT trainer."""

    activation_offloading: bool = False
    """Offload activations to CPU memory until the backward pass. Saves GPU memory, costs time."""


class DPOTrainingArgs(TrainingArgs):
    """Arguments of the DPO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the regularization towards the reference model: higher values keep the policy closer to it."""
    loss_type: str | list[str] = Field(default_factory=lambda: ["sigmoid"], min_length=1)
    """DPO loss variant, or several, combined with `loss_weights`."""
    loss_weights: list[float] | None = None
    """Weight of each loss in `loss_type`. Defaults to 1.0 each."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Label smoothing: the assumed probability that a preference label is flipped (conservative DPO)."""
    max_length: int | None = Field(default=2048, gt=0)
    """Maximum number of tokens of prompt and completion together."""
    max_prompt_length: int | None = Field(default=None, gt=0)
    """Maximum number of tokens of the prompt: of a longer one the last tokens are kept, as in earlier releases of TRL.
    By default prompts are kept whole, and a row whose prompt fills `max_length` is dropped."""


class KTOTrainingArgs(TrainingArgs):
    """Arguments of the KTO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the regularization towards the reference model: higher values keep the policy closer to it."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto`, or `apo_zero_unpaired`, which needs no estimate of the KL divergence and suits desirable completions that
    are better than the model's own."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss of desirable completions."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss of undesirable completions. For unbalanced data, choose weights such that weight x rows is
    about equal for both."""
    max_length: int | None = Field(default=2048, gt=0)
    """Maximum number of tokens of prompt and completion together. Longer completions are truncated."""


class RewardTrainingArgs(TrainingArgs):
    """Arguments of the reward model trainer."""

    learning_rate: float = Field(default=1e-4, ge=0)
    """Peak learning rate."""
    center_rewards_coefficient: float | None = Field(default=None, ge=0)
    """Weight of an auxiliary loss on the squared sum of the two rewards of a pair, which centers the rewards around
    zero; 0.01 is a common value."""
    max_length: int | None = Field(default=2048, gt=0)
    """Maximum number of tokens of prompt and completion together. Pairs with a longer completion are dropped."""


class ORPOTrainingArgs(TrainingArgs):
    """Arguments of the ORPO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, ge=0)
    """Weight of the odds ratio loss relative to the loss of the chosen completion; λ in the paper."""
    max_length: int | None = Field(default=2048, gt=0)
    """Maximum number of tokens of prompt and completion together. Longer completions are truncated."""


class CPOTrainingArgs(TrainingArgs):
    """Arguments of the CPO trainer, also used for SimPO and AlphaPO."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the difference of log probabilities between chosen and rejected completion."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    """Loss variant. For SimPO use `simpo` with `cpo_alpha: 0`; `alphapo` sets both itself."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Label smoothing: the assumed probability that a preference label is flipped."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy of the chosen completion relative to the preference loss."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Target reward margin of SimPO, for `loss_type: simpo`."""
    alpha: float = 0.0
    """Shape parameter of the AlphaPO reward. 0 uses log probabilities as they are."""
    max_length: int | None = Field(default=2048, gt=0)
    """Maximum number of tokens of prompt and completion together. Longer completions are truncated."""


class GRPOTrainingArgs(TrainingArgs):
    """Arguments of the GRPO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    num_generations: int = Field(default=8, gt=1)
    """Number of completions sampled per prompt, whose rewards are compared. `total_train_batch_size` counts completions
    and must be a multiple of this number."""
    max_completion_length: int = Field(default=256, gt=0)
    """Maximum number of tokens of a completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: sample from the smallest set of tokens whose cumulative probability reaches this value."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k most likely tokens. 0 samples from all."""
    beta: float = Field(default=0.0, ge=0)
    """Coefficient of the KL divergence to the reference model. 0 disables it, and no reference model is loaded."""
    epsilon: float = Field(default=0.2, gt=0)
    """Clipping range of the probability ratio."""
    num_iterations: int = Field(default=1, gt=0)
    """Number of optimization iterations per batch of completions (μ in the paper)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How per-token losses are aggregated."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide rewards by their standard deviation over the `group` of a prompt or over the `batch`, or do not scale
    them."""
    mask_truncated_completions: bool = False
    """Exclude truncated completions from the loss."""


class BatchSizeConfig(ConfigSection):
    """Total batch size per optimizer step, and the maximum per device."""

    total_train_batch_size: int = Field(gt=0)
    """Rows per optimizer step: processes x per-device batch size x gradient accumulation steps."""
    max_per_device_train_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"]
    """Maximum micro-batch size: rows per device in one forward pass. `auto` starts at up to 16; on a GPU the memory
    check halves it until the longest rows fit into memory."""
    per_device_eval_batch_size: int | None = Field(default=None, gt=0)
    """Rows per device in evaluation. Defaults to the per-device training batch size."""


class Overrides(ConfigSection):
    """Learning-rate adjustments."""

    lr_multiplier: float = Field(default=1.0, gt=0)
    """Factor applied to the learning rate."""
    lr_batch_size_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Scale the learning rate with the total batch size: by its square root (`sqrt`) or proportionally (`linear`)."""
    loraplus_lr_ratio: float | None = Field(default=None, ge=1)
    """LoRA+: ratio of the learning rate of the LoRA B matrices to that of all other weights; 16 is a common value. By
    default all weights have the same learning rate."""
    part_learning_rates: dict[ModelPart, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[ModelPart, float])
    """Peak learning rates of parts of a vision-language model, such as `{vision_tower: 2e-6}`. The other parts of
    `run_conf.train_parts` have `training_args.learning_rate`; the schedule is the same. `lr_multiplier` and
    `lr_batch_size_scaling` do not change them."""


class SFTArgs(ConfigSection):
    """Sequence length, loss mask and batching of supervised fine-tuning."""

    max_seq_length: int = Field(default=2048, gt=1)
    """Maximum sequence length in tokens."""
    length_handling: Literal["filter", "truncate", "split"] = "filter"
    """What to do with rows that are longer than `max_seq_length`: `filter` drops them, `truncate` cuts them at the end,
    `split` divides rows that are trained on as a whole (as in continued pre-training) into several and drops other
    rows."""
    train_on_completions_only: bool = False
    """Compute the loss on assistant turns only, instead of on all tokens. `train_on` offers finer control."""
    train_on: Literal["all", "assistant", "last", "completions"] | None = None
    """Tokens that contribute to the loss: `all` tokens, all `assistant` turns, the `last` assistant turn, or
    `completions`: everything after the last user message or after the prompt. Defaults to `completions` for rows with a
    separate prompt, otherwise to `assistant` with `train_on_completions_only` and to `all` without."""
    batching: Literal["auto", "padded", "padding-free"] = "auto"
    """How rows are batched. `padding-free` concatenates the rows of a batch instead of padding them. `auto` does so if
    the model is verified to keep rows isolated from each other: batches and loss stay the same, without computation on
    padding."""
    packing: bool = False
    """Pack training rows into sequences of up to `max_seq_length` tokens. Rows are not split, and tokens attend only to
    their own row. A packed sequence counts as one row of a batch, so each step trains on more rows. Validation rows are
    not packed, so that the validation loss stays comparable. An error if the model cannot be verified to keep rows
    isolated."""
    logits_at_once: Annotated[int, Field(gt=0)] | Literal["auto", "all"] = "auto"
    """Maximum number of label tokens whose logits are in memory at once. More are computed in chunks, and recomputed in
    the backward pass: the same loss with less memory and more time. `auto` chunks batches with more than 2^28 logits
    (label tokens x vocabulary size; 1 GiB in float32) into chunks of half as many. `all` never chunks."""
    save_name_if_new_basemodel: PathName = "checkpoint-new-basemodel"
    """Name of the folder in `output_dir` for the base model, saved if its vocabulary was resized."""
