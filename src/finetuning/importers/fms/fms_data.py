"""The data keys of a job of fms-hf-tuning: which format they say the rows have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetuning.config.yaml.escapes import unescape
from finetuning.importers.fms.data_section import put_data_config
from finetuning.importers.translation import Translation

if TYPE_CHECKING:
    from finetuning.importers.fms.job import Readers


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
