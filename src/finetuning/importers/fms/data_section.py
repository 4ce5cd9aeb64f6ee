"""Translate the data keys of an fms-hf-tuning job: which rows it reads, and which of their tokens are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetuning.config.yaml.overrides import unescape
from finetuning.importers.translation import Readers, Translation, Values

_CHAT_TEXT = "apply_tokenizer_chat_template"
_CHAT_MASKING = "tokenize_and_apply_chat_template_with_masking"
_JINJA = "apply_custom_jinja_template"
_MASKING_HANDLERS = ("tokenize_and_apply_input_masking", _CHAT_MASKING)
"""Handlers that make the labels themselves."""
_TEXT_KEYS = ("dataset_text_field", "response_template", "instruction_template")


def put_data(out: Translation, readers: Readers) -> None:
    """Set `data_conf`, and `sft_args.train_on`."""
    if out.has("data_config_path"):
        _put_data_config(out, readers)
    else:
        _put_files(out)
    out.put("data_conf.chat_template_name", "keep-original")
    if out.has("chat_template") and "chat_template" in out.values.get("data_conf", {}):
        out.add_note("chat_template", "the data config's own chat template is used")
    else:
        out.put("data_conf.chat_template", unescape(str(out.get("chat_template", ""))) or None)
    out.put("data_conf.special_tokens", out.as_list("add_special_tokens") or None)
    out.put("data_conf.missing_pad_token_strategy", "eos-repurpose")
    out.put("data_conf.on_bad_row", "skip")


def _put_files(out: Translation) -> None:
    if not out.has("training_data_path"):
        out.add_error("training_data_path", "training_data_path or data_config_path is required")
    source = _row_format(out)
    datasets = [{"path": out.get("training_data_path"), **source}]
    out.put("data_conf.training_data", {"type": "CONCATENATION", "datasets": datasets})
    validation: Values = {"type": "NONE"}
    if out.has("validation_data_path"):
        validation = {"type": "CONCATENATION", "datasets": [{"path": out.get("validation_data_path"), **source}]}
    out.put("data_conf.validation_data", validation)
    out.put("sft_args.train_on", _train_on(out))


def _row_format(out: Translation) -> Values:
    """Return the options for the row format; empty where it is auto-detected: input and output, or token ids."""
    field, template, response = (
        out.get(key) for key in ("dataset_text_field", "data_formatter_template", "response_template")
    )
    instruction = out.get("instruction_template")
    # With both templates fms-hf-tuning expects chats; dataset_text_field then only names the column it writes.
    if out.has("dataset_conversation_field") or (instruction and response and not template):
        if instruction or response:
            out.add_note("response_template", "has no effect: the loss mask of chats is made without templates")
        column = out.get("dataset_conversation_field", "messages")
        return {"format": "messages"} | ({} if column == "messages" else {"columns": {column: "messages"}})
    if field and template:
        out.add_error("data_formatter_template", "cannot be combined with dataset_text_field")
    if not field and not template:
        if response:
            out.add_error("response_template", "requires dataset_text_field or data_formatter_template")
        return {}
    if response and out.boolean("packing", False):
        out.add_note("packing", "the response template is applied; fms-hf-tuning trains on all tokens of packed rows")
    if not response and not out.boolean("packing", False) and not out.has("padding_free"):
        key = "dataset_text_field" if field else "data_formatter_template"
        out.add_error(key, "requires response_template, packing or padding_free")
    options = {
        "dataset_text_field": field,
        "data_formatter_template": template,
        "response_template": response,
        "instruction_template": instruction,
    }
    return {"format": "response_template" if response else "text"} | {
        key: value for key, value in options.items() if value
    }


def _train_on(out: Translation) -> str:
    if out.has("dataset_conversation_field") or out.has("instruction_template"):
        return "assistant"
    is_text = out.has("dataset_text_field") or out.has("data_formatter_template")
    return "all" if is_text and not out.has("response_template") else "completions"


def _put_data_config(out: Translation, readers: Readers) -> None:
    """Set `data_conf` from a data config. Its handlers or a response template decide which tokens are trained."""
    for key in ("training_data_path", "validation_data_path"):
        if out.has(key):
            out.add_error(key, "cannot be combined with data_config_path")
    for key in ("data_formatter_template", "dataset_conversation_field"):
        if out.has(key):
            out.add_note(key, "has no effect with data_config_path; set it in the handlers")
    out.values["data_conf"] = dict(readers.data_config(str(out.get("data_config_path"))))
    for source in _datasets(out):
        _put_row_format(out, source)
    if out.has("response_template"):
        out.put("sft_args.train_on", "assistant" if out.has("instruction_template") else "last")
    else:
        out.put("sft_args.train_on", "completions")


def _datasets(out: Translation) -> list[Values]:
    data = out.values["data_conf"]
    sections = [data.get(name) for name in ("training_data", "validation_data")]
    return [source for section in sections if isinstance(section, dict) for source in section.get("datasets", [])]


def _put_row_format(out: Translation, source: Values) -> None:
    handlers = source.get("handlers", [])
    names = [handler["name"] for handler in handlers]
    if set(names) & set(_MASKING_HANDLERS) or _copies_labels(names):
        if out.has("response_template"):
            out.add_note("response_template", f"has no effect for {source['path']}: its handlers make the labels")
    elif not out.has("response_template"):
        _check_all_is_trained(out, names)
        if out.has("dataset_text_field") and _CHAT_TEXT not in names:
            source["dataset_text_field"] = out.get("dataset_text_field")
    elif _CHAT_TEXT in names:
        out.add_note("response_template", "has no effect: the loss mask of chats is made without templates")
        source |= {"handlers": _keep_messages(handlers), "format": "messages"}
    else:
        source |= {key: out.get(key) for key in _TEXT_KEYS if out.has(key)}


def _copies_labels(names: Sequence[str]) -> bool:
    """Return whether the handlers copy input_ids to labels, which trains all tokens."""
    return "tokenize" in names and "duplicate_columns" in names[names.index("tokenize") :]


def _check_all_is_trained(out: Translation, names: Sequence[str]) -> None:
    makes_text = bool(names) and names[-1] in (_CHAT_TEXT, _JINJA, "tokenize")
    if makes_text and not out.boolean("packing", False) and not out.has("padding_free"):
        out.add_error(
            "data_config_path",
            f"handler {names[-1]} makes text rows: set response_template to select the trained part; packing or"
            " padding_free trains on all tokens",
        )


def _keep_messages(handlers: Sequence[Values]) -> list[Values]:
    """Return the handlers that precede the chat template, so that rows stay conversations in the column `messages`.

    Handlers that follow it work on its text and are dropped.
    """
    at = next(index for index, handler in enumerate(handlers) if handler["name"] == _CHAT_TEXT)
    column = _arguments(handlers[at]).get("conversation_column_name")
    before = list(handlers[:at])
    if not column or column == "messages":
        return before
    return [*before, {"name": "rename_columns", "arguments": {"column_mapping": {column: "messages"}}}]


def _arguments(handler: Mapping[str, Any]) -> Values:
    arguments = handler["arguments"]
    return {**arguments, **(arguments.get("fn_kwargs") or {})}


def shortest_handler_limit(out: Translation, limit: int) -> int:
    """Return the maximum length of a row in tokens: the job's, or a lower one that all datasets' handlers agree on.

    Args:
        limit: the job's `max_seq_length`.
    """
    limits = {_handler_limit(source) for source in _datasets(out)}
    lower = sorted(value for value in limits if value is not None and value < limit)
    if not lower:
        return limit
    if len(limits) == 1:
        return lower[0]
    out.add_note(
        "data_config_path", f"its handlers truncate rows to {lower[0]} tokens; here all are truncated to {limit}"
    )
    return limit


def _handler_limit(source: Values) -> int | None:
    for handler in source.get("handlers", []):
        arguments = _arguments(handler)
        if arguments.get("truncation", True):
            for key in ("max_seq_length", "max_length"):
                if isinstance(arguments.get(key), int):
                    return arguments[key]
    return None
