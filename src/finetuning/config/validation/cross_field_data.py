"""Rules for streaming datasets, for `data_conf`, and for experiment trackers: one function per rule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetuning.config.sections.data import DatasetSource, FromDatasets
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.tracking import report_to_trackers, requested_trackers
from finetuning.config.yaml.document import ValidationIssue

_SHARE = "a fraction of a dataset requires its length, which is not known"
_LOADER = {
    "dataloader_num_workers": "rows are made by a thread of the run, once, and workers would each make all of them",
    "dataloader_persistent_workers": "rows are made by a thread of the run, without workers",
    "ignore_data_skip": "a resumed stream goes on where it was, and passes over what was trained on by itself",
}


def streaming_requires_max_steps(run: Any) -> Iterator[ValidationIssue]:
    """Reject streaming without `max_steps`, or with strategies per epoch."""
    args = run.training_args
    if not run.data_conf.streaming:
        return
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


def streaming_is_only_for_sft(run: Any) -> Iterator[ValidationIssue]:
    """Reject streaming for algorithms other than sft."""
    method = type(run).method_name
    if run.data_conf.streaming and method not in ("", "sft"):
        yield ValidationIssue(
            ("data_conf", "streaming"),
            f"is only valid for sft: the trainer of {method} needs all rows in advance.",
            "Remove it: prepared rows are read from disk as needed; max_rows limits a dataset.",
        )


def streaming_needs_no_full_pass(run: Any) -> Iterator[ValidationIssue]:
    """Reject options that need all rows in advance; warn about streaming options without streaming."""
    conf = run.data_conf
    if not conf.streaming:
        if conf.shuffle_buffer != type(conf).model_fields["shuffle_buffer"].default:
            yield ValidationIssue(
                ("data_conf", "shuffle_buffer"),
                "is ignored without data_conf.streaming: prepared rows are shuffled as a whole.",
                "Remove it, or set data_conf.streaming: true.",
                kind="warning",
            )
        return
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


def streaming_dataloader_args_are_supported(run: Any) -> Iterator[ValidationIssue]:
    """Reject dataloader options that streaming does not support."""
    if not run.data_conf.streaming:
        return
    extra = run.training_args.model_extra or {}
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
    accelerator = extra.get("accelerator_config")
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


def streaming_adapter_needs_no_rows(run: Any) -> Iterator[ValidationIssue]:
    """Reject adapters that read all rows before the first step."""
    kwargs = getattr(run.peft_conf, "peft_kwargs", {})
    if not run.data_conf.streaming:
        return
    if kwargs.get("init_lora_weights") == "eva":
        yield ValidationIssue(
            ("peft_conf", "peft_kwargs", "init_lora_weights"),
            "is eva, which looks at rows before training, but data_conf.streaming is true.",
            "Leave it out, or leave streaming out.",
        )
    if kwargs.get("alora_invocation_tokens") or getattr(run.peft_conf, "alora_invocation_string", None):
        yield ValidationIssue(
            ("peft_conf", "peft_type"),
            "switches the adapter on by an invocation, which every row is shown to hold before training, but"
            " data_conf.streaming is true.",
            "Leave streaming out.",
        )


STREAM_RULES = (
    (("data_conf",), streaming_is_only_for_sft),
    (("data_conf",), streaming_needs_no_full_pass),
    (("data_conf", "training_args"), streaming_requires_max_steps),
    (("data_conf", "training_args"), streaming_dataloader_args_are_supported),
    (("data_conf", "peft_conf"), streaming_adapter_needs_no_rows),
)
"""The rules for streaming and the sections that each of them reads."""


_TOLERANCE = 1e-9


def train_on_is_unambiguous(run: Any) -> Iterator[ValidationIssue]:
    """Reject contradictory options for the loss mask."""
    if run.sft_args.train_on == "all" and run.sft_args.train_on_completions_only:
        yield ValidationIssue(
            ("sft_args", "train_on"),
            "is all, but sft_args.train_on_completions_only is true.",
            "Leave one of them out.",
        )


def validation_ratios_match_split_type(run: Any) -> Iterator[ValidationIssue]:
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


def dataset_text_options_are_consistent(run: Any) -> Iterator[ValidationIssue]:
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


def only_one_chat_template(run: Any) -> Iterator[ValidationIssue]:
    """Reject a custom chat template together with a built-in one."""
    conf = run.data_conf
    named = conf.chat_template_name if "chat_template_name" in conf.model_fields_set else "keep-original"
    if conf.chat_template and named != "keep-original":
        yield ValidationIssue(("data_conf", "chat_template"), "is set, and so is chat_template_name; set one of them.")


def _all_sources(data_conf: Any) -> Iterator[tuple[tuple[str | int, ...], DatasetSource]]:
    for name in ("training_data", "validation_data"):
        for index, source in enumerate(getattr(getattr(data_conf, name), "datasets", ())):
            yield ("data_conf", name, "datasets", index), source


_USER_INFO = re.compile(r"^[\w+.-]+://[^/?#]*@")


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
    """Reject Aim without exactly one repository, and `all`, which depends on the installed packages."""
    if "all" in report_to_trackers(run.training_args.report_to):
        yield ValidationIssue(
            ("training_args", "report_to"), "must name its trackers; all is none.", "Write [tensorboard]."
        )
    if "aim" not in requested_trackers(run):
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
