"""Conversations to text, by the tokenizer's own chat template.

The chat templates that have a name, and the config's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.data.samples import Conversation, Message
from finetuning.errors import DataError, Location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What a template can raise on a conversation that it was not written for.
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError)


class TemplateRenderError(ValueError):
    """The chat template refuses a conversation; the message is the template's own."""


class TemplateRenderer:
    """Renders conversations exactly as the tokenizer's `apply_chat_template` does when the model is served."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Checks the template.

        Raises:
            DataError: there is no chat template, or it is no valid Jinja.
        """
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and data_conf.chat_template_name is keep-original;"
                " choose a named template"
            )
        self.tokenizer = tokenizer
        self._check_syntax()

    def _check_syntax(self) -> None:
        try:
            self.text([{"role": "user", "content": "a"}])
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from None
        except TemplateRenderError:
            return

    def text(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The rendered text; with `prompt`, up to where the model begins to write.

        Raises:
            CannotRender: the template does not take these messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **(kwargs or {})
            )
        except jinja2.TemplateSyntaxError:
            raise
        except _TEMPLATE_FAULTS as error:
            raise TemplateRenderError(
                f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
            ) from None

    def texts(self, conversations: Sequence[Conversation]) -> list[str | TemplateRenderError]:
        """The text of each conversation, or what the template says against it; plain ones are rendered together."""
        plain = [index for index, one in enumerate(conversations) if not one.tools and not one.template_kwargs]
        together: dict[int, str] = {}
        if len(plain) > 1:
            try:
                texts = self.tokenizer.apply_chat_template(
                    [conversations[index].messages for index in plain], tokenize=False
                )
                together = dict(zip(plain, texts, strict=True))
            except _TEMPLATE_FAULTS:
                together = {}
        return [
            together[index] if index in together else self._text_or_fault(one)
            for index, one in enumerate(conversations)
        ]

    def _text_or_fault(self, one: Conversation) -> str | TemplateRenderError:
        try:
            return self.text(one.messages, tools=one.tools, kwargs=one.template_kwargs)
        except TemplateRenderError as fault:
            return fault

    def marked_spans(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, kwargs: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """Character spans of what the template puts between its `{% generation %}` marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(None, tools)
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        _, spans = render_jinja_template(
            conversations=[present],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        return [tuple(span) for span in spans[0]]

    @cached_property
    def has_marks(self) -> bool:
        """Whether the template says itself, by `{% generation %}`, what the model writes."""
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", str(self.tokenizer.chat_template)))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokenizer's special tokens, longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return tuple(sorted(names, key=len, reverse=True))


_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE
_KINDS = 3


@dataclass(frozen=True)
class StrippedText:
    """A text without its signs, and the position of each sign in it; signs that came up twice are left out."""

    text: str
    positions: dict[str, int]

    def after(self, sign: str) -> str:
        return self.text[self.positions[sign] :]


@dataclass(frozen=True)
class Markers:
    """One set of signs; with `first` None there are none, and every text stays as it is."""

    first: int | None

    @staticmethod
    def absent_from(text: str, count: int) -> Markers | None:
        """Signs for so many messages, none of which is in the text; None when there are no such."""
        for signs in _ALL:
            if count <= _PLANE_SIZE // _KINDS and (text.isascii() or not signs._any.search(text)):
                return signs
        return None

    def opening(self, index: int) -> str:
        """The sign before the content of a message."""
        return self._sign(index, 0)

    def closing(self, index: int) -> str:
        """The sign after it."""
        return self._sign(index, 1)

    def calling(self, index: int) -> str:
        """The sign after the name of the last function that a message calls."""
        return self._sign(index, 2)

    def mark(self, messages: Sequence[Message], *, openings: bool = True) -> list[Message]:
        """The messages with signs round each content, inside its outer white space: what trims it trims the same."""
        if self.first is None:
            return list(messages)
        return [self._mark_one(message, index, openings) for index, message in enumerate(messages)]

    def unmark(self, marked: str) -> StrippedText:
        """The text without signs, and where they stood."""
        if self.first is None:
            return StrippedText(marked, {})
        positions: dict[str, int] = {}
        repeated = set()
        for removed, match in enumerate(self._any.finditer(marked)):
            sign = match.group()
            if sign in positions:
                repeated.add(sign)
            positions[sign] = match.start() - removed
        for sign in repeated:
            del positions[sign]
        return StrippedText(self._any.sub("", marked), positions)

    def _sign(self, index: int, kind: int) -> str:
        return "" if self.first is None else chr(self.first + _KINDS * index + kind)

    @cached_property
    def _any(self) -> re.Pattern[str]:
        return re.compile(f"[{chr(self.first)}-{chr(self.first + _PLANE_SIZE - 1)}]")

    def _mark_one(self, message: Message, index: int, openings: bool) -> Message:
        marked = dict(message)
        content = message.get("content")
        core = content.strip() if isinstance(content, str) else ""
        if core:
            start = content.index(core[0])
            before = self.opening(index) if openings and message["role"] == "assistant" else ""
            marked["content"] = content[:start] + before + core + self.closing(index) + content[start + len(core) :]
        calls = message.get("tool_calls")
        if calls and message["role"] == "assistant":
            call = calls[-1]
            function = dict(call.get("function", call))
            function["name"] += self.calling(index)
            marked["tool_calls"] = [*calls[:-1], {**call, "function": function} if "function" in call else function]
        return marked


_ALL = tuple(Markers(first) for first in _PLANES)
SIGNS = _ALL[0]
"""Signs for texts that are known to hold none."""
NO_SIGNS = Markers(None)


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
                f"{data_conf.chat_template} cannot be read: {reason}", place=Location(key="data_conf.chat_template")
            ) from None
    return ChatTemplate(None, source, tuple(data_conf.special_tokens), None)
