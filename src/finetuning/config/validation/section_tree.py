"""Describe the section models: keys, union tags, and which section has which key."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetuning.config.yaml.document import KeyPath, YamlValue


def members(annotation: object) -> list[object]:
    """Return the types that an annotation allows, with `Annotated` and unions resolved."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in members(part)]
    return [annotation]


def sections_of(annotation: object) -> list[type[BaseModel]]:
    """Return the section models that a value of this annotation can be; for a list, those of its items."""
    sections: list[type[BaseModel]] = []
    for member in members(annotation):
        if typing.get_origin(member) is list:
            sections.extend(sections_of(typing.get_args(member)[0]))
        elif isinstance(member, type) and issubclass(member, BaseModel):
            sections.append(member)
    return sections


def is_list(annotation: object) -> bool:
    return any(typing.get_origin(member) is list for member in members(annotation))


def keys_of(sections: list[type[BaseModel]]) -> list[str]:
    """Return the keys of all given sections without duplicates, in order."""
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def tag_of(section: type[BaseModel], discriminator: str) -> str | None:
    """Return the single value that a section's discriminator field allows; None if there is no such field."""
    field = section.model_fields.get(discriminator)
    if field is None or typing.get_origin(field.annotation) is not typing.Literal:
        return None
    return str(typing.get_args(field.annotation)[0])


def chosen_section(sections: list[type[BaseModel]], values: YamlValue) -> list[type[BaseModel]]:
    """Return the union members that the tag in the values selects; all members if it selects none."""
    if not isinstance(values, dict):
        return sections
    for discriminator in ("type", "peft_type", "quantization_type"):
        tag = values.get(discriminator)
        picked = [section for section in sections if tag is not None and tag_of(section, discriminator) == tag]
        if picked:
            return picked
        untagged = [section for section in sections if _is_open_tag(section, discriminator)]
        if isinstance(tag, str) and untagged:
            return untagged
    return sections


def _is_open_tag(section: type[BaseModel], discriminator: str) -> bool:
    return discriminator in section.model_fields and tag_of(section, discriminator) is None


def sections_at(root: type[BaseModel], values: YamlValue, path: KeyPath) -> list[type[BaseModel]]:
    """Return the section models that are possible at a path of the document, given the tags in the values."""
    current = [root]
    for part in path:
        current = chosen_section(current, values)
        if isinstance(part, str):
            fields = [section.model_fields[part] for section in current if part in section.model_fields]
            current = [section for field in fields for section in sections_of(field.annotation)]
            values = values.get(part) if isinstance(values, dict) else None
        else:
            values = values[part] if isinstance(values, list) and 0 <= part < len(values) else None
    return chosen_section(current, values)


def walk(root: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, FieldInfo]]:
    """Yield every field of a section and its subsections: path of its section, name, field."""
    for name, field in root.model_fields.items():
        yield path, name, field
        for section in sections_of(field.annotation):
            yield from walk(section, (*path, name))


def key_index(root: type[BaseModel]) -> dict[str, list[str]]:
    """Return the dotted paths of the sections that have each key of the schema; "" is the top level."""
    index: dict[str, list[str]] = {}
    for path, name, _ in walk(root):
        places = index.setdefault(name, [])
        if ".".join(path) not in places:
            places.append(".".join(path))
    return index
