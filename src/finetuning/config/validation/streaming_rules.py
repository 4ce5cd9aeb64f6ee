"""Rules for `data_conf.streaming`: one function per rule. They run only if it is set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import NewPeft
from finetuning.config.yaml.document import ValidationIssue, YamlValue

_SHARE = "a fraction of a dataset requires its length, which is not known"
_LOADER = {
    "dataloader_num_workers": "rows are made by a thread of the run, once, and workers would each make all of them",
    "dataloader_persistent_workers": "rows are made by a thread of the run, without workers",
    "ignore_data_skip": "a resumed stream goes on where it was, and passes over what was trained on by itself",
}


def streaming_requires_max_steps(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject a missing `max_steps`, and strategies per epoch."""
    args = run.training_args
    if args.max_steps <= 0:
        yield ValidationIssue(
            ("training_args", "max_steps"),
            "must be set: the length of an epoch is not known with data_conf.streaming.",
            "Set max_steps, or leave streaming out to train for num_train_epochs.",
        )
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        if getattr(args, name) == "epoch":
            yield ValidationIssue(
                ("training_args", name),
                "is epoch, but the length of an epoch is not known with data_conf.streaming.",
                f"Set {name}: steps.",
            )


def streaming_is_only_for_sft(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject streaming for algorithms other than sft."""
    method = type(run).method_name
    if method not in ("", "sft"):
        yield ValidationIssue(
            ("data_conf", "streaming"),
            f"is only valid for sft: the trainer of {method} needs all rows in advance.",
            "Remove it: prepared rows are read from disk as needed; max_rows limits a dataset.",
        )


def streaming_needs_no_full_pass(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject options that need all rows in advance."""
    conf = run.data_conf
    if conf.prepared:
        yield ValidationIssue(
            ("data_conf", "streaming"),
            "is true, but data_conf.prepared names a dataset that is already prepared.",
            "Remove streaming: prepared rows are read from disk as needed.",
        )
    kind = conf.validation_data.type
    if kind in ("AUTO_SPLIT", "FROM_DATASETS"):
        yield ValidationIssue(
            ("data_conf", "validation_data", "type"),
            f"is {kind}, but data_conf.streaming is true: {_SHARE}.",
            "Put validation rows into a separate file, and set type: CONCATENATION.",
        )
    for index, source in enumerate(conf.training_data.datasets):
        if source.train_ratio is not None:
            yield ValidationIssue(
                ("data_conf", "training_data", "datasets", index, "train_ratio"),
                f"is set, but data_conf.streaming is true: {_SHARE}.",
                "Set max_rows.",
            )


def streaming_dataloader_args_are_supported(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject dataloader options that streaming does not support."""
    extra: Mapping[str, YamlValue] = run.training_args.model_extra or {}
    strategy = extra.get("train_sampling_strategy", "random")
    if strategy != "random":
        yield ValidationIssue(
            ("training_args", "train_sampling_strategy"),
            f"is {strategy}, but data_conf.streaming is true: rows come as data_conf.shuffle_buffer draws them.",
            "Leave it out; padding costs nothing where sft_args.batching is auto.",
        )
    for name, reason in _LOADER.items():
        if extra.get(name):
            yield ValidationIssue(
                ("training_args", name), f"does not go with data_conf.streaming: {reason}.", "Leave it out."
            )
    accelerator: YamlValue = extra.get("accelerator_config")
    named = [
        name
        for name in ("dispatch_batches", "split_batches")
        if isinstance(accelerator, dict) and accelerator.get(name)
    ]
    for name in named:
        yield ValidationIssue(
            ("training_args", "accelerator_config", name),
            "does not go with data_conf.streaming: each process takes its own share of the rows.",
            "Leave it out.",
        )


def streaming_adapter_needs_no_rows(run: Experiment) -> Iterator[ValidationIssue]:
    """Reject adapters that read all rows before the first step."""
    peft = run.peft_conf
    if not isinstance(peft, NewPeft):
        return
    if peft.peft_kwargs.get("init_lora_weights") == "eva":
        yield ValidationIssue(
            ("peft_conf", "peft_kwargs", "init_lora_weights"),
            "is eva, which looks at rows before training, but data_conf.streaming is true.",
            "Leave it out, or leave streaming out.",
        )
    if peft.peft_kwargs.get("alora_invocation_tokens") or peft.alora_invocation_string:
        yield ValidationIssue(
            ("peft_conf", "peft_type"),
            "switches the adapter on by an invocation, which every row is shown to hold before training, but"
            " data_conf.streaming is true.",
            "Leave streaming out.",
        )


STREAMING_RULES = (
    (("data_conf",), streaming_is_only_for_sft),
    (("data_conf",), streaming_needs_no_full_pass),
    (("data_conf", "training_args"), streaming_requires_max_steps),
    (("data_conf", "training_args"), streaming_dataloader_args_are_supported),
    (("data_conf", "peft_conf"), streaming_adapter_needs_no_rows),
)
"""The rules for streaming and the sections that each of them reads."""
