"""The docstrings below a section's fields, read from its source when someone asks for them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from pydantic import BaseModel


def field_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """For each field of a section, the docstring below it, on one line; a base's where it has none itself.

    A field whose name is a word of Python, which no source can declare, has its description in the field.
    """
    found = {name: field.description for name, field in section.model_fields.items() if field.description}
    for base in reversed(section.__mro__):
        if base is not BaseModel and issubclass(base, BaseModel):
            found.update(_own_docstrings(base))
    return {name: found[name] for name in section.model_fields if name in found}


def one_line(text: str) -> str:
    """A text with its line breaks taken out, but for empty lines."""
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", part).strip() for part in re.split(r"\n\s*\n", text.strip()))


def _own_docstrings(section: type[BaseModel]) -> dict[str, str]:
    tree = ast.parse(Path(inspect.getfile(section)).read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name == section.__name__):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if is_field and is_text and isinstance(text.value.value, str):
                found[field.target.id] = one_line(inspect.cleandoc(text.value.value))
    return found
