"""Classes of installed libraries, read from their source text: importing them would import torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """The syntax tree of one module's source."""

    name: str
    path: Path
    tree: ast.Module = field(repr=False, compare=False)

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """For each name that a `from … import` of the top level brings in: module and original name."""
        package = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
        found: dict[str, tuple[str, str]] = {}
        for node in _top_level(self.tree):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
                for alias in node.names:
                    found[alias.asname or alias.name] = (module, alias.name)
        return found

    def class_named(self, name: str) -> ast.ClassDef | None:
        """The definition of a class of this module."""
        return next(
            (node for node in _top_level(self.tree) if isinstance(node, ast.ClassDef) and node.name == name), None
        )

    def value_of(self, name: str) -> ast.expr | None:
        """What the module assigns to a name at its top level."""
        for node in _top_level(self.tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        return node.value
        return None


@dataclass(frozen=True)
class SourceClass:
    """A class definition and the module that it stands in, whose imports explain the names in it."""

    module: Module
    node: ast.ClassDef

    def method(self, name: str) -> ast.FunctionDef | None:
        return next((node for node in self.node.body if isinstance(node, ast.FunctionDef) and node.name == name), None)

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


class Sources:
    """The installed libraries' source files. Each is parsed once in the lifetime of this object."""

    def __init__(self) -> None:
        self._modules: dict[str, Module | None] = {}

    def folder(self, package: str) -> Path | None:
        """The folder of a top-level package, which is not imported; None when it is not installed."""
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            return None
        locations = list(spec.submodule_search_locations or ()) if spec else []
        return Path(locations[0]) if locations else None

    def module(self, name: str) -> Module | None:
        """A module by its dotted name; None when there is no such source file, or it is not Python."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def find_class(self, module_name: str, class_name: str) -> SourceClass | None:
        """A class by the name that it has in a module, followed through imports to where it is defined."""
        for _ in range(10):
            module = self.module(module_name)
            if module is None:
                return None
            node = module.class_named(class_name)
            if node is not None:
                return SourceClass(module, node)
            origin = module.imports.get(class_name)
            if origin is None:
                lazy = self._lazily_exported(module, class_name)
                origin = (lazy, class_name) if lazy else None
            if origin is None:
                return None
            module_name, class_name = origin
        return None

    def with_bases(self, found: SourceClass) -> list[SourceClass]:
        """A class and those of its bases whose source is known, from the most basic to the class itself."""
        chain: list[SourceClass] = []
        for base in found.node.bases:
            if isinstance(base, ast.Name):
                known = self.find_class(found.module.name, base.id)
                if known is not None and known.node is not found.node:
                    chain.extend(item for item in self.with_bases(known) if item not in chain)
        return [*chain, found]

    def _read(self, name: str) -> Module | None:
        package, *parts = name.split(".")
        folder = self.folder(package)
        if folder is None:
            return None
        base = folder.joinpath(*parts)
        for path in (base.with_suffix(".py") if parts else base / "__init__.py", base / "__init__.py"):
            if path.is_file():
                try:
                    return Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
                except (OSError, SyntaxError, ValueError):
                    return None
        return None

    def _lazily_exported(self, module: Module, name: str) -> str | None:
        """The submodule that a package's lazy import table (submodule: [names]) says a name comes from."""
        table = module.value_of("_import_structure")
        if module.path.name != "__init__.py" or not isinstance(table, ast.Dict):
            return None
        for key, names in zip(table.keys, table.values, strict=True):
            listed = names.elts if isinstance(names, ast.List) else []
            if isinstance(key, ast.Constant) and any(getattr(item, "value", None) == name for item in listed):
                return f"{module.name}.{key.value}"
        return None


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module, those inside of top-level `if` and `try` with them."""
    waiting: list[ast.stmt] = list(reversed(tree.body))
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If):
            waiting.extend(reversed([*node.body, *node.orelse]))
        elif isinstance(node, ast.Try):
            waiting.extend(reversed([*node.body, *node.orelse, *node.finalbody]))
