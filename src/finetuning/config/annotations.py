"""Type annotations of a library's source, as the types that a YAML value can be checked against."""

from __future__ import annotations

import ast
import functools
import operator
from typing import Any, Literal

from finetuning.config.source import Module, SourceClass, Sources

_PLAIN: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "dict": dict[str, Any],
    "Dict": dict[str, Any],
    "list": list[Any],
    "List": list[Any],
    "tuple": list[Any],
    "Tuple": list[Any],
    "set": list[Any],
    "Set": list[Any],
    "PathLike": str,
}
_SEQUENCES = frozenset({"list", "List", "set", "Set", "frozenset", "Sequence", "Iterable"})
_MAPPINGS = frozenset({"dict", "Dict", "Mapping"})


class AnnotationReader:
    """Turns annotations into types made of plain values only; what it does not understand becomes `Any`."""

    def __init__(self, sources: Sources):
        self._sources = sources

    def read(self, node: ast.expr | None, module: Module) -> Any:
        """The type that an annotation names: tuples and sets become lists, an enum the names of its members' values."""
        match node:
            case ast.Constant(value=None):
                return None
            case ast.Constant(value=str(text)):
                return self._read_text(text, module)
            case ast.Name(id=name):
                return self._named(name, module)
            case ast.Attribute(attr="PathLike"):
                return str
            case ast.Attribute(value=ast.Name(id="typing"), attr=name):
                return self._named(name, module)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self._union([left, right], module)
            case ast.Subscript(value=value, slice=inner):
                name = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
                return self._subscript(name, inner, module)
        return Any

    def _read_text(self, text: str, module: Module) -> Any:
        try:
            return self.read(ast.parse(text, mode="eval").body, module)
        except SyntaxError:
            return Any

    def _named(self, name: str, module: Module) -> Any:
        if name in _PLAIN:
            return _PLAIN[name]
        found = self._sources.find_class(module.name, name)
        values = enum_values(found) if found else []
        return Literal[tuple(values)] if values else Any

    def _union(self, nodes: list[ast.expr], module: Module) -> Any:
        types = [self.read(node, module) for node in nodes]
        if any(kind is Any for kind in types):
            return Any
        # `Enum | str`: the library turns the text into the enum, so only the enum's values are right.
        if any(self._is_enum(node, module) for node in nodes):
            types = [kind for kind in types if kind is not str] or types
        return functools.reduce(operator.or_, (type(None) if kind is None else kind for kind in types))

    def _is_enum(self, node: ast.expr, module: Module) -> bool:
        if isinstance(node, ast.BinOp):
            return self._is_enum(node.left, module) or self._is_enum(node.right, module)
        if not isinstance(node, ast.Name) or node.id in _PLAIN:
            return False
        found = self._sources.find_class(module.name, node.id)
        return bool(found and enum_values(found))

    def _subscript(self, name: str, inner: ast.expr, module: Module) -> Any:
        parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
        if name == "Literal":
            values = [part.value for part in parts if isinstance(part, ast.Constant)]
            # `pissa_niter_[number of iters]` stands for a pattern that only the library knows.
            if any("[" in value for value in values if isinstance(value, str)):
                return Literal[tuple(values)] | str
            return Literal[tuple(values)] if len(values) == len(parts) else Any
        if name == "Optional":
            return self._union([inner, ast.Constant(value=None)], module)
        if name == "Union":
            return self._union(parts, module)
        if name == "Annotated":
            return self.read(parts[0], module)
        if name in _SEQUENCES and len(parts) == 1:
            return list[self.read(inner, module)]  # type: ignore[misc]
        if name in ("tuple", "Tuple"):
            return list[Any]
        if name in _MAPPINGS and len(parts) == 2:
            key = self.read(parts[0], module)
            return dict[key, self.read(parts[1], module)] if key in (str, int) else Any  # type: ignore[valid-type]
        return Any


def enum_values(found: SourceClass) -> list[str]:
    """The text values of an enum's members; empty for a class that is no enum of texts."""
    bases = {base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in found.node.bases}
    if not any(name.endswith("Enum") for name in bases):
        return []
    return [
        node.value.value
        for node in found.node.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
