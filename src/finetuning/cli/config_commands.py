"""`finetuning schema` and `finetuning import`: the JSON Schema of a config, and configs of other engines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from finetuning.cli.errors import Parser, method_argument, run_command
from finetuning.errors import ConfigError


def schema_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning schema` and return its exit code."""
    return run_command(_schema, argv)


def _schema(argv: Sequence[str]) -> int:
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.schema.json_schema import schema_text

    parser = Parser(
        prog="finetuning schema",
        description="Print the JSON Schema of a method's YAML file. Editors read it from a first line such as"
        " '# yaml-language-server: $schema=sft.json'.",
    )
    parser.add_argument("method", type=method_argument, help=f"the method: {', '.join(ALGORITHMS)}")
    print(schema_text(ALGORITHMS[parser.parse_args(argv).method].experiment), end="")
    return 0


def _import_parser() -> argparse.ArgumentParser:
    from finetuning.importers import ENGINES

    parser = Parser(
        prog="finetuning import",
        description="Translate another engine's config and print it as YAML for this one: a JSON job of fms-hf-tuning,"
        " or a YAML file of axolotl, LLaMA-Factory or TRL. Settings that have no counterpart are listed on stderr and"
        " at the top of the YAML.",
        epilog="example: finetuning import job.json > experiment.yaml",
    )
    parser.add_argument("config", help="the other engine's file")
    parser.add_argument(
        "--from", dest="engine", choices=list(ENGINES), help="the engine (default: auto-detected from the keys)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of processes the config was written for; scales the total batch size (default: 1)",
    )
    return parser


def import_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning import` and return its exit code."""
    return run_command(_import, argv)


def _import(argv: Sequence[str]) -> int:
    options = _import_parser().parse_args(argv)
    from finetuning.config.yaml.reader import read_document
    from finetuning.importers import ENGINES, detect_engine, to_yaml

    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: must be at least 1")
    document = read_document(options.config)
    engine = options.engine or detect_engine(document)
    translation = ENGINES[engine](document, options.processes)
    for note in translation.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(to_yaml(translation, engine), end="")
    return 0
