"""The chat templates that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from finetuning.config.data import ChatTemplateName


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with what its tokenizer must know.

    `end_of_turn` is the token that ends the assistant's turn; None stands for the tokenizer's end-of-sequence token.
    """

    name: ChatTemplateName
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
    source = resources.files("finetuning.data").joinpath("templates", f"{name.value}.jinja").read_text("utf-8")
    return ChatTemplate(name, source, special_tokens, end_of_turn)
