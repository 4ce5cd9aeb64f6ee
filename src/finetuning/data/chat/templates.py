"""The chat templates that have a name, and the config's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.errors import DataError, Place


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with what its tokenizer must know.

    `end_of_turn` is the token that ends the assistant's turn; None stands for the tokenizer's end-of-sequence token,
    or, in a template without a name, for what the template itself shows.
    """

    name: ChatTemplateName | None
    source: str
    special_tokens: tuple[str, ...]
    end_of_turn: str | None


_TOKENS: dict[ChatTemplateName, tuple[tuple[str, ...], str | None]] = {
    ChatTemplateName.MISTRAL_WITH_SYSTEM: ((), None),
    ChatTemplateName.CHAT_ML: (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    ChatTemplateName.PORO: (("<|user|>", "<|assistant|>"), None),
    ChatTemplateName.SIMPLIFIED_LLAMA31: (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
}


def get_template(name: ChatTemplateName) -> ChatTemplate | None:
    """The template of that name; None for `keep-original`."""
    if name not in _TOKENS:
        return None
    special_tokens, end_of_turn = _TOKENS[name]
    source = resources.files("finetuning.data.chat").joinpath("templates", f"{name.value}.jinja").read_text("utf-8")
    return ChatTemplate(name, source, special_tokens, end_of_turn)


def chosen_template(data_conf: DataConfig) -> ChatTemplate | None:
    """The template that the config sets: its own, or one by name; None for the tokenizer's.

    Raises:
        DataError: its file is missing, or is no text.
    """
    if data_conf.chat_template is None:
        return get_template(data_conf.chat_template_name)
    source = data_conf.chat_template
    if "{" not in source:
        try:
            source = Path(source).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise DataError(
                f"{data_conf.chat_template} cannot be read: {reason}", place=Place(key="data_conf.chat_template")
            ) from None
    return ChatTemplate(None, source, tuple(data_conf.special_tokens), None)
