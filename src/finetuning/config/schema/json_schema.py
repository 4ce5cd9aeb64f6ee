"""The JSON Schema of a config, which editors complete and check the YAML with.

The docstrings below a section's fields, read from its source when someone asks for them."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import TypedDict, cast

from pydantic import BaseModel

from finetuning.config.sections.experiment import Experiment
from finetuning.config.validation.library_fields import LibraryFields
from finetuning.config.validation.passthrough import SET_BY_OTHER_KEYS, type_adapter
from finetuning.config.validation.section_tree import sections_of, walk


def field_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field of a section on one line, that of a base class where it has none.

    A field that is named after a Python keyword has its description in the `Field` instead.
    """
    descriptions = {name: field.description for name, field in section.model_fields.items() if field.description}
    for base in reversed(section.__mro__):
        if base is not BaseModel and issubclass(base, BaseModel):
            descriptions.update(_class_docstrings(base))
    return {name: descriptions[name] for name in section.model_fields if name in descriptions}


def one_line(text: str) -> str:
    """Join the lines of each paragraph of a text."""
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", part).strip() for part in re.split(r"\n\s*\n", text.strip()))


def _class_docstrings(section: type[BaseModel]) -> dict[str, str]:
    tree = ast.parse(Path(inspect.getfile(section)).read_text(encoding="utf-8"))
    docstrings: dict[str, str] = {}
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name == section.__name__):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                    docstrings[name] = one_line(inspect.cleandoc(docstring))
                case _:
                    pass
    return docstrings


JsonSchema = TypedDict(
    "JsonSchema",
    {
        "$schema": str,
        "$defs": "dict[str, JsonSchema]",
        "$ref": str,
        "title": str,
        "description": str,
        "type": str,
        "properties": "dict[str, JsonSchema]",
        "required": list[str],
        "additionalProperties": "bool | JsonSchema",
        "items": "JsonSchema",
        "anyOf": "list[JsonSchema]",
        "oneOf": "list[JsonSchema]",
        "allOf": "list[JsonSchema]",
        "discriminator": object,
        "enum": list[object],
        "const": object,
        "default": object,
    },
    total=False,
)
"""The keywords of JSON Schema that are read here. A schema may have others."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(config: type[BaseModel], libraries: LibraryFields | None = None) -> JsonSchema:
    """The JSON Schema of a config, each key described.

    Args:
        libraries: their trainer's fields are then listed under `training_args`, and any other key there is an error.
            Without it that section stays open, and the schema is the same everywhere.
    """
    schema = cast("JsonSchema", config.model_json_schema(mode="validation"))
    definitions = schema.get("$defs", {})
    sections = {config.__name__: config}
    sections |= {part.__name__: part for _, _, field in walk(config) for part in sections_of(field.annotation)}
    for name, section in sections.items():
        _describe(schema if section is config else definitions.get(name, {}), section)
    for definition in definitions.values():
        definition.pop("title", None)
        if "description" in definition:
            definition["description"] = one_line(definition["description"])
    if libraries is not None and issubclass(config, Experiment):
        _list_trainer_fields(config, definitions, libraries)
    method = getattr(config, "method_name", "") or config.__name__
    schema["title"] = f"finetuning {method}" if issubclass(config, Experiment) else "generate"
    ordered = dict(sorted(schema.items(), key=lambda item: _order(item[0])))
    return cast("JsonSchema", {"$schema": DIALECT, **ordered})


def schema_text(config: type[BaseModel], libraries: LibraryFields | None = None) -> str:
    """The JSON Schema as text, ending in a line break."""
    return json.dumps(json_schema(config, libraries), indent=2, ensure_ascii=False) + "\n"


def _order(key: str) -> int:
    order = ("title", "description", "type", "properties", "required", "additionalProperties", "$defs")
    return order.index(key) if key in order else len(order)


def _describe(schema: JsonSchema, section: type[BaseModel]) -> None:
    docstrings = field_docstrings(section)
    if "description" in schema:
        schema["description"] = one_line(schema["description"])
    for name, described in schema.get("properties", {}).items():
        described.pop("title", None)
        # An OpenAPI keyword. JSON Schema distinguishes the members by their constant tags.
        described.pop("discriminator", None)
        if name in docstrings:
            described["description"] = docstrings[name]


def _list_trainer_fields(
    config: type[Experiment], definitions: dict[str, JsonSchema], libraries: LibraryFields
) -> None:
    """Name the trainer's fields under `training_args`, and close the section."""
    fields = libraries.trainer_fields(config.trainer_config)
    section = sections_of(config.model_fields["training_args"].annotation)[0]
    definition = definitions.get(section.__name__)
    if fields is None or definition is None:
        return
    properties = definition.setdefault("properties", {})
    for name, kind in fields.items():
        if name not in properties and name not in SET_BY_OTHER_KEYS:
            properties[name] = cast("JsonSchema", type_adapter(kind).json_schema())
    definition["additionalProperties"] = False
