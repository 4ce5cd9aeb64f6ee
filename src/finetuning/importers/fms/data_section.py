"""A job of fms-hf-tuning that names a data config: what the job's own keys mean beside it.

The data keys of a job of fms-hf-tuning: which format they say the rows have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetuning.config.yaml.overrides import unescape
from finetuning.importers.translation import Translation

if TYPE_CHECKING:
    from finetuning.importers.translation import Readers

_CHAT_TEXT = "apply_tokenizer_chat_template"
_CHATS = "tokenize_and_apply_chat_template_with_masking"
_JINJA = "apply_custom_jinja_template"
_LABELLED = ("tokenize_and_apply_input_masking", _CHATS)
"""Handlers that say themselves what is trained."""
_TEXT_KEYS = ("dataset_text_field", "response_template", "instruction_template")
Dataset = dict[str, Any]


def put_data_config(out: Translation, readers: Readers) -> None:
    """`data_conf` of a data config, and what of its rows is trained: its handlers say it, or a response template."""
    for key in ("training_data_path", "validation_data_path"):
        if out.has(key):
            out.wrong(key, "does not go with data_config_path")
    for key in ("data_formatter_template", "dataset_conversation_field"):
        if out.has(key):
            out.note(key, "changes nothing with data_config_path: the handlers say it")
    out.values["data_conf"] = dict(readers.data_config(str(out.get("data_config_path"))))
    datasets = _datasets(out)
    for source in datasets:
        _put_mask(out, source)
    if out.has("response_template"):
        out.put("sft_args.train_on", "assistant" if out.has("instruction_template") else "last")
    else:
        out.put("sft_args.train_on", "completions")


def handlers_limit(out: Translation, limit: int) -> int:
    """The most tokens of a row: the job's, or fewer where the tokenising handlers of its data config say so."""
    found = {_limit(source) for source in _datasets(out)}
    said = sorted(one for one in found if one is not None and one < limit)
    if not said:
        return limit
    if len(found) == 1:
        return said[0]
    out.note("data_config_path", f"its handlers cut rows after {said[0]} tokens; here all are cut after {limit}")
    return limit


def _datasets(out: Translation) -> list[Dataset]:
    data = out.values["data_conf"]
    sections = [data.get(name) for name in ("training_data", "validation_data")]
    return [one for section in sections if isinstance(section, dict) for one in section.get("datasets", [])]


def _put_mask(out: Translation, source: Dataset) -> None:
    handlers = source.get("handlers", [])
    names = [one["name"] for one in handlers]
    if set(names) & set(_LABELLED) or _labels_copied(names):
        if out.has("response_template"):
            out.note("response_template", f"changes nothing for {source['path']}, whose handlers say what is trained")
    elif not out.has("response_template"):
        _check_all_is_trained(out, names)
        if out.has("dataset_text_field") and _CHAT_TEXT not in names:
            source["dataset_text_field"] = out.get("dataset_text_field")
    elif _CHAT_TEXT in names:
        out.note("response_template", "what is trained of a conversation is found without templates")
        source |= {"handlers": _as_chats(handlers), "format": "messages"}
    else:
        source |= {key: out.get(key) for key in _TEXT_KEYS if out.has(key)}


def _labels_copied(names: list[str]) -> bool:
    """Whether all tokens are trained, as input_ids are copied to labels."""
    return "tokenize" in names and "duplicate_columns" in names[names.index("tokenize") :]


def _check_all_is_trained(out: Translation, names: list[str]) -> None:
    makes_texts = bool(names) and names[-1] in (_CHAT_TEXT, _JINJA, "tokenize")
    if makes_texts and not out.truth("packing", False) and not out.has("padding_free"):
        out.wrong(
            "data_config_path",
            f"its rows are texts, made by {names[-1]}: which part is trained needs a response_template; packing or"
            " padding_free trains on all of them",
        )


def _as_chats(handlers: list[Dataset]) -> list[Dataset]:
    """The handlers, with the conversation in place of its text; what comes after the text was made is of the text."""
    at = next(index for index, one in enumerate(handlers) if one["name"] == _CHAT_TEXT)
    arguments = handlers[at]["arguments"]
    column = {**arguments, **(arguments.get("fn_kwargs") or {})}.get("conversation_column_name")
    if not column or column == "messages":
        return handlers[:at]
    return [*handlers[:at], {"name": "rename_columns", "arguments": {"column_mapping": {column: "messages"}}}]


def _limit(source: Dataset) -> int | None:
    for handler in source.get("handlers", []):
        arguments = {**handler["arguments"], **(handler["arguments"].get("fn_kwargs") or {})}
        if arguments.get("truncation", True):
            for key in ("max_seq_length", "max_length"):
                if isinstance(arguments.get(key), int):
                    return arguments[key]
    return None


def put_data(out: Translation, readers: Readers) -> None:
    """`data_conf`, and of `sft_args` what is trained."""
    if out.has("data_config_path"):
        put_data_config(out, readers)
    else:
        _put_files(out)
    out.put("data_conf.chat_template_name", "keep-original")
    if out.has("chat_template") and "chat_template" in out.values.get("data_conf", {}):
        out.note("chat_template", "the data config's own is used")
    else:
        out.put("data_conf.chat_template", unescape(str(out.get("chat_template", ""))) or None)
    out.put("data_conf.special_tokens", out.items("add_special_tokens") or None)
    out.put("data_conf.missing_pad_token_strategy", "eos-repurpose")
    out.put("data_conf.on_bad_row", "skip")


def _put_files(out: Translation) -> None:
    if not out.has("training_data_path"):
        out.wrong("training_data_path", "a job needs training_data_path or data_config_path")
    source = _source(out)
    datasets = [{"path": out.get("training_data_path"), **source}]
    out.put("data_conf.training_data", {"type": "CONCATENATION", "datasets": datasets})
    validation: dict[str, Any] = {"type": "NONE"}
    if out.has("validation_data_path"):
        validation = {"type": "CONCATENATION", "datasets": [{"path": out.get("validation_data_path"), **source}]}
    out.put("data_conf.validation_data", validation)
    out.put("sft_args.train_on", _trained(out))


def _source(out: Translation) -> dict[str, Any]:
    """How each row is read; nothing where the rows tell it: input and output, or ready token ids."""
    field, template, response = (
        out.get(key) for key in ("dataset_text_field", "data_formatter_template", "response_template")
    )
    instruction = out.get("instruction_template")
    # With both templates rows are chats there, and dataset_text_field is but a name for what is made of them.
    if out.has("dataset_conversation_field") or (instruction and response and not template):
        if instruction or response:
            out.note("response_template", "what is trained of a conversation is found without templates")
        column = out.get("dataset_conversation_field", "messages")
        return {"format": "messages"} | ({} if column == "messages" else {"columns": {column: "messages"}})
    if field and template:
        out.wrong("data_formatter_template", "does not go with dataset_text_field")
    if not field and not template:
        if response:
            out.wrong("response_template", "needs dataset_text_field or data_formatter_template")
        return {}
    if response and out.truth("packing", False):
        out.note("packing", "the response template is kept to; there packed rows are trained whole")
    if not response and not out.truth("packing", False) and not out.has("padding_free"):
        key = "dataset_text_field" if field else "data_formatter_template"
        out.wrong(key, "needs response_template, packing or padding_free")
    given = {
        "dataset_text_field": field,
        "data_formatter_template": template,
        "response_template": response,
        "instruction_template": instruction,
    }
    return {"format": "response_template" if response else "text"} | {
        key: value for key, value in given.items() if value
    }


def _trained(out: Translation) -> str:
    if out.has("dataset_conversation_field") or out.has("instruction_template"):
        return "assistant"
    texts = out.has("dataset_text_field") or out.has("data_formatter_template")
    return "all" if texts and not out.has("response_template") else "completions"
