"""`finetuning recipes`: list, show and copy the configs that ship with the package."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import ConfigError

_FIELD = re.compile(r"# (Hardware|Memory|Time|License|Command|Data): +(.+)")
_SCHEMA_LINE = re.compile(r"(# yaml-language-server: \$schema=)\S*?(\w+)\.json")


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name, and what the comment at its top says."""

    name: str
    title: str
    hardware: str = ""
    memory: str = ""
    time: str = ""
    license: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning recipes` and return its exit code."""
    return run_command(_recipes, argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning recipes`."""
    parser = Parser(
        prog="finetuning recipes",
        description="Configs that ship with the package, each with the hardware, memory and time that it needs.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,show,copy}")
    listing = actions.add_parser("list", help="list them", description="List the recipes.")
    listing.add_argument("word", nargs="?", default="", help="only those with this word in their name or title")
    listing.add_argument("--json", action="store_true", help="print a JSON list of objects")
    show = actions.add_parser("show", help="print one", description="Print a recipe.")
    show.add_argument("name", help="such as sft/qwen3-4b-instruct-lora")
    copying = actions.add_parser("copy", help="write one to a file", description="Write a recipe to a file.")
    copying.add_argument("name", help="such as sft/qwen3-4b-instruct-lora")
    copying.add_argument("target", type=Path, nargs="?", help="file to write (default: its name here)")
    return parser


def _recipes(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    if options.action == "show":
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return 0
    if options.action == "copy":
        return _copy(options.name, options.target)
    recipes = [recipe for recipe in list_recipes() if options.word.lower() in f"{recipe.name} {recipe.title}".lower()]
    if options.json:
        print(json.dumps([asdict(recipe) for recipe in recipes], indent=2))
        return 0
    if not recipes:
        raise ConfigError(f'no recipe has "{options.word}" in its name or title')
    for recipe in recipes:
        facts = [recipe.hardware.partition(",")[0].partition(":")[0], recipe.time.partition(",")[0], recipe.license]
        print(recipe.name)
        for line in (recipe.title, "; ".join(fact for fact in facts if fact)):
            print(textwrap.fill(line, 80, initial_indent="    ", subsequent_indent="    "))
    return 0


def folder() -> Path:
    """Return the folder with the recipes."""
    return Path(str(resources.files("finetuning").joinpath("recipes")))


def list_recipes() -> list[Recipe]:
    """Return all recipes, by name."""
    paths = [path for path in folder().glob("*/*.yaml") if path.parent.name != "schema"]
    return [read_recipe(path) for path in sorted(paths)]


def read_recipe(path: Path) -> Recipe:
    """Return what the comment at the top of a recipe says."""
    fields: dict[str, str] = {}
    name, title = "", ""
    for line in path.read_text(encoding="utf-8").splitlines()[:40]:
        if not line.startswith("#"):
            break
        if match := _FIELD.match(line):
            name = match[1].lower()
            fields[name] = match[2]
        elif name and line.startswith("#  "):
            fields[name] += f" {line.lstrip('# ')}"
        elif not title and len(line) > 2 and "yaml-language-server" not in line:
            title = line.lstrip("# ")
    values = {key: fields.get(key, "") for key in ("hardware", "memory", "time", "license")}
    return Recipe(f"{path.parent.name}/{path.stem}", title.rstrip("."), **values)


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    path = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if "/" in name and ".." not in name and path.is_file():
        return path
    from finetuning.config.validation.suggestions import did_you_mean

    names = [recipe.name for recipe in list_recipes()]
    same = [f'"{full}"' for full in names if full.endswith(f"/{name}")]
    same = same or [f'"{full}"' for full in names if full.startswith(name) or f"/{name}" in full][:4]
    hint = f"Did you mean {' or '.join(same)}?" if same else did_you_mean(name, names, cutoff=0.4)
    raise ConfigError(f'there is no recipe "{name}"', hint=hint or "See finetuning recipes list.")


def _copy(name: str, target: Path | None) -> int:
    """Copy a recipe and the JSON Schema that its first line names.

    Raises:
        ConfigError: a file of that name exists.
    """
    source = find_recipe(name)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise ConfigError(f"{target} exists", hint="Name another file.")
    text = source.read_text(encoding="utf-8").replace(f"configs/{source.parent.name}/{source.name}", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    if match := _SCHEMA_LINE.search(text):
        method = match[2]
        schema = target.with_name(f"{method}.schema.json")
        shutil.copyfile(folder() / "schema" / f"{method}.json", schema)
        text = _SCHEMA_LINE.sub(rf"\g<1>{schema.name}", text)
        print(f"{schema}: for editors that complete keys")
    target.write_text(text, encoding="utf-8")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
