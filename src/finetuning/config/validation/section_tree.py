"""What the sections of the YAML know: their keys, their unions' tags, and which section knows which key."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetuning.config.yaml.document import KeyPath


def members(annotation: Any) -> list[Any]:
    """The types that an annotation allows, with `Annotated` and unions taken apart."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in members(part)]
    return [annotation]


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value of this annotation may be; for a list, those of its items."""
    found: list[type[BaseModel]] = []
    for member in members(annotation):
        if typing.get_origin(member) is list:
            found.extend(sections_of(typing.get_args(member)[0]))
        elif isinstance(member, type) and issubclass(member, BaseModel):
            found.append(member)
    return found


def is_list(annotation: Any) -> bool:
    return any(typing.get_origin(member) is list for member in members(annotation))


def keys_of(sections: list[type[BaseModel]]) -> list[str]:
    """The keys that any of the sections knows, each once, in order."""
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def tag_of(section: type[BaseModel], discriminator: str) -> str | None:
    """The one value that a section's discriminating field allows; None when the section has no such field."""
    field = section.model_fields.get(discriminator)
    if field is None or typing.get_origin(field.annotation) is not typing.Literal:
        return None
    return str(typing.get_args(field.annotation)[0])


def chosen_section(sections: list[type[BaseModel]], values: Any) -> list[type[BaseModel]]:
    """The members of a union that the values' tag picks; all of them when it picks none."""
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


def sections_at(root: type[BaseModel], values: Any, path: KeyPath) -> list[type[BaseModel]]:
    """The sections that may stand at a path of the document, as far as the tags on the way tell."""
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
    """Every field of a section and of those below it: the path of its section, its name, the field."""
    for name, field in root.model_fields.items():
        yield path, name, field
        for section in sections_of(field.annotation):
            yield from walk(section, (*path, name))


def key_index(root: type[BaseModel]) -> dict[str, list[str]]:
    """For each key of the schema, the dotted paths of the sections that know it; "" is the top."""
    index: dict[str, list[str]] = {}
    for path, name, _ in walk(root):
        places = index.setdefault(name, [])
        if ".".join(path) not in places:
            places.append(".".join(path))
    return index
