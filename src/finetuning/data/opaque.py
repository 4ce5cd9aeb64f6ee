"""Whether a chat template treats the contents of messages as what they are: text to write out, and nothing to look at.

Such a template is plain: what it writes around the contents depends on the roles alone, so one rendering shows it for
every conversation of the same roles. Two checks make the proof. By its syntax tree the template may use nothing that
turns a content into other text where it could still be looked at (a macro, a captured block, most filters). Then it is
rendered with contents that can be written out, joined, trimmed and asked whether they are empty; all else they refuse
and report. Every branch taken was then taken without knowing a content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SIGN = re.compile("\U000f0000(\\d+)\U000f0001")
_GENERATION = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")
_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.NSRef, nodes.Break,
    nodes.Continue, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.CondExpr, nodes.Compare,
    nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Add, nodes.Sub, nodes.List, nodes.Tuple,
    nodes.Keyword, nodes.Test, nodes.Filter, nodes.Call, nodes.Concat, nodes.Mod,
)  # fmt: skip
_FILTERS = {"trim", "length", "count", "first", "last", "default", "d", "list", "items", "tojson"}
_SELECTING = {"select": 0, "reject": 0, "selectattr": 1, "rejectattr": 1}
"""Filters that take the name of a test, and the place of it among their arguments."""
_TESTS = {"defined", "undefined", "string", "mapping", "none", "true", "false", "boolean", "number", "iterable",
          "sequence", "odd", "even", "eq", "equalto", "==", "ne", "!=", "in"}  # fmt: skip
_FUNCTIONS = {"raise_exception", "range", "namespace"}
_METHODS = {"strip", "lstrip", "rstrip", "startswith", "endswith", "get", "items", "keys", "values", "lower", "upper"}


class _Seen:
    """Whether a content was looked at."""

    def __init__(self) -> None:
        self.yes = False


class _Looked(TypeError):
    """A template looked at a content."""


class _Opaque:
    """A text that shows nothing of itself but that it is text without outer white space, and not empty.

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

    def _look(self, *arguments: Any, **options: Any) -> NoReturn:
        self._seen.yes = True
        raise _Looked("the template looks at a content")

    def __getattr__(self, name: str) -> NoReturn:
        self._look()

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _look  # type: ignore[assignment]
    __hash__ = __len__ = __iter__ = __getitem__ = __contains__ = __repr__ = __format__ = _look  # type: ignore[assignment]
    __mul__ = __rmul__ = __mod__ = __rmod__ = __int__ = __index__ = __float__ = __html__ = _look


def _is_harmless_filter(node: nodes.Filter, written: bool) -> bool:
    if node.name in _SELECTING:
        tests = node.args[_SELECTING[node.name] :][:1]
        return not node.kwargs and all(isinstance(one, nodes.Const) and one.value in _TESTS for one in tests)
    return node.name in _FILTERS or (node.name == "join" and written)


class PlainTemplate:
    """A template whose syntax has nothing in it by which a content could be read unseen."""

    def __init__(self, template: jinja2.Template):
        self._template = template

    @classmethod
    def of(cls, source: str) -> PlainTemplate | None:
        """The template; None where it cannot be shown to be plain."""
        # The settings of transformers' own environment, but for its `generation` tag, which changes no text.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        source = _GENERATION.sub(lambda tag: f"{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}", source)
        try:
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError:
            return None
        return cls(environment.from_string(source)) if _is_harmless(tree, written=False) else None

    def pieces(self, roles: Sequence[str], variables: dict[str, Any]) -> tuple[str, ...] | None:
        """The text before, between and after the contents of messages of these roles, whatever they are; None where
        the template looks at a content, or does not write each of them once and in order."""
        seen = _Seen()
        contents = [_Opaque(f"\U000f0000{index}\U000f0001", seen) for index in range(len(roles))]
        messages = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=True)]
        given = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
        try:
            parts = _SIGN.split(self._template.render(messages=messages, **given))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            return None
        in_order = [int(index) for index in parts[1::2]] == list(range(len(roles)))
        return tuple(parts[::2]) if in_order and not seen.yes else None


def _is_harmless(node: nodes.Node, *, written: bool) -> bool:
    """`written` says that the value of the node is written out and nothing else."""
    if not isinstance(node, _STATEMENTS):
        return False
    if isinstance(node, nodes.Assign) and node.find(nodes.Concat) is not None:
        return False
    if isinstance(node, nodes.Concat) and not written:
        return False
    if isinstance(node, nodes.Mod) and not (isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)):
        return False
    if isinstance(node, nodes.Filter) and not _is_harmless_filter(node, written):
        return False
    if isinstance(node, nodes.Test) and node.name not in _TESTS:
        return False
    if isinstance(node, nodes.Call):
        called = node.node
        named = isinstance(called, nodes.Name) and called.name in _FUNCTIONS
        if not named and not (isinstance(called, nodes.Getattr) and called.attr in _METHODS):
            return False
    passes = isinstance(node, nodes.Output) or (written and isinstance(node, nodes.CondExpr | nodes.Concat | nodes.Add))
    test = node.test if isinstance(node, nodes.CondExpr) else None
    return all(_is_harmless(child, written=passes and child is not test) for child in node.iter_child_nodes())
