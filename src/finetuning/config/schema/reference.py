"""The reference of the YAML as Markdown: `python -m finetuning.config.schema.reference docs/reference/config.md` writes it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetuning.config.schema.json_schema import json_schema
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.sections.generation import GenerationConfig

_INTRODUCTION = """# Config reference

<!-- Written by `python -m finetuning.config.schema.reference docs/reference/config.md`; a test fails when it is stale. -->

Every key of the YAML, its type, its default and what it does. Keys in bold are required. A key that is not listed is
an error, with three exceptions, which pass through to a library and are checked against its installed release:
`training_args` takes every field of the trainer's config, `model_args` every argument of `from_pretrained` and every
key of the model's config, and `peft_kwargs` the arguments of the chosen adapter type.
"""
_NAMES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
_LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def reference() -> str:
    """The reference of all methods and of `generate`, as Markdown."""
    parts = [_INTRODUCTION]
    described: set[str] = set()
    for method, experiment in EXPERIMENTS.items():
        parts.append(f"## `finetuning {method}`\n")
        parts.extend(_sections(experiment, described))
    parts.append("## `generate`\n")
    parts.extend(_sections(GenerationConfig, described))
    return "\n".join(parts)


def _sections(config: type[BaseModel], described: set[str]) -> Iterator[str]:
    """The top level of a config, then each section below it that was not described before."""
    schema = json_schema(config)
    definitions = schema.get("$defs", {})
    yield _table(schema, definitions)
    for heading, name in _definitions(schema, definitions):
        if name not in described and "properties" in definitions[name]:
            described.add(name)
            definition = definitions[name]
            yield f"### {heading}\n"
            if "description" in definition:
                yield definition["description"] + "\n"
            yield _table(definition, definitions)


def _tag(definition: dict[str, Any]) -> str:
    """What tells a member of a union from the others, in words; empty for a section that is alone."""
    for name, field in definition.get("properties", {}).items():
        if name in ("type", "peft_type", "quantization_type"):
            return f" with `{name}: {field['const']}`" if "const" in field else f" with any other `{name}`"
    return ""


def _definitions(
    schema: dict[str, Any], definitions: dict[str, Any], path: str = "", within: str = ""
) -> Iterator[tuple[str, str]]:
    """Each definition that a schema leads to, with the heading that says which key leads there."""
    for key, field in schema.get("properties", {}).items():
        inner = f"{path}.{key}" if path else key
        for name in _references(field):
            tag = _tag(definitions[name])
            yield f"`{inner}`{tag or within}", name
            yield from _definitions(definitions[name], definitions, inner, tag)


def _references(field: Any) -> Iterator[str]:
    if isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for key in ("anyOf", "oneOf", "items", "allOf"):
            yield from _references(field.get(key))
    elif isinstance(field, list):
        for item in field:
            yield from _references(item)


def _table(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    required = schema.get("required", [])
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        shown = f"**`{name}`**" if name in required else f"`{name}`"
        kind = _type(field, definitions).replace("|", "\\|")
        text = field.get("description", "").replace("\n\n", " ").replace("|", "\\|")
        lines.append(f"| {shown} | {kind} | {_default(field)} | {text} |")
    return "\n".join(lines) + "\n"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field or isinstance(field["default"], dict):
        return ""
    return f"`{json.dumps(field['default'], ensure_ascii=False)}`".replace("|", "\\|")


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON Schema type in words."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        definition = definitions[field["$ref"].rpartition("/")[2]]
        return _type(definition, definitions) if "enum" in definition else "section"
    for key in ("anyOf", "oneOf"):
        if key in field:
            words = [_type(item, definitions) for item in field[key] if item.get("type") != "null"]
            return " or ".join(dict.fromkeys(words))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), definitions)}"
    if field.get("type") == "object":
        return "keys and values"
    limits = ", ".join(f"{sign} {field[key]}" for key, sign in _LIMITS.items() if key in field)
    name = _NAMES.get(field.get("type", ""), "any")
    return f"{name} {limits}".strip()


def main() -> None:
    """Writes the reference to the file that the command line names."""
    parser = argparse.ArgumentParser(description="Write the reference of the YAML as Markdown.")
    parser.add_argument("path", type=Path, help="the file to write, such as docs/reference/config.md")
    parser.parse_args().path.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
