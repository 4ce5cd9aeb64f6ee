"""Keys of a config that one version of the engine knows and another does not, between a checkpoint and a run."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from finetuning.config.validation.section_tree import members, sections_of
from finetuning.config.yaml.dump import dump_values


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted key; a list is a leaf."""
    if isinstance(values, Mapping) and values:
        for key, item in values.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def item_by_item(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both contracts with lists of as many sections taken apart: `datasets.0.format`."""
    before, now = dict(before), dict(now)
    pending = [*now]
    while pending:
        key = pending.pop()
        if _are_alike(before.get(key), now[key]):
            for contract in (before, now):
                for index, item in enumerate(contract.pop(key)):
                    contract |= dict(flat(item, f"{key}.{index}"))
            pending += [found for found in now if found.startswith(f"{key}.")]
    return before, now


def _are_alike(before: Any, now: Any) -> bool:
    lists = [value for value in (before, now) if isinstance(value, list) and value]
    return (
        len(lists) == 2
        and len(lists[0]) == len(lists[1])
        and all(isinstance(item, Mapping) for value in lists for item in value)
    )


def defaults_unknown_to(before: Mapping[str, Any], config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The defaults of the fields of a config that a contract does not know, by dotted key.

    Only fields that a section declares, and only of sections that the contract has: an optional section that was off is
    no default, and in what passes through to a library an absent key means the library's own default.
    """
    for name, default in dump_values(type(config).model_construct()).items():
        if not _has(before, f"{prefix}{name}"):
            yield from flat(default, f"{prefix}{name}")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel) and _has(before, f"{prefix}{name}"):
            yield from defaults_unknown_to(before, value, f"{prefix}{name}.")
        for index, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, BaseModel) and _has(before, f"{prefix}{name}.{index}"):
                yield from defaults_unknown_to(before, item, f"{prefix}{name}.{index}.")


def _has(contract: Mapping[str, Any], key: str) -> bool:
    return key in contract or any(found.startswith(f"{key}.") for found in contract)


def is_known(root: type[BaseModel], key: str) -> bool:
    """Whether some config of this class may hold a dotted key; whatever passes through to a library may be."""
    current: Sequence[type[BaseModel]] = [root]
    for part in key.split("."):
        if any(section.model_config.get("extra") == "allow" for section in current):
            return True
        if part.isdecimal():
            continue
        fields = [section.model_fields[part] for section in current if part in section.model_fields]
        if any(typing.get_origin(member) is dict for field in fields for member in members(field.annotation)):
            return True
        current = [section for field in fields for section in sections_of(field.annotation)]
        if not fields:
            return False
    return True
