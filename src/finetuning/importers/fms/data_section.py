"""Translate the data keys of an fms-hf-tuning job: which rows it reads, and which of their tokens are trained."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetuning.config.sections.data import DatasetSource
from finetuning.config.yaml.overrides import unescape
from finetuning.data.open_dataset import unparsed_rows
from finetuning.data.samples import Row
from finetuning.data.sources import Line
from finetuning.data.text_template import TextTemplate, TextTemplateError
from finetuning.errors import FinetuningError
from finetuning.importers.translation import Readers, Translation, Values

_CHAT_TEXT = "apply_tokenizer_chat_template"
_CHAT_MASKING = "tokenize_and_apply_chat_template_with_masking"
_JINJA = "apply_custom_jinja_template"
_MASKING_HANDLERS = ("tokenize_and_apply_input_masking", _CHAT_MASKING)
"""Handlers that make the labels themselves."""
_TOKENIZING = (*_MASKING_HANDLERS, "tokenize")
_SKIP = "skip_samples_with_large_columns"
_TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask")
_ROW_OF_MESSAGES = re.compile(r"""messages(\[\s*(['"])messages\2\s*\]|\.messages\b)""")
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
    _put_messages_loop(out)
    out.put("data_conf.special_tokens", out.as_list("add_special_tokens") or None, "add_special_tokens")
    out.put("data_conf.missing_pad_token_strategy", "eos-repurpose")
    out.put("data_conf.on_bad_row", "skip")
    out.put("data_conf.max_lost_fraction", out.get("max_lost_fraction"))


def _put_messages_loop(out: Translation) -> None:
    """Let a chat template loop over `messages`: in fms-hf-tuning that may be the row, with the conversation in it."""
    data = out.values.get("data_conf", {})
    template = data.get("chat_template")
    if isinstance(template, str) and _ROW_OF_MESSAGES.search(template):
        data["chat_template"] = _ROW_OF_MESSAGES.sub("messages", template)
        out.add_note("chat_template", "messages['messages'] is read as messages, the conversation of a row")


def _put_files(out: Translation) -> None:
    if not out.has("training_data_path"):
        out.add_error("training_data_path", "training_data_path or data_config_path is required")
    source = _row_format(out)
    datasets = [{"path": out.get("training_data_path"), **source}]
    out.put("data_conf.training_data", {"type": "CONCATENATION", "datasets": datasets}, "training_data_path")
    validation: Values = {"type": "NONE"}
    if out.has("validation_data_path"):
        validation = {"type": "CONCATENATION", "datasets": [{"path": out.get("validation_data_path"), **source}]}
        if _holds_tokens(out.get("training_data_path")) and _holds_tokens(out.get("validation_data_path")) is False:
            out.add_error("validation_data_path", "must hold input_ids and labels, as training_data_path does")
    out.put("data_conf.validation_data", validation, "validation_data_path")
    out.put("sft_args.train_on", _train_on(out), "response_template")


def _holds_tokens(path: Any) -> bool | None:
    """Return whether the first row of local data is tokenized already; None if that cannot be read."""
    if not isinstance(path, str) or not glob.glob(path):
        return None
    try:
        first = next(unparsed_rows(DatasetSource(path=path), "training_data_path"), None)
    except FinetuningError:
        return None
    row = first.row() if isinstance(first, Line) else first
    return {"input_ids", "labels"} <= set(row.values) if isinstance(row, Row) else None


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
    if template:
        try:
            TextTemplate(unescape(str(template)))
        except TextTemplateError as error:
            out.add_error("data_formatter_template", str(error))
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
    out.sources["data_conf"] = "data_config_path"
    for source in _datasets(out):
        _put_row_format(out, source)
    if out.has("response_template"):
        train_on = "assistant" if out.has("instruction_template") else "last"
    else:
        train_on = "completions"
    out.put("sft_args.train_on", train_on, "response_template")


def _datasets(out: Translation) -> list[Values]:
    data = out.values["data_conf"]
    sections = [data.get(name) for name in ("training_data", "validation_data")]
    return [source for section in sections if isinstance(section, dict) for source in section.get("datasets", [])]


def _put_row_format(out: Translation, source: Values) -> None:
    handlers = source.get("handlers", [])
    names = [handler["name"] for handler in handlers]
    if (
        set(names) & set(_MASKING_HANDLERS)
        or _makes_labels(handlers)
        or (not handlers and _holds_tokens(source["path"]))
    ):
        # dataset_text_field names the column of texts: there is none.
        if out.has("response_template"):
            made = "its handlers make the labels" if handlers else "its rows have labels"
            out.add_note("response_template", f"has no effect for {source['path']}: {made}")
    elif not out.has("response_template"):
        _check_all_is_trained(out, names)
        if out.has("dataset_text_field") and _CHAT_TEXT not in names:
            source["dataset_text_field"] = out.get("dataset_text_field")
    elif _CHAT_TEXT in names:
        out.add_note("response_template", "has no effect: the loss mask of chats is made without templates")
        source |= {"handlers": _keep_messages(handlers), "format": "messages"}
    else:
        source |= {key: out.get(key) for key in _TEXT_KEYS if out.has(key)}


def _makes_labels(handlers: Sequence[Values]) -> bool:
    """Return whether a handler copies input_ids, of the file or of `tokenize`, to labels, which trains all tokens."""
    return any(
        handler["name"] == "duplicate_columns" and _arguments(handler).get("new_column_name") == "labels"
        for handler in handlers
    )


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


def put_length_filter(out: Translation, limit: int) -> None:
    """Set `sft_args`: the longest row in tokens, and whether longer ones are truncated or filtered out.

    Handlers that follow the tokenization can filter rows by their number of tokens. That works for all datasets alike.
    """
    filters = {_pop_length_filter(source) for source in _datasets(out)}
    lengths = sorted(length for length in filters if length is not None and length < limit)
    if len(filters) > 1 and lengths:
        out.add_error(
            "data_config_path", f"only some datasets filter rows by {_SKIP} of {lengths[0]} tokens; all of them must"
        )
    out.put("sft_args.max_seq_length", lengths[0] if lengths else limit, "max_seq_length")
    out.put("sft_args.length_handling", "filter" if lengths else "truncate", "max_seq_length")


def _pop_length_filter(source: Values) -> int | None:
    """Remove the handlers that filter by the number of tokens, and return the lowest number of tokens they allow."""
    kept: list[Values] = []
    lengths: list[int] = []
    for handler in source.get("handlers", []):
        arguments = _arguments(handler)
        length = arguments.get("max_allowed_length")
        follows = any(before["name"] in _TOKENIZING for before in kept)
        if follows and handler["name"] == _SKIP and arguments.get("column_name") in _TOKEN_COLUMNS and length:
            lengths.append(length)
        else:
            kept.append(handler)
    if lengths:
        source["handlers"] = kept
    return min(lengths, default=None)


def _handler_limit(source: Values) -> int | None:
    for handler in source.get("handlers", []):
        arguments = _arguments(handler)
        if arguments.get("truncation", True):
            for key in ("max_seq_length", "max_length"):
                if isinstance(arguments.get(key), int):
                    return arguments[key]
    return None
