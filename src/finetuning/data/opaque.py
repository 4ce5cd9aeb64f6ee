"""What a chat template writes around the contents of messages, where that depends on nothing but their roles and the
answers to some questions.

A template is rendered with contents that show nothing of themselves: they can be written out, joined, trimmed and asked
whether they are empty. Where it asks whether a content holds, begins with, ends with or equals some text, it is told
no, and the question is kept: what was rendered then shows every conversation of the same roles whose contents answer no
as well. All else a template could learn of a content is refused and reported. Every branch taken was then taken without
knowing more of a content.

The environment keeps guard at each way by which a value leaves the template's own syntax: filters, tests, calls and the
operators that format. Text that is made of contents, by a macro or a captured block, is as opaque as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, Literal, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_SIGN = re.compile("\U000f0000(\\d+)\U000f0001")
_GENERATION = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")
_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.AssignBlock, nodes.NSRef,
    nodes.Break, nodes.Continue, nodes.Macro, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice,
    nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Add, nodes.Sub,
    nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword,
    nodes.Test, nodes.Filter, nodes.Call, nodes.Concat,
)  # fmt: skip
_FILTERS = {
    "trim", "string", "length", "count", "first", "last", "reverse", "default", "d", "list", "items", "select",
    "reject", "selectattr", "rejectattr", "map", "join", "_written",
}  # fmt: skip
"""Filters that hand a content on as it is, or ask it something that it refuses or keeps."""
_TESTS = {"defined", "undefined", "string", "mapping", "none", "true", "false", "boolean", "number", "integer", "float",
          "callable", "sameas", "eq", "equalto", "==", "ne", "!=", "in"}  # fmt: skip
_SCOPES = ("_loop_vars", "_block_vars")
"""What Jinja hands to its own machinery with every call."""
_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError)


class Question(NamedTuple):
    """What a template asks the content of a message."""

    message: int
    kind: Literal["holds", "begins", "ends", "is"]
    text: str

    def __call__(self, content: str) -> bool:
        if self.kind == "holds":
            return self.text in content
        if self.kind == "is":
            return self.text == content
        return content.startswith(self.text) if self.kind == "begins" else content.endswith(self.text)


class Plain(NamedTuple):
    """What is written around the contents of messages that answer no to all questions."""

    pieces: tuple[str, ...]
    questions: tuple[Question, ...]

    def holds_for(self, contents: Sequence[str]) -> bool:
        return not any([question(contents[question.message]) for question in self.questions])


class _Seen:
    """What was asked of the contents, and whether one was looked at."""

    def __init__(self) -> None:
        self.yes = False
        self.questions: dict[Question, None] = {}

    def look(self) -> NoReturn:
        self.yes = True
        raise _Looked("the template looks at a content")


class _Looked(TypeError):
    """A template looked at a content."""


class _Size:
    """The length of text with a content in it: more than nothing, and no more is shown."""

    def __init__(self, seen: _Seen):
        self._seen = seen

    def __bool__(self) -> bool:
        return True

    def __gt__(self, other: Any) -> bool:
        return self._is_nothing(other)

    def __ne__(self, other: object) -> bool:
        return self._is_nothing(other)

    def __eq__(self, other: object) -> bool:
        return not self._is_nothing(other)

    def _is_nothing(self, other: Any) -> bool:
        if type(other) is not int or other != 0:
            self._look()
        return True

    def _look(self, *arguments: Any) -> NoReturn:
        self._seen.look()

    __lt__ = __le__ = __ge__ = __hash__ = __str__ = __repr__ = __format__ = _look  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _look
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __neg__ = __int__ = __index__ = __float__ = _look


class _Opaque:
    """Text with contents in it. Of a content it shows that it is text without outer white space, and not empty.

    It is no `str`, so that no built-in function of one can read it unseen, but passes for one.
    """

    __slots__ = ("_seen", "_text")

    def __init__(self, text: str, seen: _Seen):
        self._text = text
        self._seen = seen

    @property
    def __class__(self) -> type:
        return str

    def __str__(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: Any) -> _Opaque:
        return _Opaque(self._text + str(other), self._seen)

    def __radd__(self, other: Any) -> _Opaque:
        return _Opaque(str(other) + self._text, self._seen)

    def strip(self, characters: str | None = None) -> _Opaque:
        return _Opaque(self._text.strip(self._white(characters)), self._seen)

    def lstrip(self, characters: str | None = None) -> _Opaque:
        return _Opaque(self._text.lstrip(self._white(characters)), self._seen)

    def rstrip(self, characters: str | None = None) -> _Opaque:
        return _Opaque(self._text.rstrip(self._white(characters)), self._seen)

    def _white(self, characters: str | None) -> str | None:
        if characters is not None and characters.strip():
            self._look()
        return characters

    def startswith(self, text: Any) -> bool:
        return self._ask("begins", text)

    def endswith(self, text: Any) -> bool:
        return self._ask("ends", text)

    def __contains__(self, text: Any) -> bool:
        return self._ask("holds", text)

    def split(self, separator: Any, limit: int = -1) -> list[_Opaque]:
        self._ask("holds", separator)
        return [self]

    rsplit = split

    def replace(self, former: Any, text: Any, count: int = -1) -> _Opaque:
        self._ask("holds", former)
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._ask("is", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _ask(self, kind: Literal["holds", "begins", "ends", "is"], text: Any) -> bool:
        """No, for a text of one content and nothing else that is asked about a text that is known."""
        alone = _SIGN.fullmatch(self._text)
        if not alone or type(text) is not str or not text or _SIGN.search(text):
            self._look()
        self._seen.questions[Question(int(alone[1]), kind, text)] = None
        return False

    def _look(self, *arguments: Any, **options: Any) -> NoReturn:
        self._seen.look()

    def __getattr__(self, name: str) -> NoReturn:
        self._look()

    __lt__ = __le__ = __gt__ = __ge__ = _look  # type: ignore[assignment]
    __hash__ = __len__ = __iter__ = __getitem__ = __repr__ = __format__ = _look  # type: ignore[assignment]
    __mul__ = __rmul__ = __mod__ = __rmod__ = __int__ = __index__ = __float__ = __html__ = _look


def _holds_opaque(value: Any) -> bool:
    if type(value) is _Opaque:
        return True
    if type(value) is str:
        return _SIGN.search(value) is not None
    if isinstance(value, dict):
        return any(map(_holds_opaque, (*value, *value.values())))
    return isinstance(value, list | tuple) and any(map(_holds_opaque, value))


class _Guarded(ImmutableSandboxedEnvironment):
    """Renders as transformers' own environment does, but for its `generation` tag, which changes no text."""

    code_generator_class = NativeCodeGenerator
    intercepted_binops = frozenset({"%", "*"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.seen = _Seen()
        self.filters["_written"] = self.concat
        self.filters["join"] = self._join
        self.filters["length"] = self.filters["count"] = self._size
        self.filters |= {name: self._guard(one) for name, one in self.filters.items() if name not in _FILTERS}
        self.tests |= {name: self._guard(one) for name, one in self.tests.items() if name not in _TESTS}
        for name in ("sequence", "iterable"):
            self.tests[name] = self._passes_for_text(self.tests[name])

    def concat(self, values: Iterable[Any]) -> Any:
        """The values, written one after another; opaque where one of them is."""
        text = "".join([str(value) for value in values])
        return _Opaque(text, self.seen) if _SIGN.search(text) else text

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        is_own = isinstance(obj, Macro) or obj is Namespace or type(getattr(obj, "__self__", None)) is _Opaque
        given = [value for name, value in kwargs.items() if name not in _SCOPES]
        if not is_own and _holds_opaque([args, given]):
            self.seen.look()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _holds_opaque([left, right]):
            self.seen.look()
        return super().call_binop(context, operator, left, right)

    def _size(self, value: Any) -> Any:
        return _Size(self.seen) if type(value) is _Opaque else len(value)

    def _join(self, values: Any, separator: str = "", attribute: Any = None) -> Any:
        if attribute is not None:
            values = [value[attribute] for value in values]
        parts = [part for value in values for part in (separator, value)]
        return self.concat(parts[1:])

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if _holds_opaque([args, kwargs]):
                self.seen.look()
            return function(*args, **kwargs)

        return guarded

    @staticmethod
    def _passes_for_text(test: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda value: type(value) is _Opaque or test(value)


class _Joined(NodeTransformer):
    """Writes `a ~ b` as a filter, which keeps what is opaque; the compiled operator makes a string of it."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, "_written", [], [], None, None, lineno=node.lineno)


class PlainTemplate:
    """A template of nothing but the syntax that is kept guard over."""

    def __init__(self, template: jinja2.Template, environment: _Guarded):
        self._template = template
        self._environment = environment

    @classmethod
    def of(cls, source: str) -> PlainTemplate | None:
        """The template; None where other syntax is in it."""
        environment = _Guarded()
        source = _GENERATION.sub(lambda tag: f"{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}", source)
        try:
            tree = environment.parse(source)
            if not all(isinstance(node, _STATEMENTS) for node in (tree, *tree.find_all(nodes.Node))):
                return None
            return cls(environment.from_string(_Joined().visit(tree)), environment)
        except jinja2.TemplateError:
            return None

    def around(self, roles: Sequence[str], variables: dict[str, Any]) -> Plain | None:
        """The text before, between and after the contents of messages of these roles; None where the template looks at
        a content, or does not write each of them once and in order."""
        seen = self._environment.seen = _Seen()
        contents = [_Opaque(f"\U000f0000{index}\U000f0001", seen) for index in range(len(roles))]
        messages = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=True)]
        given = {"tools": None, "documents": None, **variables}

        def render(count: int, prompt: bool = False) -> str:
            return str(self._template.render(messages=messages[:count], add_generation_prompt=prompt, **given))

        try:
            parts = _SIGN.split(render(len(roles)))
            # A proof also renders each turn as the last, and the prompt before it.
            for index in (index for index, role in enumerate(roles) if role == "assistant"):
                render(index + 1)
                render(index, prompt=True)
        except _FAULTS:
            return None
        in_order = [int(index) for index in parts[1::2]] == list(range(len(roles)))
        return Plain(tuple(parts[::2]), tuple(seen.questions)) if in_order and not seen.yes else None
