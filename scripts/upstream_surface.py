"""Record the private methods and attributes of transformers, TRL, PEFT and accelerate that this package uses.

    python scripts/upstream_surface.py      check the table, and record sources again

`tests/upstream_surface.toml` lists each of them once, with why it is used, and a digest of its source. A test fails
when a source changes, so that an update of a library is reviewed. After the review run this script: it records the
digests and versions that are installed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "finetuning"
TABLE = ROOT / "tests" / "upstream_surface.toml"
LIBRARIES = ("transformers", "trl", "peft", "accelerate")
TRAINERS = (
    "transformers.trainer:Trainer",
    "transformers.trainer_pt_utils:BatchRebalanceSampler",
    "trl.trainer.dpo_trainer:DPOTrainer",
    "trl.trainer.kto_trainer:KTOTrainer",
    "trl.trainer.reward_trainer:RewardTrainer",
    "trl.trainer.grpo_trainer:GRPOTrainer",
    "trl.experimental.cpo.cpo_trainer:CPOTrainer",
    "trl.experimental.orpo.orpo_trainer:ORPOTrainer",
)
"""The upstream classes whose methods ours override."""
STANDARD_LIBRARY = {"_Hash", "_actions", "_exit"}
"""Private names of the standard library (of hashlib, argparse and os), which is not upstream here."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """A private method or attribute of an upstream class."""

    owner: str
    """The class, as `module:class`."""
    name: str
    use: str
    """`overridden`, `called` or `attribute`."""
    why: str
    sha256: str = ""
    """Of the method's source; of an attribute there is none."""

    def load(self) -> Any:
        return load(self.owner)

    def digest(self) -> str:
        """Return the digest of the method's source without blank lines and comment lines; "" for an attribute."""
        if self.use == "attribute":
            return ""
        source = textwrap.dedent(inspect.getsource(vars(self.load())[self.name]))
        lines = [line.rstrip() for line in source.splitlines()]
        code = [line for line in lines if line and not line.lstrip().startswith("#")]
        return hashlib.sha256("\n".join(code).encode()).hexdigest()

    def exists(self) -> bool:
        owner = self.load()
        if self.use != "attribute":
            return self.name in vars(owner)
        return any(self.name in inspect.getsource(base) for base in owner.__mro__ if base.__module__ != "builtins")


def load(path: str) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def read_table() -> list[Entry]:
    return [Entry(**entry) for entry in tomllib.loads(TABLE.read_text(encoding="utf-8"))["entry"]]


def write_table(entries: list[Entry]) -> None:
    lines = [
        "# Private methods and attributes of upstream libraries that this package overrides, calls or reads.",
        "# Written by scripts/upstream_surface.py, which keeps `owner`, `name`, `use` and `why`.",
        "",
        "[read_in]",
        *(f'{name} = "{importlib.metadata.version(name)}"' for name in LIBRARIES),
    ]
    for entry in entries:
        lines += ["", "[[entry]]", f'owner = "{entry.owner}"', f'name = "{entry.name}"', f'use = "{entry.use}"']
        lines += [f'why = "{entry.why}"', *([f'sha256 = "{entry.sha256}"'] if entry.sha256 else [])]
    TABLE.write_text("\n".join([*lines, ""]), encoding="utf-8")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def overridden_methods() -> Iterator[tuple[set[str], str, str]]:
    """Yield owners, name and place of each private upstream method that a class of this package overrides.

    A mixin of `trainer/` overrides the method of every trainer. A class of an algorithm is only combined with one.
    """
    upstream = {path: vars(load(path)) for path in TRAINERS}
    for path, tree in _modules():
        for node in ast.walk(tree):
            for method in node.body if isinstance(node, ast.ClassDef) and node.bases else ():
                if isinstance(method, Function) and is_private(method.name):
                    owners = {owner for owner, members in upstream.items() if method.name in members}
                    if owners:
                        yield owners, method.name, f"{path.relative_to(ROOT)}:{method.lineno}"


def used_names() -> Iterator[tuple[str, str]]:
    """Yield name and place of each private name that is used and not defined anywhere in this package."""
    modules = list(_modules())
    defined = {name for _, tree in modules for name in _defined_names(tree)}
    for path, tree in modules:
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("finetuning"):
                names = [alias.name for alias in node.names]
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
            ):
                names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
            for name in names:
                if is_private(name) and name not in defined | STANDARD_LIBRARY:
                    yield name, f"{path.relative_to(ROOT)}:{node.lineno}"


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def _defined_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            # A declaration without a value (`_signature_columns: list[str]`) only repeats an upstream attribute.
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if is_own and node.attr not in UPSTREAM_ATTRIBUTES:
                yield node.attr


UPSTREAM_ATTRIBUTES = {"_signature_columns"}
"""Attributes that this package assigns on `self`, and that upstream defines."""


def missing_entries(entries: list[Entry]) -> list[str]:
    """Return what is used and not in the table."""
    names = {entry.name for entry in entries}
    missing = [f"{location}: {name}" for name, location in used_names() if name not in names]
    for owners, name, location in overridden_methods():
        listed = {entry.owner for entry in entries if entry.name == name}
        is_mixin = location.startswith("src/finetuning/trainer/")
        for owner in sorted(owners - listed) if is_mixin or not owners & listed else ():
            missing.append(f"{location}: {name} of {owner}")
    return missing


def main() -> int:
    entries = read_table()
    if missing := missing_entries(entries):
        print("add to tests/upstream_surface.toml:", *missing, sep="\n  ")
        return 1
    write_table([replace(entry, sha256=entry.digest()) for entry in entries])
    return 0


if __name__ == "__main__":
    sys.exit(main())
