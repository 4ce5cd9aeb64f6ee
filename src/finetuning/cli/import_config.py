"""`finetuning import`: the YAML that another engine's job stands for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetuning.cli.errors import run

if TYPE_CHECKING:
    from finetuning.config.yaml.document import Document
    from finetuning.importers.translation import Translation

ENGINES = ("fms-hf-tuning", "axolotl", "llama-factory", "trl")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run(_import, argv)


def _import(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="finetuning import",
        description="Print the YAML that another engine's config stands for: a JSON job of fms-hf-tuning, or the YAML"
        " of axolotl, LLaMA-Factory or TRL. What could not be carried over is told on stderr and on top of the YAML.",
        epilog="finetuning import job.json > experiment.yaml",
    )
    parser.add_argument("config", help="the other engine's file")
    parser.add_argument("--from", dest="engine", choices=ENGINES, help="the engine (default: told by the keys)")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that the config was run on, which its batch is counted by"
    )
    options = parser.parse_args(argv)
    from finetuning.config.yaml.reader import read_document
    from finetuning.errors import ConfigError
    from finetuning.importers.translation import written

    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: must be at least 1")
    document = read_document(options.config)
    engine = options.engine or _engine(document)
    translation = _translate(engine, document, options.processes)
    method = translation.values.get("method", "sft")
    for note in translation.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(written(translation, engine, method), end="")
    return 0


def _engine(document: Document) -> str:
    from finetuning.importers.other_engines import tell_engine

    of_jobs = {"training_data_path", "data_config_path"}
    return "fms-hf-tuning" if of_jobs & set(document.values) else tell_engine(document)


def _translate(engine: str, document: Document, processes: int) -> Translation:
    if engine == "fms-hf-tuning":
        from finetuning.cli.job import make_readers
        from finetuning.importers.fms.job import to_experiment

        return to_experiment(document, make_readers(), processes=processes)
    from finetuning.importers.other_engines import ENGINES as FOREIGN

    return FOREIGN[engine](document, processes)
