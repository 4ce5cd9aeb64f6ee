"""The fields that transformers, TRL and PEFT accept, from a table made of their classes: reading it imports no torch.

`make library-fields` writes the table, `library_fields.json`, from the installed libraries. Where the installed
versions differ from the table's, what the table refuses is checked again with `installed_fields`.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from finetuning.config.pretrained_config import find_pretrained_config
from finetuning.distributed import announce_wait

Fields = dict[str, object]
"""For each name that a class accepts, the type of its value; `Any` where no type is known that YAML could write."""

LIBRARIES = ("transformers", "trl", "peft")
SHARED_BY_METHODS = "trl.trainer.sft_config:SFTConfig"
"""Fields such as `max_length`, which TRL's trainers share, do not identify the method of a config."""
TABLE = Path(__file__).with_name("library_fields.json")

_TYPES: dict[str, Any] = {"Any": Any, "str": str, "int": int, "float": float, "bool": bool}


FieldTypes = dict[str, str]
"""For each name that a class accepts, its type, written as an annotation."""


class LibraryTable(TypedDict):
    """The content of `library_fields.json`."""

    versions: dict[str, str]
    choices: dict[str, list[str]]
    schedulers: dict[str, dict[str, bool]]
    trainer_configs: dict[str, FieldTypes]
    peft_configs: dict[str, FieldTypes]
    generation_config: FieldTypes
    from_pretrained: list[str]
    pretrained_config: FieldTypes
    model_configs: dict[str, FieldTypes]


class LibraryFields:
    """What the libraries accept, as a table of `introspection.py` says."""

    def __init__(self, table: LibraryTable) -> None:
        self._table = table

    def is_current(self) -> bool:
        """Whether the table was made from the versions that are installed here, or none is installed."""
        return all(_version(name) in (None, version) for name, version in self._table["versions"].items())

    def trainer_fields(self, reference: str) -> Fields | None:
        """Return the fields of a trainer's config, named `module:class`; None for one that the table lacks."""
        return _typed(self._table["trainer_configs"].get(reference))

    def peft_fields(self, peft_type: str) -> Fields | None:
        """Return the fields of the PEFT config of an adapter type; None when there is no such config."""
        return _typed(self._table["peft_configs"].get(peft_type))

    def generation_fields(self) -> Fields:
        """Return the fields of `transformers.GenerationConfig`."""
        return _typed(self._table["generation_config"]) or {}

    def from_pretrained_arguments(self) -> list[str]:
        """Return the names that `AutoModelForCausalLM.from_pretrained` takes for itself."""
        return self._table["from_pretrained"]

    def choices(self, name: str) -> list[str]:
        """Return the values of `lr_scheduler_type`, `optim`, `report_to`, `dpo_loss_type` or `peft_type`."""
        return self._table["choices"][name]

    def scheduler_arguments(self, name: str) -> dict[str, bool] | None:
        """Return the arguments of a schedule by name, and whether they are required; None if it is unknown."""
        return self._table["schedulers"].get(name)

    def model_fields(self, model: str, environ: Mapping[str, str] = os.environ) -> Fields | None:
        """Return the keys of a model's own config: those of its config.json and the fields of its config class.

        None when the config is not on this machine, neither in a folder nor in the hub's cache.
        """
        config = find_pretrained_config(model, environ)
        if config is None:
            return None
        base = self._table["pretrained_config"]
        written = dict.fromkeys(config, "Any")
        by_type = self._table["model_configs"].get(str(config.get("model_type")))
        return _typed({**base, **written} if by_type is None else {**base, **written, **base, **by_type})


@functools.cache
def table_fields() -> LibraryFields:
    """Return the fields of the table in this package."""
    return LibraryFields(json.loads(TABLE.read_text(encoding="utf-8")))


@functools.cache
def installed_fields() -> LibraryFields:
    """Return the fields of the installed libraries, which are imported for it unless the table is theirs.

    The import takes seconds, and happens in a process of its own, so that this one stays without torch. The table
    counts where that process fails, since no run can start there.
    """
    fields = table_fields()
    if fields.is_current():
        return fields
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, TABLE.name)
        command = [sys.executable, "-m", "finetuning.config.validation.introspection", str(path)]
        with announce_wait("a process that imports the libraries, to read which keys they have"):
            process = subprocess.run(command, capture_output=True, check=False)
        return LibraryFields(json.loads(path.read_text(encoding="utf-8"))) if process.returncode == 0 else fields


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _typed(fields: Mapping[str, str] | None) -> Fields | None:
    return None if fields is None else {name: _parse(text) for name, text in fields.items()}


@functools.cache
def _parse(text: str) -> Any:
    """Return the type that an annotation of the table names."""
    return _type(ast.parse(text, mode="eval").body)


def _type(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name):
            return _TYPES[name]
        case ast.BinOp(left=left, right=right):
            return _type(left) | _type(right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            return Literal[ast.literal_eval(values)]
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_type(item)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return dict[_type(key), _type(value)]  # type: ignore[misc]
        case _:
            raise ValueError(f"{TABLE.name}: no type: {ast.unparse(node)}")
