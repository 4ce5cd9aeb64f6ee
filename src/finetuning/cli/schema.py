"""`finetuning schema`: the JSON Schema of a method's YAML, for editors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from finetuning.cli.errors import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run(_print_schema, argv)


def _print_schema(argv: Sequence[str]) -> int:
    from finetuning.algorithms import METHODS
    from finetuning.config.schema.json_schema import schema_text

    parser = argparse.ArgumentParser(
        prog="finetuning schema",
        description="Print the JSON Schema of a method's YAML. Editors take it from a first line such as"
        " '# yaml-language-server: $schema=sft.json'.",
    )
    parser.add_argument("method", choices=list(METHODS), help="the method")
    print(schema_text(METHODS[parser.parse_args(argv).method].experiment), end="")
    return 0
