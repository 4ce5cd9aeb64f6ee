"""Dump a validated config as YAML, with the origin of each value."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from enum import Enum

import yaml
from pydantic import BaseModel, SecretStr

from finetuning.config.redaction import redact_values
from finetuning.config.yaml.document import ConfigDocument, KeyPath, YamlValue, dotted
from finetuning.config.yaml.reader import read_scalar

ENVIRONMENT_DEFAULTS: dict[KeyPath, str] = {("training_args", "output_dir"): "CHECKPOINTS_PATH"}
"""Keys whose default is set by an environment variable."""


class _ConfigDumper(yaml.SafeDumper):
    """Quotes every text that our reader, whose scalars differ from those of YAML 1.1, would not read as text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if isinstance(read_scalar(text), str) and text != "<<" else "'"
        if not text.isprintable():
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)  # pyright: ignore[reportUnknownMemberType]

    def ignore_aliases(self, data: object) -> bool:
        return True


_ConfigDumper.add_representer(str, _ConfigDumper.represent_text)


def dump_values(config: BaseModel) -> dict[str, YamlValue]:
    """Return the config as plain values, including defaults and without secrets."""
    values = config.model_dump(mode="python")
    return redact_values({key: _plain(item) for key, item in values.items() if not isinstance(item, SecretStr)})


def dump_yaml(config: BaseModel) -> str:
    """Return the config as YAML that validates to an equal config. Secrets are left out."""
    return yaml.dump(dump_values(config), Dumper=_ConfigDumper, sort_keys=False, allow_unicode=True, width=120)


def provenance(config: BaseModel, document: ConfigDocument, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the origin of each dotted key: `file:line`, `command line`, `environment variable NAME` or `default`."""
    origins: dict[str, str] = {}
    for path in (leaf for key, item in dump_values(config).items() for leaf in _leaves(item, (key,))):
        origin = document.origin_of(path)
        variable = ENVIRONMENT_DEFAULTS.get(path, "")
        if origin is None and environ.get(variable):
            origin = f"environment variable {variable}"
        origins[dotted(path)] = origin or "default"
    return origins


def _leaves(values: YamlValue, path: KeyPath) -> Iterator[KeyPath]:
    """Yield the paths of scalars and of lists of scalars."""
    if isinstance(values, dict) and values:
        for key, item in values.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(values, list) and any(isinstance(item, dict) for item in values):
        for index, item in enumerate(values):
            yield from _leaves(item, (*path, index))
    else:
        yield path


def _plain(value: YamlValue | Enum | tuple[YamlValue, ...]) -> YamlValue:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not isinstance(item, SecretStr)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
