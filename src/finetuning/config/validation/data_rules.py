"""What must agree within `data_conf` and with what is trained of it: one small function for each rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetuning.config.sections.data import DatasetSource, FromDatasets
from finetuning.config.yaml.findings import Finding

_TOLERANCE = 1e-9


def one_choice_of_what_is_trained(run: Any) -> Iterator[Finding]:
    """Completions only, and everything."""
    if run.sft_args.train_on == "all" and run.sft_args.train_on_completions_only:
        yield Finding(
            ("sft_args", "train_on"),
            "is all, but sft_args.train_on_completions_only is true.",
            "Leave one of them out.",
        )


def shares_are_asked_for(run: Any) -> Iterator[Finding]:
    """Shares of datasets that nobody takes, or that are not there."""
    validation = run.data_conf.validation_data
    sources = run.data_conf.training_data.datasets
    takes_shares = isinstance(validation, FromDatasets)
    for index, source in enumerate(sources):
        path = ("data_conf", "training_data", "datasets", index, "validation_ratio")
        if source.validation_ratio and not takes_shares:
            yield Finding(
                path,
                f"is set, but data_conf.validation_data.type is {validation.type}.",
                "Set validation_data.type: FROM_DATASETS.",
            )
        elif source.validation_ratio + (source.train_ratio or 0) > 1 + _TOLERANCE:
            yield Finding(
                path, f"is {source.validation_ratio:g}, and train_ratio {source.train_ratio:g}: more than all."
            )
    if takes_shares and not any(source.validation_ratio for source in sources):
        yield Finding(
            ("data_conf", "validation_data", "type"), "is FROM_DATASETS, but no dataset has a validation_ratio."
        )


def texts_are_made_in_one_way(run: Any) -> Iterator[Finding]:
    """Settings of a dataset that contradict each other."""
    for path, source in _all_sources(run.data_conf):
        if source.instruction_template and not source.response_template:
            yield Finding((*path, "instruction_template"), "needs response_template beside it.")
        if source.data_formatter_template and source.dataset_text_field:
            yield Finding((*path, "data_formatter_template"), "is set, and so is dataset_text_field; set one of them.")
        if source.format == "response_template" and not source.response_template:
            yield Finding((*path, "format"), "is response_template, but the dataset has no response_template.")


def one_chat_template(run: Any) -> Iterator[Finding]:
    """A chat template of one's own and a named one."""
    conf = run.data_conf
    named = conf.chat_template_name if "chat_template_name" in conf.model_fields_set else "keep-original"
    if conf.chat_template and named != "keep-original":
        yield Finding(("data_conf", "chat_template"), "is set, and so is chat_template_name; set one of them.")


def _all_sources(data_conf: Any) -> Iterator[tuple[tuple[str | int, ...], DatasetSource]]:
    for name in ("training_data", "validation_data"):
        for index, source in enumerate(getattr(getattr(data_conf, name), "datasets", ())):
            yield ("data_conf", name, "datasets", index), source
