"""Rules that involve several config keys: one function per rule.

A rule runs if the sections it reads are valid, so that it reports its problem even if other sections are invalid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finetuning.config.sections.controller import TrainerController
from finetuning.config.sections.experiment import Experiment, SFTExperiment
from finetuning.config.sections.model import BitsAndBytes, NoPeft
from finetuning.config.sections.training import BatchSizeConfig, DPOTrainingArgs, GRPOTrainingArgs, KTOTrainingArgs
from finetuning.config.validation.controller_rules import check_controllers
from finetuning.config.validation.cross_field_data import (
    STREAM_RULES,
    dataset_text_options_are_consistent,
    only_one_chat_template,
    trackers_are_configured,
    tracking_uri_has_no_credentials,
    train_on_is_unambiguous,
    validation_ratios_match_split_type,
)
from finetuning.config.yaml.document import ValidationIssue

Rule = Callable[[Any], Iterator[ValidationIssue]]


def evaluation_requires_validation_data(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject evaluation without validation data."""
    strategy, kind = run.training_args.eval_strategy, run.data_conf.validation_data.type
    if strategy != "no" and kind == "NONE":
        yield ValidationIssue(
            ("training_args", "eval_strategy"),
            f'is "{strategy}", but data_conf.validation_data.type is "NONE".',
            "Give validation data, or set eval_strategy: no.",
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


def packing_is_padding_free(run: SFTExperiment) -> Iterator[ValidationIssue]:
    """Reject packing with padded batches."""
    if run.sft_args.packing and run.sft_args.batching == "padded":
        yield ValidationIssue(
            ("sft_args", "packing"),
            "is true, but sft_args.batching is padded: packing requires padding-free batches to keep rows isolated.",
            "Set batching: auto, or packing: false.",
        )


def exactly_one_bit_width(run: Experiment) -> Iterator[ValidationIssue]:
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


def only_one_mixed_precision_dtype(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject bf16 together with fp16."""
    if run.training_args.bf16 and run.training_args.fp16:
        yield ValidationIssue(("training_args", "fp16"), "is true, and so is training_args.bf16; set one of them.")


def batch_size_is_not_searched(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a search for a batch size that would change the total batch size."""
    if (run.training_args.model_extra or {}).get("auto_find_batch_size"):
        yield ValidationIssue(
            ("training_args", "auto_find_batch_size"),
            "would halve the batch and leave the accumulation as it is: the total batch would no longer be"
            " batchsize_conf.total_train_batch_size.",
            "Remove it, and set batchsize_conf.max_per_device_train_batch_size: auto, or to a smaller number.",
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


def schedule_requires_evaluation(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject schedules that follow the validation loss, without evaluation."""
    schedule = run.training_args.lr_scheduler_type
    if schedule in ("reduce_lr_on_plateau", "greedy") and run.training_args.eval_strategy == "no":
        yield ValidationIssue(
            ("training_args", "lr_scheduler_type"), f'"{schedule}" needs training_args.eval_strategy: steps or epoch.'
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
        saves, evaluations = args.save_steps, args.eval_steps or args.logging_steps
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
            f"counts completions, and {total} is no multiple of training_args.num_generations {args.num_generations}.",
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


RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("data_conf", "training_args"), evaluation_requires_validation_data),
    (("data_conf", "training_args"), validation_data_requires_evaluation),
    (("data_conf",), a_sampling_weight_is_positive),
    (("data_conf",), validation_ratios_match_split_type),
    (("data_conf",), dataset_text_options_are_consistent),
    (("data_conf",), only_one_chat_template),
    *STREAM_RULES,
    (("sft_args",), train_on_is_unambiguous),
    (("peft_conf", "quant_conf"), quantized_weights_are_frozen),
    (("sft_args",), packing_is_padding_free),
    (("quant_conf",), exactly_one_bit_width),
    (("training_args",), only_one_mixed_precision_dtype),
    (("run_conf",), remote_code_is_pinned),
    (("training_args",), batch_size_is_not_searched),
    (("training_args",), number_of_steps_is_positive),
    (("training_args",), schedule_requires_evaluation),
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


def check_rules(run: Any, valid: Mapping[str, Any]) -> list[ValidationIssue]:
    """Return the issues of all rules whose sections are valid.

    Args:
        run: an experiment, or a partial one that has its valid sections only.
        valid: the valid sections by name.
    """
    return [
        issue
        for sections, rule in RULES
        if all(name in valid and hasattr(run, name) for name in sections)
        for issue in rule(run)
    ]
