"""`training_args`, `batchsize_conf`, `overrides`, `sft_args` and `tracking`.

`training_args` of the methods that learn from ratings and preferences, but DPO: KTO, reward models, ORPO, CPO.

`training_args` and `grpo_args` of group relative policy optimisation: how completions are made and rewarded."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from finetuning.config.sections.section import ConfigSection, PathName
from finetuning.config.sections.tracking import TrackerName


def _whole_from_one(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or a share of them below 1")
    return int(value) if value >= 1 else value


StepsOrShare = Annotated[float, Field(gt=0), AfterValidator(_whole_from_one)]
"""A number of optimizer steps, or, below 1, a share of all steps."""
Strategy = Literal["no", "steps", "epoch"]


class TrainingArgs(ConfigSection):
    """Arguments of the trainer.

    The fields listed here are ours to keep. Every other field of the installed trainer's config passes through,
    checked against it. The three batch size fields are worked out from `batchsize_conf` and refused here.
    """

    model_config = ConfigDict(extra="allow")

    output_dir: str = Field(default_factory=lambda: os.environ.get("CHECKPOINTS_PATH") or "./checkpoints", min_length=1)
    """Where checkpoints, the tuned model and the run's records go; by default $CHECKPOINTS_PATH or ./checkpoints."""
    num_train_epochs: float = Field(default=3.0)
    """How often the training data is passed over. Read only when `max_steps` does not decide."""
    max_steps: int = Field(default=-1, ge=-1)
    """Number of optimizer steps; overrides `num_train_epochs` when above 0."""
    learning_rate: float = Field(default=5e-5, ge=0)
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """Course of the learning rate: `linear`, `cosine`, `constant_with_warmup`, …"""
    warmup_steps: Annotated[float, AfterValidator(_whole_from_one)] = Field(default=0, ge=0)
    """Number of warm-up steps, or, below 1, their share of all steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's decay rate of the mean."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's decay rate of the variance."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    optim: str = "adamw_torch"
    """Optimizer, by the trainer's names."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the order of rows, dropout and new weights."""
    bf16: bool = False
    """Compute in bfloat16 by autocast."""
    fp16: bool = False
    """Compute in float16 by autocast, with loss scaling."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Arguments of gradient checkpointing."""
    logging_strategy: Strategy = "steps"
    """When metrics are logged."""
    logging_steps: StepsOrShare = 10
    """Optimizer steps between two logs, or, below 1, their share of all steps."""
    logging_first_step: bool = False
    """Log the first step, too."""
    eval_strategy: Strategy = "no"
    """When the validation loss is measured."""
    eval_steps: StepsOrShare | None = None
    """Optimizer steps between two evaluations, or a share; by default `logging_steps`."""
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """When a checkpoint is saved."""
    save_steps: StepsOrShare = 500
    """Optimizer steps between two checkpoints, or, below 1, their share of all steps."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Number of checkpoints kept."""
    load_best_model_at_end: bool = False
    """End with the best checkpoint instead of the last."""
    metric_for_best_model: str | None = None
    """What makes a checkpoint best; by default the validation loss."""
    greater_is_better: bool | None = None
    """Whether more of that metric is better."""
    report_to: str | list[str] = "none"
    """Trackers besides MLflow by the trainer's names; `tracking.trackers` is the other place for them."""
    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed config: a file or the config itself."""


class SFTTrainingArgs(TrainingArgs):
    """Arguments of the trainer of supervised fine-tuning."""

    activation_offloading: bool = False
    """Keep activations in the machine's memory until the backward pass: less GPU memory, more time."""


class DPOTrainingArgs(TrainingArgs):
    """Arguments of the DPO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the reference model: the higher, the closer the policy stays to it."""
    loss_type: str | list[str] = Field(default_factory=lambda: ["sigmoid"], min_length=1)
    """One loss of the DPO family, or several, weighted by `loss_weights`."""
    loss_weights: list[float] | None = None
    """Weight of each loss in `loss_type`; by default 1.0 each."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences."""
    max_length: int | None = Field(default=2048, gt=0)
    """Most tokens of prompt and completion together."""


class BatchSizeConfig(ConfigSection):
    """The batch that the optimizer sees, and the most that one device holds."""

    total_train_batch_size: int = Field(gt=0)
    """Rows an optimizer step: processes x per-device batch size x accumulation."""
    max_per_device_train_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"]
    """Most rows that one device holds in one forward pass. `auto` plans with up to 16, which the memory check of a GPU
    halves until the longest rows fit; on a CPU nothing is measured, and 16 it stays."""
    per_device_eval_batch_size: int | None = Field(default=None, gt=0)
    """Rows a device in evaluation; by default the per-device training batch size."""


class Overrides(ConfigSection):
    """Changes to the training arguments that depend on the batch size."""

    lr_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the learning rate."""
    lr_batch_size_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Factor on the learning rate by the total batch size: none, its square root, or itself."""
    loraplus_lr_ratio: float | None = Field(default=None, ge=1)
    """LoRA+: the learning rate of LoRA's B matrices over that of all else; 16 is usual. By default they learn alike."""


class SFTArgs(ConfigSection):
    """Supervised fine-tuning."""

    max_seq_length: int = Field(default=2048, gt=1)
    """Most tokens of a row."""
    length_handling: Literal["filter", "truncate", "split"] = "filter"
    """What happens to a longer row: it is left out, or cut at the end. `split` makes several rows of a text that is
    trained whole, as for continued pre-training, and leaves out other rows."""
    train_on_completions_only: bool = False
    """Train on the assistant's turns only, or on every token. `train_on` says it in more words."""
    train_on: Literal["all", "assistant", "last", "completions"] | None = None
    """What is trained: every token, all turns of the assistant, its last turn, or completions: all that it says after
    the last user's message, or after the prompt. By default `assistant` with `train_on_completions_only` and `all`
    without, and completions where rows have a prompt apart."""
    batching: Literal["auto", "padded", "padding-free"] = "auto"
    """How the rows of a batch lie. `auto` lays them end to end, without padding, where the model is shown to keep them
    apart: the batches, and so the loss, stay what they are, and no padding is computed."""
    packing: bool = False
    """Lay training rows together in packs of up to `max_seq_length` tokens, none cut, each attending to itself alone. A
    pack counts as one row of a batch, so a step trains on more rows. Validation rows are not packed: their loss stays
    comparable. Refused where the model cannot be shown to keep rows apart."""
    logits_at_once: Annotated[int, Field(gt=0)] | Literal["auto", "all"] = "auto"
    """Labels whose logits are there at a time; more are computed slice by slice, and again in the backward pass: the
    same loss in less memory, more time. `auto` slices a batch with labels × vocabulary beyond 2^28 logits, 1 GiB in
    float32, into parts of half as many; `all` never does."""
    save_name_if_new_basemodel: PathName = "checkpoint-new-basemodel"
    """Name of the folder, inside `output_dir`, of a base model whose vocabulary has grown."""


class TrackingConfig(ConfigSection):
    """MLflow, which an address switches on, and other trackers, by their names."""

    mlflow_server_uri: str | None = None
    """Address of the MLflow server, or a local store: `http://…`, `sqlite:///…`, `file:///…`. Nothing is tracked
    without one."""
    experiment_name: str | None = None
    """Name of the MLflow experiment."""
    run_id: str | None = None
    """Id of an MLflow run to go on with; by default the one that this output directory belongs to, or a new one."""
    run_name: str | None = None
    """Name of the MLflow run."""
    hf_mlflow_log_artifacts: bool = False
    """Copy checkpoints and the tuned model to the tracking server."""
    parent_run_id: str | None = None
    """Id of an MLflow run below which this one is shown, such as that of a sweep."""
    resumed_jobs: Literal["same run", "child runs"] = "same run"
    """What a resumed job is in MLflow: the same run, gone on with, or a run of its own. With `child runs` each job,
    the first one too, is a child of one run that stands for all of them."""
    log_system_metrics: bool = False
    """Send use of processor, memory, disk, network and GPUs to MLflow, as MLflow itself measures them."""
    trackers: list[TrackerName] = Field(default_factory=list)
    """Who is told besides: `tensorboard`, `wandb`, `aim`, `clearml`, `trackio`, `swanlab`, `comet_ml`, `dvclive`, and
    `hf_resource_scanner`, which writes times and memory of one step to a file. `mlflow` says that there must be an
    address, and `file_logger` names `training_logs.jsonl`, which is always written."""
    exp_metadata: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Your own names and values, told to every tracker: tags in MLflow, parameters elsewhere."""
    aim_repo: str | None = None
    """Folder of the Aim repository, or its `aim://` address."""
    aim_remote_server_ip: str | None = None
    """Host of an Aim server, in place of `aim_repo`."""
    aim_remote_server_port: int | None = Field(default=None, gt=0, lt=65536)
    """Port of that server; by default 53800."""
    clearml_project: str | None = None
    """ClearML's project; by default `experiment_name`."""
    clearml_task: str | None = None
    """ClearML's task; by default `run_name`."""
    scanner_output_filename: PathName = "scanner_output.json"
    """What `hf_resource_scanner` writes, in the output directory."""
    run_uri_export_path: str | None = None
    """Folder for a file `NAME_tracker.json` of each tracker, which says where its run is; by default `output_dir`."""


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


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]


class _Reward(ConfigSection):
    weight: float = 1.0
    """Factor on this reward in the sum of all."""


class ExactMatch(_Reward):
    """1 for a completion that is a right answer, but for white space around it; 0 for any other."""

    type: Literal["exact_match"]
    column: str = "correct_answers"
    """The rows' column with the right answer, or a list of answers each of which is right."""
    pattern: Pattern | None = None
    """Regular expression of the answer within the completion: its first group, or all of it, of its last match."""
    ignore_case: bool = False
    """Take capital and small letters for the same."""


class RegexMatch(_Reward):
    """1 for a completion in which a regular expression is found; 0 for any other."""

    type: Literal["regex"]
    pattern: Pattern
    """The regular expression; a dot matches line breaks, too. Begin with `^` and end with `$` to match all of it."""


class JsonValid(_Reward):
    """1 for a completion that is JSON, and has the keys asked for; 0 for any other."""

    type: Literal["json_valid"]
    keys: list[str] = Field(default_factory=list)
    """Keys that the completion, an object then, must have."""


class Length(_Reward):
    """1 for a completion of `target` tokens, falling in a line to 0 at none and at twice as many."""

    type: Literal["length"]
    target: int = Field(gt=0)
    """Number of tokens wanted, the end of the turn among them."""


class Function(_Reward):
    """What a function of yours returns: one number a completion, or None for a completion that it does not judge."""

    type: Literal["function"]
    path: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """`package.module:function`, or `path/to/file.py:function`. Running this config runs that code."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the function."""


Reward = Annotated[ExactMatch | RegexMatch | JsonValid | Length | Function, Field(discriminator="type")]


class GRPOArgs(ConfigSection):
    """What completions are rewarded for."""

    rewards: Annotated[list[Reward], Field(min_length=1)]
    """The rewards; their weighted sum is what the model learns to raise."""
    max_prompt_length: int | None = Field(default=2048, gt=0)
    """Most tokens of a prompt; longer ones are left out."""


class GRPOTrainingArgs(TrainingArgs):
    """Arguments of the GRPO trainer."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    num_generations: int = Field(default=8, gt=1)
    """Completions of each prompt, which are held against each other. `total_train_batch_size` counts completions and
    must be a multiple of it."""
    max_completion_length: int = Field(default=256, gt=0)
    """Most tokens of a completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature that completions are sampled at."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of the probability that completions are sampled from."""
    top_k: int = Field(default=0, ge=0)
    """Number of likeliest tokens that completions are sampled from; 0 for all."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference model; 0 does without one."""
    epsilon: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may move before it is clipped."""
    num_iterations: int = Field(default=1, gt=0)
    """How often each batch of completions is trained on."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How the losses of tokens become one."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Over what the rewards' standard deviation is taken that they are divided by."""
    mask_truncated_completions: bool = False
    """Leave completions out of the loss that did not end by themselves."""
