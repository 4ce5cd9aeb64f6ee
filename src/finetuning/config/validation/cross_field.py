"""Rules that involve several config keys: one function per rule.

A rule runs if the sections it reads are valid, so that it reports its problem even if other sections are invalid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator

from pydantic import BaseModel

from finetuning.config.sections.controller import TrainerController
from finetuning.config.sections.data import Concatenation, DataConfig, DatasetSource, FromDatasets, WeightedMix
from finetuning.config.sections.experiment import Experiment, GenerationConfig, GRPOExperiment, SFTExperiment
from finetuning.config.sections.model import BitsAndBytes, NoPeft
from finetuning.config.sections.rewards import FunctionReward
from finetuning.config.sections.tracking import report_to_trackers, requested_trackers
from finetuning.config.sections.training import (
    DEFAULT_LOGGING_STEPS,
    BatchSizeConfig,
    DPOTrainingArgs,
    GRPOTrainingArgs,
    KTOTrainingArgs,
)
from finetuning.config.validation.controller_rules import check_controllers
from finetuning.config.validation.streaming_rules import STREAMING_RULES
from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import KeyPath, ValidationIssue

Rule = Callable[[Experiment], Iterator[ValidationIssue]]

_TOLERANCE = 1e-9
_USER_INFO = re.compile(r"^[\w+.-]+://[^/?#]*@")
_MAX_WORKERS = 1024


def evaluation_requires_validation_data(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject evaluation without validation data."""
    strategy, kind = run.training_args.eval_strategy, run.data_conf.validation_data.type
    if strategy != "no" and kind == "NONE":
        yield ValidationIssue(
            ("training_args", "eval_strategy"),
            f'is "{strategy}", but data_conf.validation_data.type is "NONE".',
            "Give validation data, or set eval_strategy: no.",
        )
    if kind == "NONE" and (run.training_args.model_extra or {}).get("eval_on_start"):
        yield ValidationIssue(
            ("training_args", "eval_on_start"),
            'is true, but data_conf.validation_data.type is "NONE".',
            "Give validation data, or set eval_on_start: false.",
        )


def validation_data_requires_evaluation(run: Experiment) -> Iterator[ValidationIssue]:
    """Warn about validation data that is never used."""
    args = run.training_args
    passed_on = args.model_extra or {}
    if (
        run.data_conf.validation_data.type != "NONE"
        and args.eval_strategy == "no"
        and not passed_on.get("eval_on_start")
    ):
        yield ValidationIssue(
            ("data_conf", "validation_data"),
            "is loaded but never used: training_args.eval_strategy is no.",
            "Set eval_strategy: steps or epoch, or validation_data.type: NONE.",
            kind="warning",
        )


def a_sampling_weight_is_positive(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a mix whose sampling weights are all 0."""
    data = run.data_conf.training_data
    if data.type == "PRECOMPUTE_WEIGHTED_MIX" and all(source.sampling_weight == 0 for source in data.datasets):
        for index, source in enumerate(data.datasets):
            yield ValidationIssue(
                ("data_conf", "training_data", "datasets", index, "sampling_weight"),
                f'is 0 for "{source.path}", as for every dataset: no row would be drawn.',
            )


def quantized_weights_are_frozen(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject full fine-tuning of quantized weights."""
    if isinstance(run.quant_conf, BitsAndBytes) and isinstance(run.peft_conf, NoPeft):
        yield ValidationIssue(
            ("peft_conf", "peft_type"),
            "is NO_PEFT, but quant_conf quantizes the model: quantized weights cannot be trained.",
            "Choose an adapter such as LORA, or quantization_type: no-quantization.",
        )


def part_rates_are_of_trained_parts(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject learning rates of parts that are not trained."""
    for part in run.overrides.part_learning_rates:
        if part not in run.run_conf.train_parts:
            yield ValidationIssue(
                ("overrides", "part_learning_rates", part),
                f"is the learning rate of a part that is not trained: run_conf.train_parts lacks {part}.",
                f"Add {part} to run_conf.train_parts, or remove the rate.",
            )


def packing_is_padding_free(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject packing with padded batches."""
    if isinstance(run, SFTExperiment) and run.sft_args.packing and run.sft_args.batching == "padded":
        yield ValidationIssue(
            ("sft_args", "packing"),
            "is true, but sft_args.batching is padded: packing requires padding-free batches to keep rows isolated.",
            "Set batching: auto, or packing: false.",
        )


def exactly_one_bit_width(run: Experiment | GenerationConfig) -> Iterator[ValidationIssue]:
    """Reject 4 and 8 bits at the same time, or neither."""
    quant = run.quant_conf
    if isinstance(quant, BitsAndBytes) and quant.load_in_4bit == quant.load_in_8bit:
        both = "load_in_4bit and load_in_8bit are both true" if quant.load_in_4bit else "neither load_in_4bit nor"
        message = both if quant.load_in_4bit else f"{both} load_in_8bit is true"
        yield ValidationIssue(("quant_conf",), f"{message}; set one of them.")


def remote_code_is_pinned(run: Experiment) -> Iterator[ValidationIssue]:
    """Warn about remote code, which may change unless a commit pins it."""
    args = run.run_conf.model_args
    if args.trust_remote_code:
        pinned = re.fullmatch(r"[0-9a-f]{40}", args.code_revision or args.revision)
        yield ValidationIssue(
            ("run_conf", "model_args", "trust_remote_code"),
            f"is true: code that comes with {run.run_conf.model} runs with your rights"
            + ("." if pinned else ", and no commit pins it."),
            None if pinned else "Set run_conf.model_args.revision to a commit of 40 digits.",
            kind="warning",
        )


def tokenizers_are_fast(run: Experiment) -> Iterator[ValidationIssue]:
    """Warn about the slow tokenizers of earlier releases of transformers."""
    if not run.run_conf.use_fast_tokenizer:
        yield ValidationIssue(
            ("run_conf", "use_fast_tokenizer"),
            "is false and ignored: loss masks need the character offsets of fast tokenizers.",
            "Remove it.",
            kind="warning",
        )


def only_one_mixed_precision_dtype(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject bf16 together with fp16."""
    if run.training_args.bf16 and run.training_args.fp16:
        yield ValidationIssue(("training_args", "fp16"), "is true, and so is training_args.bf16; set one of them.")


def selective_checkpointing_is_not_reentrant(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject selective checkpointing with `use_reentrant: true`, which recomputes everything."""
    args = run.training_args
    if args.gradient_checkpointing == "selective" and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        yield ValidationIssue(
            ("training_args", "gradient_checkpointing_kwargs", "use_reentrant"),
            "is true, but training_args.gradient_checkpointing is selective: reentrant checkpointing recomputes all.",
            "Remove it, or set gradient_checkpointing: true.",
        )


def batch_size_is_not_searched(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a search for a batch size that would change the total batch size."""
    if (run.training_args.model_extra or {}).get("auto_find_batch_size"):
        yield ValidationIssue(
            ("training_args", "auto_find_batch_size"),
            "would halve the batch and leave the accumulation as it is: the total batch would no longer be"
            " batchsize_conf.total_train_batch_size.",
            "Remove it, and set batchsize_conf.max_per_device_train_batch_size: auto, or to a smaller number.",
        )


def workers_fit_a_machine(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a number of data loader processes that would exhaust the machine."""
    workers = (run.training_args.model_extra or {}).get("dataloader_num_workers")
    if isinstance(workers, int) and workers > _MAX_WORKERS:
        yield ValidationIssue(
            ("training_args", "dataloader_num_workers"),
            f"is {workers:,}: each is a process, and no machine has use for more than {_MAX_WORKERS:,}.",
            "Set at most the number of CPU cores.",
        )


def number_of_steps_is_positive(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject runs of no steps or epochs."""
    args = run.training_args
    if args.max_steps == 0:
        yield ValidationIssue(
            ("training_args", "max_steps"), "must be > 0, or -1 for num_train_epochs to decide (got 0)"
        )
    elif args.max_steps < 0 and args.num_train_epochs <= 0:
        yield ValidationIssue(
            ("training_args", "num_train_epochs"),
            f"must be > 0 unless training_args.max_steps is (got {args.num_train_epochs:g}, and max_steps -1)",
        )


def worker_options_require_workers(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject options of the processes that load batches, without such processes: torch refuses them."""
    extra = run.training_args.model_extra or {}
    for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
        if extra.get(key) and not extra.get("dataloader_num_workers"):
            yield ValidationIssue(("training_args", key), "needs training_args.dataloader_num_workers above 0.")


def schedule_requires_evaluation(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject schedules that follow the validation loss, without evaluation."""
    schedule = run.training_args.lr_scheduler_type
    if schedule in ("reduce_lr_on_plateau", "greedy") and run.training_args.eval_strategy == "no":
        yield ValidationIssue(
            ("training_args", "lr_scheduler_type"), f'"{schedule}" needs training_args.eval_strategy: steps or epoch.'
        )


_ANSWERS = ("chosen", "rejected")
_PREFERENCE_METRICS = (
    *(f"{kind}/{answer}" for kind in ("rewards", "logps", "logits") for answer in _ANSWERS),
    "rewards/margins",
)
EVALUATION_METRICS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": (*_PREFERENCE_METRICS, "rewards/accuracies", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss"),
    "kto": (*_PREFERENCE_METRICS, "kl", "entropy", "num_tokens", "aux_loss"),
    "orpo": (*_PREFERENCE_METRICS, "rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen"),
    "cpo": (*_PREFERENCE_METRICS, "rewards/accuracies", "nll_loss"),
    "reward": ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"),
    "grpo": (
        *("reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "policy_loss", "num_tokens", "aux_loss"),
        *(f"completions/{name}_length" for name in ("mean", "min", "max")),
        *(f"completions/{name}_terminated_length" for name in ("mean", "min", "max")),
        *("completions/clipped_ratio", "entropy_coef", "cispo_clip_ratio", "vespo/phi_seq_mean"),
        *(f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")),
        *("tools/call_frequency", "tools/failure_frequency"),
        *(f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")),
        *(f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")),
    ),
}
"""By method, what an evaluation by TRL's trainer can report, in addition to `COMMON_METRICS`; some only with an option.

Read in TRL 1.16; a test compares them with its source.
"""
COMMON_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
"""What an evaluation of transformers' Trainer reports without `compute_metrics`."""


def metric_for_best_model_is_reported(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a metric that no evaluation of the method reports."""
    args = run.training_args
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    names = [*COMMON_METRICS, *EVALUATION_METRICS[run.method_name]]
    if isinstance(run, GRPOExperiment):
        rewards = run.grpo_args.rewards
        if any(isinstance(reward, FunctionReward) for reward in rewards):
            return  # The user's function may report metrics of its own.
        kinds = [reward.type for reward in rewards]
        labels = [f"{kind}-{index}" if kinds.count(kind) > 1 else kind for index, kind in enumerate(kinds)]
        names += [f"rewards/{label}/{name}" for label in labels for name in ("mean", "std")]
    if metric.removeprefix("eval_") not in names:
        yield ValidationIssue(
            ("training_args", "metric_for_best_model"),
            f'"{metric}" is not among the metrics of an evaluation: {", ".join(names)}.',
            did_you_mean(metric.removeprefix("eval_"), names),
        )


def best_model_requires_matching_strategies(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject best-checkpoint selection if checkpoints and evaluations do not coincide."""
    args = run.training_args
    if not args.load_best_model_at_end and args.save_strategy != "best":
        return
    key = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy"
    path = ("training_args", key)
    if args.eval_strategy == "no":
        yield ValidationIssue(path, "needs evaluations, but training_args.eval_strategy is no.")
    elif args.save_strategy == "best":
        return
    elif args.save_strategy != args.eval_strategy:
        yield ValidationIssue(
            path,
            f"needs save_strategy and eval_strategy to match, but they are {args.save_strategy} and"
            f" {args.eval_strategy}.",
        )
    elif args.save_strategy == "steps":
        saves, evaluations = args.save_steps, args.eval_steps or args.logging_steps or DEFAULT_LOGGING_STEPS
        ratio = saves / evaluations
        if (saves < 1) != (evaluations < 1) or not math.isclose(ratio, round(ratio), rel_tol=1e-6) or ratio < 0.5:
            yield ValidationIssue(
                path,
                f"needs save_steps ({saves:g}) to be a multiple of eval_steps ({evaluations:g}), in the same unit.",
            )


def loss_weights_match_losses(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a number of loss weights other than that of the losses."""
    args = run.training_args
    if isinstance(args, DPOTrainingArgs) and args.loss_weights is not None:
        losses = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
        if len(args.loss_weights) != len(losses):
            yield ValidationIssue(
                ("training_args", "loss_weights"),
                f"has {len(args.loss_weights)} weights for {len(losses)} losses in training_args.loss_type.",
            )


def kto_batch_has_several_rows(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject KTO with one row per batch: the KL divergence is estimated from other rows of the batch."""
    args, batch = run.training_args, run.batchsize_conf
    if isinstance(args, KTOTrainingArgs) and args.loss_type == "kto" and batch.max_per_device_train_batch_size == 1:
        yield ValidationIssue(
            ("batchsize_conf", "max_per_device_train_batch_size"),
            "is 1, but KTO estimates the divergence from the reference with the answers of other rows of the batch.",
            "Set 2 or more, or training_args.loss_type: apo_zero_unpaired.",
        )


def batch_holds_complete_grpo_groups(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a total batch size that splits the completions of a prompt."""
    args, total = run.training_args, run.batchsize_conf.total_train_batch_size
    if not isinstance(args, GRPOTrainingArgs) or {"generation_batch_size", "steps_per_generation"} & set(
        args.model_extra or {}
    ):
        return
    if rest := total % args.num_generations:
        nearest = [str(size) for size in (total - rest, total - rest + args.num_generations) if size]
        yield ValidationIssue(
            ("batchsize_conf", "total_train_batch_size"),
            f"counts completions; {total} is not a multiple of training_args.num_generations {args.num_generations}.",
            f"The nearest that {'are' if len(nearest) > 1 else 'is'}: {' and '.join(nearest)}.",
        )


def controllers_are_valid(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject invalid rules of the trainer controller."""
    if isinstance(run.trainer_controller, TrainerController):
        yield from check_controllers(run.trainer_controller, ("trainer_controller",))


def deepspeed_matches_batch_size(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject batch sizes in an inline DeepSpeed config that contradict `batchsize_conf`."""
    config, batch = run.training_args.deepspeed, run.batchsize_conf
    if not isinstance(config, dict):
        return
    path = ("training_args", "deepspeed")
    for key, limit, message in _deepspeed_limits(batch):
        value = config.get(key, "auto")
        if value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield ValidationIssue((*path, key), 'must be "auto" or a whole number > 0.')
        elif limit(value):
            yield ValidationIssue((*path, key), f"is {value}, but {message}.", 'Write "auto", or leave it out.')


def _deepspeed_limits(batch: BatchSizeConfig) -> list[tuple[str, Callable[[int], bool], str]]:
    total, most = batch.total_train_batch_size, batch.max_per_device_train_batch_size
    return [
        ("train_batch_size", lambda value: value != total, f"batchsize_conf.total_train_batch_size is {total}"),
        (
            "train_micro_batch_size_per_gpu",
            lambda value: (most != "auto" and value > most) or total % value != 0,
            f"batchsize_conf asks for a total of {total} with at most {most} rows per device",
        ),
        (
            "gradient_accumulation_steps",
            lambda value: total % value != 0,
            f"batchsize_conf.total_train_batch_size is {total}, which it does not divide",
        ),
    ]


def shuffle_buffer_requires_streaming(run: Experiment) -> Iterator[ValidationIssue]:
    """Warn about a shuffle buffer without streaming."""
    conf = run.data_conf
    if not conf.streaming and conf.shuffle_buffer != type(conf).model_fields["shuffle_buffer"].default:
        yield ValidationIssue(
            ("data_conf", "shuffle_buffer"),
            "is ignored without data_conf.streaming: prepared rows are shuffled as a whole.",
            "Remove it, or set data_conf.streaming: true.",
            kind="warning",
        )


def train_on_is_unambiguous(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject contradictory options for the loss mask."""
    if isinstance(run, SFTExperiment) and run.sft_args.train_on == "all" and run.sft_args.train_on_completions_only:
        yield ValidationIssue(
            ("sft_args", "train_on"),
            "is all, but sft_args.train_on_completions_only is true.",
            "Leave one of them out.",
        )


def validation_ratios_match_split_type(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject validation ratios that are not used, missing or too large."""
    validation = run.data_conf.validation_data
    sources = run.data_conf.training_data.datasets
    uses_ratios = isinstance(validation, FromDatasets)
    for index, source in enumerate(sources):
        path = ("data_conf", "training_data", "datasets", index, "validation_ratio")
        if source.validation_ratio and not uses_ratios:
            yield ValidationIssue(
                path,
                f"is set, but data_conf.validation_data.type is {validation.type}.",
                "Set validation_data.type: FROM_DATASETS.",
            )
        elif source.validation_ratio + (source.train_ratio or 0) > 1 + _TOLERANCE:
            yield ValidationIssue(
                path, f"is {source.validation_ratio:g}, and train_ratio {source.train_ratio:g}: more than all."
            )
    if uses_ratios and not any(source.validation_ratio for source in sources):
        yield ValidationIssue(
            ("data_conf", "validation_data", "type"), "is FROM_DATASETS, but no dataset has a validation_ratio."
        )


def dataset_text_options_are_consistent(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject contradictory options of a dataset."""
    for path, source in _all_sources(run.data_conf):
        if source.instruction_template and not source.response_template:
            yield ValidationIssue((*path, "instruction_template"), "requires response_template.")
        if source.data_formatter_template and source.dataset_text_field:
            yield ValidationIssue(
                (*path, "data_formatter_template"), "is set, and so is dataset_text_field; set one of them."
            )
        if source.format == "response_template" and not source.response_template:
            yield ValidationIssue((*path, "format"), "is response_template, but the dataset has no response_template.")


def only_one_chat_template(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a custom chat template together with a built-in one."""
    conf = run.data_conf
    named = conf.chat_template_name if "chat_template_name" in conf.model_fields_set else "keep-original"
    if conf.chat_template and named != "keep-original":
        yield ValidationIssue(("data_conf", "chat_template"), "is set, and so is chat_template_name; set one of them.")


def _all_sources(data_conf: DataConfig) -> Iterator[tuple[KeyPath, DatasetSource]]:
    for name, section in (("training_data", data_conf.training_data), ("validation_data", data_conf.validation_data)):
        if isinstance(section, Concatenation | WeightedMix):
            for index, source in enumerate(section.datasets):
                yield ("data_conf", name, "datasets", index), source


def tracking_uri_has_no_credentials(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject credentials in the tracking URI, which is logged."""
    uri = run.tracking.mlflow_server_uri if run.tracking else None
    if has_user_info(uri):
        yield ValidationIssue(
            ("tracking", "mlflow_server_uri"),
            "holds a user name or password.",
            "Take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
        )


def trackers_are_configured(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject Aim without exactly one repository, and warn of `all`, which depends on the installed packages."""
    if "all" in report_to_trackers(run.training_args.report_to):
        yield ValidationIssue(
            ("training_args", "report_to"),
            "is all: every tracker that is installed where the run starts, and MLflow if it has an address.",
            "Name the trackers.",
            kind="warning",
        )
    if "aim" not in requested_trackers(run.tracking, run.training_args.report_to):
        return
    tracking = run.tracking
    places = [tracking.aim_repo, tracking.aim_remote_server_ip] if tracking else []
    if len([location for location in places if location]) != 1:
        yield ValidationIssue(
            ("tracking", "trackers") if tracking and "aim" in tracking.trackers else ("training_args", "report_to"),
            "holds aim, which needs either tracking.aim_repo or tracking.aim_remote_server_ip.",
        )


def has_user_info(uri: str | None) -> bool:
    """Return whether a URL contains `user@` or `user:password@`.

    >>> has_user_info("http://me:pw@host"), has_user_info("http://host/a@b"), has_user_info(None)
    (True, False, False)
    """
    return bool(uri and _USER_INFO.match(uri))


RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("data_conf", "training_args"), evaluation_requires_validation_data),
    (("data_conf", "training_args"), validation_data_requires_evaluation),
    (("data_conf",), a_sampling_weight_is_positive),
    (("data_conf",), validation_ratios_match_split_type),
    (("data_conf",), dataset_text_options_are_consistent),
    (("data_conf",), only_one_chat_template),
    (("data_conf",), shuffle_buffer_requires_streaming),
    (("sft_args",), train_on_is_unambiguous),
    (("peft_conf", "quant_conf"), quantized_weights_are_frozen),
    (("sft_args",), packing_is_padding_free),
    (("overrides", "run_conf"), part_rates_are_of_trained_parts),
    (("quant_conf",), exactly_one_bit_width),
    (("run_conf",), tokenizers_are_fast),
    (("training_args",), only_one_mixed_precision_dtype),
    (("training_args",), metric_for_best_model_is_reported),
    (("run_conf",), remote_code_is_pinned),
    (("training_args",), selective_checkpointing_is_not_reentrant),
    (("training_args",), batch_size_is_not_searched),
    (("training_args",), workers_fit_a_machine),
    (("training_args",), number_of_steps_is_positive),
    (("training_args",), schedule_requires_evaluation),
    (("training_args",), worker_options_require_workers),
    (("training_args",), best_model_requires_matching_strategies),
    (("training_args",), loss_weights_match_losses),
    (("training_args", "batchsize_conf"), kto_batch_has_several_rows),
    (("training_args", "batchsize_conf"), batch_holds_complete_grpo_groups),
    (("training_args", "batchsize_conf"), deepspeed_matches_batch_size),
    (("trainer_controller",), controllers_are_valid),
    (("tracking",), tracking_uri_has_no_credentials),
    (("tracking", "training_args"), trackers_are_configured),
)
"""The rules and the sections that each of them reads."""


def check_rules(run: BaseModel, valid: Collection[str]) -> list[ValidationIssue]:
    """Return the issues of all rules whose sections are valid.

    Args:
        run: a config, or a partial one that has its valid sections only.
        valid: the names of the valid sections.
    """
    if isinstance(run, GenerationConfig) and "quant_conf" in valid:
        return list(exactly_one_bit_width(run))
    if not isinstance(run, Experiment):
        return []
    streams = "data_conf" in valid and run.data_conf.streaming
    return [
        issue
        for sections, rule in (*RULES, *(STREAMING_RULES if streams else ()))
        if all(name in valid for name in sections)
        for issue in rule(run)
    ]
