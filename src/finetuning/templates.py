"""Jinja templates, which may come from anybody: Jinja's sandbox with limits on time and size, and chats rendered in it.

`ChatRenderer` renders as the tokenizer's `apply_chat_template` does, which inference servers call.
"""

# Annotations of transformers leave out the arguments of dict and Callable; jinja2 and its nodes are typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from finetuning.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 3.0
"""CPU time in which a template has to render one conversation, or one row. Usual are milliseconds."""
MAX_VALUE = 20_000_000
"""Characters or items that one value in a template may have."""
MAX_TOTAL = 1_000_000_000
"""Characters and items of all values that a template makes for one conversation, or one row."""
_MAX_BITS = 100_000
_PLAIN = (str, int, float, list, tuple, dict, type(None))
_CLOCK_INTERVAL = 64
_TICK = "limit_tick"
_CONCAT = "limit_concat"
_SUM = "limit_sum"


class TemplateLimitError(DataError):
    """A template did too much. It is not rendered for any other row."""

    def __init__(self, message: str | Sequence[Problem], **more: object):
        if isinstance(message, str):
            hint = "Templates render a row in milliseconds. Use one from a source that you trust."
            message = [Problem(f"the template was stopped: {message}", hint=hint)]
        super().__init__(message)


class _Used:
    """What a rendering has used: characters and items, how often it was counted, and the end of its time."""

    __slots__ = ("deadline", "size", "ticks")

    def __init__(self, deadline: float):
        self.size = self.ticks = 0
        self.deadline = deadline


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits on time, and on the size of every value: a template may come from anybody.

    The limits hold in any thread and process, without signals. Loops, calls and macros look at the clock. Operators,
    filters and methods that can make a long text of a short one are refused before they do.

    Args:
        like: an environment to take the options, extensions, filters and globals from.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, like: jinja2.Environment | None = None, **options: object):
        if like is not None:
            options |= {"trim_blocks": like.trim_blocks, "lstrip_blocks": like.lstrip_blocks}
            options |= {"extensions": [type(extension) for extension in like.extensions.values()]}
        super().__init__(**options, finalize=self._count)  # pyright: ignore[reportArgumentType]
        if like is not None:
            self.filters.update(like.filters)
            self.globals.update(like.globals)
        self.globals.pop("lipsum", None)
        for name, size_of in _FILTER_SIZES.items():
            self.filters[name] = self._limited(self.filters[name], size_of)
        self.filters[_TICK] = jinja2.pass_context(lambda context, size: self._count_size(size))
        self.filters[_CONCAT] = self._limited(lambda parts: "".join(map(str, parts)), lambda parts: value_size(parts))
        self.filters[_SUM] = self._sum
        self._limits = threading.local()

    def compiled(self, source: str) -> jinja2.Template:
        """Return a template whose loops and macros look at the clock."""
        tree = _InsertLimits(self).visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def render(self, template: jinja2.Template, variables: Mapping[str, object]) -> str:
        """Return the text.

        Raises:
            TemplateLimitError: the template took too long, or made something too large.
            UnicodeEncodeError: the text has half of a surrogate pair.
        """
        self.start()
        text = template.render(variables)
        if not text.isascii():
            # Half a surrogate pair is no character, and no tokenizer takes it.
            text.encode("utf-8")
        return text

    def start(self) -> None:
        """Give the next rendering in this thread all of its time."""
        self._limits.used = _Used(time.thread_time() + MAX_SECONDS)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        self._count_size(_operator_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, *args: object, **kwargs: object) -> object:
        # Jinja's own signature: self, context, object to call, arguments.
        function = getattr(args[1], "__wrapped__", args[1])
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self.count_method(getattr(function, "__name__", ""), owner, *args[2:], **kwargs)
        else:
            self._count_size(1)
        return super().call(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    def count_method(self, name: str, text: str, *args: object, **kwargs: object) -> None:
        """Count the result of a method of a text before it is called.

        Raises:
            TemplateLimitError: it would be too large.
        """
        size_of = _METHOD_SIZES.get(name)
        self._count_size(size_of(text, *args, **kwargs) if size_of else 1)

    def _limited(self, function: Callable[..., object], size_of: Callable[..., int]) -> Callable[..., object]:
        skip = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def limited(*args: object, **kwargs: object) -> object:
            value = args[skip]
            if not isinstance(value, (*_PLAIN, jinja2.Undefined)) and isinstance(value, Iterable):
                value = self._items(cast("Iterable[object]", value))
            args = (*args[:skip], value, *args[skip + 1 :])
            self._count_size(size_of(*args[skip:], **kwargs))
            return function(*args, **kwargs)

        return limited

    def _items(self, values: Iterable[object]) -> list[object]:
        items: list[object] = []
        for value in values:
            self._count_size(value_size(value))
            items.append(value)
        return items

    @jinja2.pass_context
    def _sum(self, context: jinja2.runtime.Context, values: list[object]) -> object:
        """Add values from left to right. Nearly always all of them are texts, and are counted once."""
        if set(map(type, values)) == {str}:
            texts = cast("list[str]", values)
            self._count_size(sum(map(len, texts)))
            return "".join(texts)
        return functools.reduce(lambda left, right: self.call_binop(context, "+", left, right), values)

    def _count(self, value: object) -> object:
        self._count_size(len(value) if type(value) is str else value_size(value))
        return value

    def _count_size(self, size: int) -> str:
        used: _Used = self._limits.used
        used.size += size + 1
        used.ticks += 1
        if size > MAX_VALUE or used.size > MAX_TOTAL:
            raise TemplateLimitError("it makes a text or a list that is too long")
        if used.ticks % _CLOCK_INTERVAL == 0 and time.thread_time() > used.deadline:
            raise TemplateLimitError(f"it took more than {MAX_SECONDS:.0f} seconds for one row")
        return ""


class _InsertLimits(NodeTransformer):
    """Makes loops and macros call the filter `limit_tick`, `~` the filter `limit_concat`, and `+` `limit_sum`."""

    def __init__(self, environment: LimitedEnvironment):
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        tick = self._tick(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick))
        if node.test is not None:
            node.test = nodes.And(nodes.Not(self._tick(node)), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking_at_start(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking_at_start(node)

    def _ticking_at_start(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        tick = self._tick(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), _CONCAT, [])

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        parts = [node.right]
        while isinstance(node.left, nodes.Add):
            node = node.left
            parts.append(node.right)
        parts.append(node.left)
        return _filter(nodes.List([self.visit(part) for part in reversed(parts)]), _SUM, [])

    def _tick(self, node: nodes.Node) -> nodes.Filter:
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        return _filter(nodes.Const(size), _TICK, [])


def _filter(value: nodes.Expr, name: str, arguments: list[nodes.Expr]) -> nodes.Filter:
    return nodes.Filter(value, name, arguments, [], None, None)


def value_size(value: object) -> int:
    """Return about how many characters a value has as text; a number above `MAX_VALUE` for any that is too large."""
    if isinstance(value, str):
        return len(value)
    size, waiting = 0, [value]
    while waiting and size <= MAX_VALUE:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        elif item is None:
            size += 4
        elif isinstance(item, int):
            size += 1 + item.bit_length() // 3
        elif isinstance(item, Mapping):
            pairs = cast("Mapping[object, object]", item)
            size += 2 * len(pairs)
            waiting += [*pairs.keys(), *pairs.values()]
        elif isinstance(item, list | tuple):
            items = cast("Sequence[object]", item)
            size += len(items)
            waiting += items
        else:
            size += 8
    return size


def _operator_size(operator: str, left: object, right: object) -> int:
    if operator == "%":
        return _format_size(left, right) if isinstance(left, str) else 1
    if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
        sizes = [len(cast("Sequence[object]", item)) if hasattr(item, "__len__") else item for item in (left, right)]
        if all(isinstance(size, int) for size in sizes):
            first, second = cast("list[int]", sizes)
            return first + second if operator == "+" else max(first, 0) * max(second, 0)
    elif isinstance(left, int) and isinstance(right, int):
        powers = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        return 1 if powers <= _MAX_BITS else MAX_VALUE + 1
    return 1


def _width(value: object) -> int:
    return value if isinstance(value, int) else value_size(value) if isinstance(value, str) else 0


def _format_size(text: str, *arguments: object, **named: object) -> int:
    """Return the most that formatting can make: widths are numbers in the text, or among the arguments."""
    values = [*arguments, *named.values()]
    arguments_of = [inner for value in values for inner in (value if isinstance(value, list | tuple) else [value])]
    # `%9999d` and `{:>9999}`; more digits than any width has are a large number as well.
    widths = [int(number[:12]) for number in re.findall(r"\d+", text)] if re.search(r"[%{]", text) else []
    widths += [value for value in arguments_of if type(value) is int]
    return len(text) + value_size(list(values)) + sum(widths)


def _replaced_size(text: object, old: object, new: object, *rest: object, **named: object) -> int:
    text, old = str(text), str(old)
    return len(text) + text.count(old) * value_size(new)


def _padded_size(text: object, width: object = 80, *rest: object, **named: object) -> int:
    return max(value_size(text), _width(named.get("width", width)))


def _indented_size(text: object, width: object = 4, *rest: object, **named: object) -> int:
    return value_size(text) + (str(text).count("\n") + 1) * _width(named.get("width", width))


def _joined_size(values: object, separator: object = "", *rest: object, **named: object) -> int:
    count = len(cast("Sequence[object]", values)) if hasattr(values, "__len__") else 1
    return value_size(values) + count * value_size(named.get("d", separator))


def _json_size(value: object, *arguments: object, **named: object) -> int:
    return value_size(value) * (1 + max([0, *(_width(item) for item in (*arguments, *named.values()))]))


def _filled_size(values: object, count: object = 1, *rest: object, **named: object) -> int:
    return value_size(values) + max([_width(count), *(_width(item) for item in named.values())])


def _wrapped_size(text: object, *arguments: object, **named: object) -> int:
    return value_size(text) * (1 + max([1, *(len(v) for v in (*arguments, *named.values()) if isinstance(v, str))]))


def _plain_size(value: object, *arguments: object, **named: object) -> int:
    return value_size(value)


_FILTER_SIZES: dict[str, Callable[..., int]] = {
    "batch": _filled_size,
    "center": _padded_size,
    "format": _format_size,
    "indent": _indented_size,
    "join": _joined_size,
    "replace": _replaced_size,
    "slice": _filled_size,
    "tojson": _json_size,
    "wordwrap": _wrapped_size,
    **dict.fromkeys(("escape", "e", "list", "pprint", "string", "sum", "urlencode", "urlize", "xmlattr"), _plain_size),
}
"""How large the result of a filter can be that is larger than its input, from the filter's arguments."""
_METHOD_SIZES: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded_size),
    **dict.fromkeys(("format", "format_map"), _format_size),
    "expandtabs": lambda text, size=8, **named: len(text) + text.count("\t") * _width(named.get("tabsize", size)),
    "join": lambda text, values=(), **named: _joined_size(values, text),
    "replace": _replaced_size,
    "translate": lambda text, table=(), **named: len(text) * (1 + value_size(table)),
}
"""The same for the methods of texts; the first argument is the text."""


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template. Errors of the template are raised as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._compiled: dict[str, jinja2.Template] = {}

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; with `prompt`, append the generation prompt.

        Raises:
            TemplateLimitError: the template took too long, or made something too large.
        """
        template, variables = self._prepare(messages, tools, kwargs or {})
        return self._environment.render(template, variables | {"add_generation_prompt": prompt})

    def generation_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[tuple[int, int]]:
        """Return the character spans that the template encloses in `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        template, variables = self._prepare(messages, tools, kwargs or {})
        self._environment.start()
        _, spans = _render_with_assistant_indices(template, add_generation_prompt=False, **variables)
        return [(start, end) for start, end in spans]

    def _prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> tuple[jinja2.Template, dict[str, Any]]:
        """Return the compiled template, and the variables that transformers would pass to it."""
        from transformers.utils.chat_template_utils import _alias_reasoning_fields, _plain_template_data

        if not messages:
            raise ValueError("the conversation is empty")
        source = self._tokenizer.get_chat_template(None, cast("Any", tools))
        if source not in self._compiled:
            self._compiled[source] = self._environment.compiled(source)
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {"tools": tools, "documents": None, **self._tokenizer.special_tokens_map, **kwargs}
        chat = _alias_reasoning_fields(_plain_template_data(present))
        return self._compiled[source], {**_plain_template_data(variables), "messages": chat}

    @cached_property
    def _environment(self) -> LimitedEnvironment:
        return LimitedEnvironment(like=transformers_environment())


def transformers_environment() -> jinja2.Environment:
    """Return the environment that transformers renders chat templates in: its filters, functions and tags."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment
