"""What must agree between sections: one small function for each rule.

A rule sees the sections that are right in themselves, so that it speaks up even when others are not.
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
    one_chat_template,
    one_choice_of_what_is_trained,
    shares_are_asked_for,
    texts_are_made_in_one_way,
    trackers_have_a_place,
    tracking_address_holds_no_password,
)
from finetuning.config.yaml.document import ValidationIssue

Rule = Callable[[Any], Iterator[ValidationIssue]]


def evaluation_needs_data(run: Experiment) -> Iterator[ValidationIssue]:
    """Evaluation with nothing to evaluate on."""
    strategy, kind = run.training_args.eval_strategy, run.data_conf.validation_data.type
    if strategy != "no" and kind == "NONE":
        yield ValidationIssue(
            ("training_args", "eval_strategy"),
            f'is "{strategy}", but data_conf.validation_data.type is "NONE".',
            "Give validation data, or set eval_strategy: no.",
        )


def validation_data_is_used(run: Experiment) -> Iterator[ValidationIssue]:
    """Validation data that nothing looks at."""
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


def some_weight_is_positive(run: Experiment) -> Iterator[ValidationIssue]:
    """A mix whose weights are all 0."""
    data = run.data_conf.training_data
    if data.type == "PRECOMPUTE_WEIGHTED_MIX" and all(source.sampling_weight == 0 for source in data.datasets):
        for index, source in enumerate(data.datasets):
            yield ValidationIssue(
                ("data_conf", "training_data", "datasets", index, "sampling_weight"),
                f'is 0 for "{source.path}", as for every dataset: no row would be drawn.',
            )


def quantised_weights_are_frozen(run: Experiment) -> Iterator[ValidationIssue]:
    """All weights trained, though they are quantised."""
    if isinstance(run.quant_conf, BitsAndBytes) and isinstance(run.peft_conf, NoPeft):
        yield ValidationIssue(
            ("peft_conf", "peft_type"),
            "is NO_PEFT, but quant_conf quantises the model: quantised weights cannot be trained.",
            "Choose an adapter such as LORA, or quantization_type: no-quantization.",
        )


def packs_are_not_padded(run: SFTExperiment) -> Iterator[ValidationIssue]:
    """Packed rows that are to be padded."""
    if run.sft_args.packing and run.sft_args.batching == "padded":
        yield ValidationIssue(
            ("sft_args", "packing"),
            "is true, but sft_args.batching is padded: rows of a pack are kept apart only when they lie end to end.",
            "Set batching: auto, or packing: false.",
        )


def one_number_of_bits(run: Experiment) -> Iterator[ValidationIssue]:
    """4 and 8 bit at once, or neither."""
    quant = run.quant_conf
    if isinstance(quant, BitsAndBytes) and quant.load_in_4bit == quant.load_in_8bit:
        both = "load_in_4bit and load_in_8bit are both true" if quant.load_in_4bit else "neither load_in_4bit nor"
        message = both if quant.load_in_4bit else f"{both} load_in_8bit is true"
        yield ValidationIssue(("quant_conf",), f"{message}; set one of them.")


def remote_code_is_pinned(run: Experiment) -> Iterator[ValidationIssue]:
    """Code of the model's authors that runs here, and may be other code tomorrow."""
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


def one_autocast_type(run: Experiment) -> Iterator[ValidationIssue]:
    """bf16 and fp16 at once."""
    if run.training_args.bf16 and run.training_args.fp16:
        yield ValidationIssue(("training_args", "fp16"), "is true, and so is training_args.bf16; set one of them.")


def the_batch_stays_planned(run: Experiment) -> Iterator[ValidationIssue]:
    """A search for a batch size that leaves the accumulation as it was, and so changes the total."""
    if (run.training_args.model_extra or {}).get("auto_find_batch_size"):
        yield ValidationIssue(
            ("training_args", "auto_find_batch_size"),
            "would halve the batch and leave the accumulation as it is: the total batch would no longer be"
            " batchsize_conf.total_train_batch_size.",
            "Remove it, and set batchsize_conf.max_per_device_train_batch_size: auto, or to a smaller number.",
        )


def training_has_an_end(run: Experiment) -> Iterator[ValidationIssue]:
    """No steps, or no passes over the data."""
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


def schedule_can_see_evaluations(run: Experiment) -> Iterator[ValidationIssue]:
    """A learning rate that follows the validation loss, without one."""
    schedule = run.training_args.lr_scheduler_type
    if schedule in ("reduce_lr_on_plateau", "greedy") and run.training_args.eval_strategy == "no":
        yield ValidationIssue(
            ("training_args", "lr_scheduler_type"), f'"{schedule}" needs training_args.eval_strategy: steps or epoch.'
        )


def best_model_can_be_known(run: Experiment) -> Iterator[ValidationIssue]:
    """The best checkpoint asked for, but checkpoints and evaluations do not meet."""
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


def each_loss_has_a_weight(run: Experiment) -> Iterator[ValidationIssue]:
    """More or fewer weights than losses."""
    args = run.training_args
    if isinstance(args, DPOTrainingArgs) and args.loss_weights is not None:
        losses = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
        if len(args.loss_weights) != len(losses):
            yield ValidationIssue(
                ("training_args", "loss_weights"),
                f"has {len(args.loss_weights)} weights for {len(losses)} losses in training_args.loss_type.",
            )


def answers_have_neighbours(run: Experiment) -> Iterator[ValidationIssue]:
    """KTO one row at a time, which leaves no other answer to estimate the divergence from."""
    args, batch = run.training_args, run.batchsize_conf
    if isinstance(args, KTOTrainingArgs) and args.loss_type == "kto" and batch.max_per_device_train_batch_size == 1:
        yield ValidationIssue(
            ("batchsize_conf", "max_per_device_train_batch_size"),
            "is 1, but KTO estimates the divergence from the reference with the answers of other rows of the batch.",
            "Set 2 or more, or training_args.loss_type: apo_zero_unpaired.",
        )


def groups_are_whole(run: Experiment) -> Iterator[ValidationIssue]:
    """A total batch that cuts through the completions of one prompt."""
    args, total = run.training_args, run.batchsize_conf.total_train_batch_size
    if not isinstance(args, GRPOTrainingArgs) or {"generation_batch_size", "steps_per_generation"} & set(
        args.model_extra or {}
    ):
        return
    if rest := total % args.num_generations:
        nearest = [str(one) for one in (total - rest, total - rest + args.num_generations) if one]
        yield ValidationIssue(
            ("batchsize_conf", "total_train_batch_size"),
            f"counts completions, and {total} is no multiple of training_args.num_generations {args.num_generations}.",
            f"The nearest that {'are' if len(nearest) > 1 else 'is'}: {' and '.join(nearest)}.",
        )


def controllers_are_sound(run: Experiment) -> Iterator[ValidationIssue]:
    """Rules of a trainer controller that could never be followed."""
    if isinstance(run.trainer_controller, TrainerController):
        yield from check_controllers(run.trainer_controller, ("trainer_controller",))


def deepspeed_agrees_on_the_batch(run: Experiment) -> Iterator[ValidationIssue]:
    """Batch sizes in an inline DeepSpeed config that contradict `batchsize_conf`."""
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
            f"batchsize_conf asks for a total of {total} with at most {most} rows a device",
        ),
        (
            "gradient_accumulation_steps",
            lambda value: total % value != 0,
            f"batchsize_conf.total_train_batch_size is {total}, which it does not divide",
        ),
    ]


RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("data_conf", "training_args"), evaluation_needs_data),
    (("data_conf", "training_args"), validation_data_is_used),
    (("data_conf",), some_weight_is_positive),
    (("data_conf",), shares_are_asked_for),
    (("data_conf",), texts_are_made_in_one_way),
    (("data_conf",), one_chat_template),
    *STREAM_RULES,
    (("sft_args",), one_choice_of_what_is_trained),
    (("peft_conf", "quant_conf"), quantised_weights_are_frozen),
    (("sft_args",), packs_are_not_padded),
    (("quant_conf",), one_number_of_bits),
    (("training_args",), one_autocast_type),
    (("run_conf",), remote_code_is_pinned),
    (("training_args",), the_batch_stays_planned),
    (("training_args",), training_has_an_end),
    (("training_args",), schedule_can_see_evaluations),
    (("training_args",), best_model_can_be_known),
    (("training_args",), each_loss_has_a_weight),
    (("training_args", "batchsize_conf"), answers_have_neighbours),
    (("training_args", "batchsize_conf"), groups_are_whole),
    (("training_args", "batchsize_conf"), deepspeed_agrees_on_the_batch),
    (("trainer_controller",), controllers_are_sound),
    (("tracking",), tracking_address_holds_no_password),
    (("tracking", "training_args"), trackers_have_a_place),
)
"""The rules, each with the sections that it reads."""


def check_rules(run: Any, right: Mapping[str, Any]) -> list[ValidationIssue]:
    """What the rules find, of those whose sections are all right.

    Args:
        run: an experiment, or one put together of its right sections only.
        right: the names of the sections that are right.
    """
    return [
        finding
        for sections, rule in RULES
        if all(name in right and hasattr(run, name) for name in sections)
        for finding in rule(run)
    ]
