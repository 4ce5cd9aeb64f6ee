"""Chat templates: the named ones, rendering, and marker characters that show where each content went.

`TemplateRenderer` renders conversations with the tokenizer's own Jinja template. `Markers` puts private-use characters
around the contents of messages before rendering and removes them afterwards: what remains is the plain text, and the
positions of the markers are the positions of the contents in it.
"""

# Annotations of transformers leave out the arguments of dict and Callable.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any, cast

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.data.samples import Conversation, JsonObject, Message, Span
from finetuning.errors import DataError, Location, is_input_error
from finetuning.templates import ChatRenderer, LimitedEnvironment, transformers_environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finetuning.data.chat.tool_calls import ToolCallStyle


class TemplateRenderError(ValueError):
    """The chat template failed on a conversation; the message is the template's own."""


REASONING_KEYS = frozenset({"reasoning", "reasoning_content", "thinking"})
_DICT_ATTRIBUTES = frozenset(dir(dict))
_SAFE_ATTRIBUTES = {
    *((str, name) for name in dir(str) if not name.startswith(("_", "format"))),
    *((LoopContext, name) for name in ("index", "index0", "revindex", "revindex0", "first", "last", "length")),
}
"""Attributes that a template may always read: nothing but text comes of them, or a number or truth value of a loop."""

_type_of = cast("Callable[[object], type[object]]", type)
"""`type`, without a cast at each attribute that a template reads."""


class _FastSandbox(LimitedEnvironment):
    """Jinja's sandbox, faster for what chat templates read most: keys of messages, methods of texts, and loops.

    For each attribute that a template reads, the sandbox tests an object against some twenty types, and for each call
    it looks for marks on the function. That takes most of the time of rendering.
    """

    def __init__(self, like: jinja2.Environment):
        super().__init__(like)
        self._is_safe: dict[tuple[type, str], bool] = {}
        self.namespace = self.globals["namespace"]

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        # The tests are of the object's type and the attribute's name: made once for each pair.
        key = (type(obj), attr)
        if key not in self._is_safe:
            self._is_safe[key] = super().is_safe_attribute(obj, attr, value)
        return self._is_safe[key]

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = _type_of(obj)
        # `message.role`: a key that is not also a method of dictionaries.
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (kind, attribute) in _SAFE_ATTRIBUTES:
            return getattr(obj, attribute)
        # `ns.index`, a variable that the template sets itself in a loop. transformers checks names in its subclass.
        if issubclass(kind, Namespace) and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(__self: _FastSandbox, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = __obj if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str else None
        if method is not None or __obj is __self.namespace:
            # Variables of the surrounding loop or block, which compiled templates pass with each call.
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            if method is None:
                __self._count_size(1)
            else:
                __self.count_method(method.__name__, cast("str", method.__self__), *args, **kwargs)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


class TemplateRenderer:
    """Renders conversations as the tokenizer's `apply_chat_template` does, which is what inference servers call."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Check the syntax of the tokenizer's chat template.

        Raises:
            DataError: there is no chat template, or it is not valid Jinja.
        """
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and data_conf.chat_template_name is keep-original;"
                " choose a named template"
            )
        self.tokenizer = tokenizer
        self._chat = ChatRenderer(tokenizer)
        self._plain: dict[str, tuple[_FastSandbox, jinja2.Template, JsonObject]] = {}
        self._check_syntax()

    def _check_syntax(self) -> None:
        try:
            self.text([{"role": "user", "content": "a"}])
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
        except TemplateRenderError:
            # A template may well reject a conversation of one message; only its syntax matters here.
            return

    def text(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: list[JsonObject] | None = None,
        kwargs: JsonObject | None = None,
    ) -> str:
        """Render messages; with `prompt`, append the generation prompt.

        Raises:
            TemplateRenderError: the template failed on these messages.
        """
        try:
            return self._chat.text(messages, prompt=prompt, tools=tools, kwargs=kwargs)
        except BaseException as error:
            # A template fails in any way on a conversation that it was not written for.
            if is_input_error(error) and not isinstance(error, jinja2.TemplateSyntaxError):
                text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
                raise TemplateRenderError(text or type(error).__name__) from None
            raise

    def texts(self, conversations: Sequence[Conversation]) -> list[str | TemplateRenderError]:
        """Render conversations; those on which the template failed give the error instead of a text."""
        return [self._text_or_error(row) for row in conversations]

    def _text_or_error(self, conversation: Conversation) -> str | TemplateRenderError:
        try:
            return self.text(conversation.messages, tools=conversation.tools, kwargs=conversation.template_kwargs)
        except TemplateRenderError as error:
            return error

    def plain_texts(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """Render conversations whose messages have a role and a text only, without tools or template arguments.

        The texts are those of `texts`, in a quarter of the time. None for those on which the template failed.
        """
        sandbox, template, variables = self._plain_template()
        texts: list[str | None] = []
        for conversation in conversations:
            # Not `render`, which copies the variables several times and takes longer for it than a short template.
            context = template.new_context({**variables, "messages": conversation.messages}, shared=True)
            sandbox.start()
            try:
                text = "".join(template.root_render_func(context))
                # Half a surrogate pair is no character, and no tokenizer takes it.
                texts.append(text if text.isascii() or text.encode("utf-8") else None)
            except BaseException as error:
                if is_input_error(error):
                    texts.append(None)
                    continue
                raise
        return texts

    def _plain_template(self) -> tuple[_FastSandbox, jinja2.Template, JsonObject]:
        """Return the chat template, compiled for a faster sandbox, and the variables that each conversation has."""
        source = self.tokenizer.get_chat_template(None, None)
        if source not in self._plain:
            sandbox = _FastSandbox(like=transformers_environment())
            template = sandbox.compiled(source)
            variables: JsonObject = {**template.globals, **self.tokenizer.special_tokens_map}
            variables |= {"tools": None, "documents": None, "add_generation_prompt": False}
            self._plain[source] = sandbox, template, variables
        return self._plain[source]

    def generation_spans(
        self, messages: Sequence[Message], tools: list[JsonObject] | None, kwargs: JsonObject
    ) -> list[Span]:
        """Return the character spans that the template encloses in `{% generation %}` blocks."""
        return self._chat.generation_spans(messages, tools, kwargs)

    @cached_property
    def has_generation_blocks(self) -> bool:
        """Whether the template itself says what the model writes, with `{% generation %}` blocks."""
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", str(cast("object", self.tokenizer.chat_template))))

    @cached_property
    def _syntax_trees(self) -> list[nodes.Template]:
        sandbox, _, _ = self._plain_template()
        templates = cast("str | dict[str, str]", self.tokenizer.chat_template)
        return [sandbox.parse(each) for each in ([templates] if isinstance(templates, str) else templates.values())]

    @cached_property
    def message_keys(self) -> frozenset[str] | None:
        """The names in the template that may be keys of messages; None if it prints whole messages as JSON."""
        names: set[str] = set()
        for tree in self._syntax_trees:
            loops = [loop for loop in tree.find_all(nodes.For) if "messages" in " ".join(_variables_of(loop.iter))]
            printed = [item.node for item in tree.find_all(nodes.Filter) if item.name == "tojson"]
            targets = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
            if any(isinstance(value, nodes.Name) and value.name in targets for value in printed):
                return None
            names |= {attribute.attr for attribute in tree.find_all(nodes.Getattr)}
            names |= {constant.value for constant in tree.find_all(nodes.Const) if isinstance(constant.value, str)}
        # transformers copies the reasoning to each of these names.
        return frozenset(names | REASONING_KEYS if names & REASONING_KEYS else names)

    @cached_property
    def omits_reasoning(self) -> bool:
        """Whether the template reads none of the keys in which messages hold their reasoning."""
        return self.message_keys is not None and not self.message_keys & REASONING_KEYS

    @cached_property
    def tool_call_style(self) -> ToolCallStyle:
        """How the template expects tool calls."""
        from finetuning.data.chat.tool_calls import detect_style

        return detect_style(self)

    @cached_property
    def training_template(self) -> str | None:
        """The name of TRL's version of the template for training, if there is one."""
        source = cast("object", self.tokenizer.chat_template)
        return training_template(source) if isinstance(source, str) else None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads, such as `tools`."""
        return frozenset[str]().union(*map(meta.find_undeclared_variables, self._syntax_trees))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokenizer's special tokens, longest first."""
        return special_tokens_of(self.tokenizer)


def special_tokens_of(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return a tokenizer's special tokens, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return tuple(sorted(names - {""}, key=len, reverse=True))


def _variables_of(expression: nodes.Node) -> list[str]:
    names = [expression] if isinstance(expression, nodes.Name) else expression.find_all(nodes.Name)
    return [name.name for name in names]


# Unicode's two supplementary private use areas (planes 15 and 16): no text should use them, so a template passes them
# through as it does letters. Two sets, because a text that does use one area can still be marked with the other.
_PRIVATE_USE_AREAS = (0xF0000, 0x100000)
_AREA_SIZE = 0xFFFE
_MARKERS_PER_MESSAGE = 3


@dataclass(frozen=True)
class StrippedText:
    """A rendered text without its markers, and the position in it of each marker that occurred exactly once."""

    text: str
    positions: dict[str, int]
    repeated: dict[str, int] = field(default_factory=dict[str, int])
    """The first position of each marker that occurred several times: templates repeat the names of functions."""

    def after(self, marker: str) -> str:
        """Return the text from a marker on."""
        return self.text[self.first(marker) :]

    def first(self, marker: str) -> int:
        """Return the first position of a marker, -1 if it does not occur."""
        return self.positions.get(marker, self.repeated.get(marker, -1))


@dataclass(frozen=True)
class Markers:
    """A set of marker characters, three for each message; with `base` None it is empty and changes no text."""

    base: int | None
    """The code point of the first marker."""

    @staticmethod
    def absent_from(text: str, num_messages: int) -> Markers | None:
        """Return markers for so many messages of which none occurs in the text; None if there are none."""
        for markers in _ALL_MARKERS:
            fits = num_messages <= _AREA_SIZE // _MARKERS_PER_MESSAGE
            if fits and (text.isascii() or not markers._pattern.search(text)):
                return markers
        return None

    def before_content(self, index: int) -> str:
        """Return the marker before the content of a message."""
        return self._marker(index, 0)

    def after_content(self, index: int) -> str:
        """Return the marker after the content of a message."""
        return self._marker(index, 1)

    def after_call(self, index: int) -> str:
        """Return the marker after the name of the last function that a message calls."""
        return self._marker(index, 2)

    def insert(self, messages: Sequence[Message], *, before: bool = True) -> list[Message]:
        """Return the messages with markers around each content, those before it only with `before`.

        Markers go inside the outer white space of a content, so that a template that trims a content trims it alike.
        """
        if self.base is None:
            return list(messages)
        return [self._mark_message(message, index, before) for index, message in enumerate(messages)]

    def strip(self, text: str) -> StrippedText:
        """Remove the markers from a rendered text, and return their positions."""
        if self.base is None:
            return StrippedText(text, {})
        positions: dict[str, int] = {}
        repeated: dict[str, int] = {}
        for num_removed, match in enumerate(self._pattern.finditer(text)):
            marker = match.group()
            if marker in positions:
                repeated[marker] = positions[marker]
            positions.setdefault(marker, match.start() - num_removed)
        for marker in repeated:
            del positions[marker]
        return StrippedText(self._pattern.sub("", text), positions, repeated)

    def _marker(self, index: int, kind: int) -> str:
        return "" if self.base is None else chr(self.base + _MARKERS_PER_MESSAGE * index + kind)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        if self.base is None:
            raise ValueError("an empty set of markers matches nothing")
        return re.compile(f"[{chr(self.base)}-{chr(self.base + _AREA_SIZE - 1)}]")

    def _mark_message(self, message: Message, index: int, before: bool) -> Message:
        marked = dict(message)
        content = message.get("content")
        core = content.strip() if isinstance(content, str) else ""
        if isinstance(content, str) and core:
            start = content.index(core[0])
            opening = self.before_content(index) if before and message["role"] == "assistant" else ""
            rest = content[start + len(core) :]
            marked["content"] = content[:start] + opening + core + self.after_content(index) + rest
        calls = message.get("tool_calls")
        if calls and message["role"] == "assistant":
            call = calls[-1]
            function = dict(call.get("function", call))
            function["name"] += self.after_call(index)
            marked["tool_calls"] = [*calls[:-1], {**call, "function": function} if "function" in call else function]
        return marked


_ALL_MARKERS = tuple(Markers(base) for base in _PRIVATE_USE_AREAS)
DEFAULT_MARKERS = _ALL_MARKERS[0]
"""Markers for texts that are known to contain none of them."""
NO_MARKERS = Markers(None)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the tokens that it needs in the tokenizer."""

    name: ChatTemplateName | None
    """None for a template that the config brings itself."""
    source: str
    special_tokens: tuple[str, ...]
    end_of_turn: str | None
    """The token that ends the assistant's turn. None in a named template means the tokenizer's end-of-sequence
    token; None in any other is detected by rendering (see `end_of_turn.py`)."""


_NAMED_TEMPLATES: Mapping[ChatTemplateName, tuple[tuple[str, ...], str | None]] = {
    ChatTemplateName.MISTRAL_WITH_SYSTEM: ((), None),
    ChatTemplateName.CHAT_ML: (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    ChatTemplateName.PORO: (("<|user|>", "<|assistant|>"), None),
    ChatTemplateName.SIMPLIFIED_LLAMA31: (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
}
"""Special tokens and end-of-turn token by name; the source of each is a file in `templates/`."""


def get_template(name: ChatTemplateName) -> ChatTemplate | None:
    """Return the template of that name; None for `keep-original`."""
    if name not in _NAMED_TEMPLATES:
        return None
    special_tokens, end_of_turn = _NAMED_TEMPLATES[name]
    source = resources.files("finetuning.data.chat").joinpath("templates", f"{name.value}.jinja").read_text("utf-8")
    return ChatTemplate(name, source, special_tokens, end_of_turn)


def default_template(data_conf: DataConfig) -> ChatTemplate | None:
    """Return the template of a tokenizer that has none; None if the config chooses a template, or `keep-original`."""
    is_chosen = data_conf.chat_template is not None or data_conf.chat_template_name is not None
    return None if is_chosen else get_template(ChatTemplateName.MISTRAL_WITH_SYSTEM)


def configured_template(data_conf: DataConfig, own_template: object = None) -> ChatTemplate | None:
    """Return the template that the config sets, by source, file or name; None for the tokenizer's own.

    Args:
        own_template: the template of the loaded tokenizer, which may be that of `default_template`.

    Raises:
        DataError: the template's file cannot be read.
    """
    if data_conf.chat_template is None:
        if data_conf.chat_template_name is not None:
            return get_template(data_conf.chat_template_name)
        default = default_template(data_conf)
        return default if default is not None and own_template == default.source else None
    source = data_conf.chat_template
    if source.startswith(TRL_PREFIX):
        return ChatTemplate(None, _trl_template(source), tuple(data_conf.special_tokens), None)
    # Every template of use has a Jinja expression, and no file name has a brace.
    if "{" not in source:
        try:
            source = Path(source).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise DataError(
                f"{data_conf.chat_template} cannot be read: {reason}", location=Location(key="data_conf.chat_template")
            ) from None
    return ChatTemplate(None, source, tuple(data_conf.special_tokens), None)


TRL_PREFIX = "trl/"
"""Before the name of a chat template that ships with TRL, in `data_conf.chat_template`."""
_FOR_TRAINING = "_training"


def _trl_templates() -> dict[str, Path]:
    """Return the chat templates in TRL's package by name, without importing it."""
    spec = find_spec("trl")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return {path.stem: path for folder in folders for path in sorted(Path(folder, "chat_templates").glob("*.jinja"))}


def _trl_template(name: str) -> str:
    templates = _trl_templates()
    if (path := templates.get(name.removeprefix(TRL_PREFIX))) is not None:
        return path.read_text("utf-8")
    close = difflib.get_close_matches(name.removeprefix(TRL_PREFIX), templates, n=1)
    raise DataError(
        f"TRL has no chat template {name.removeprefix(TRL_PREFIX)}",
        location=Location(key="data_conf.chat_template"),
        hint=f"Did you mean {TRL_PREFIX}{close[0]}?" if close else f"It has {', '.join(templates) or 'none'}.",
    )


def training_template(source: str) -> str | None:
    """Return the name of TRL's version for training of a model's own chat template; None if it has none."""
    templates = _trl_templates()
    for name, path in templates.items():
        version = f"{name}{_FOR_TRAINING}"
        if version in templates and path.read_text("utf-8").strip() == source.strip():
            return f"{TRL_PREFIX}{version}"
    return None
