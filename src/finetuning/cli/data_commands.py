"""`finetuning preview`: what a run would train on, row by row, from the data and the tokenizer alone.

`finetuning prepare`: the rows of a run made ahead of time, for a run that starts at once, or without the data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import run_command
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    from finetuning.config.sections.data import DataConfig
    from finetuning.config.sections.experiment import Experiment

_LOOKED_AT = 4
"""Rows that are read for each row that is shown, as some may be dropped."""


def preview_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_preview, argv)


def _preview_parser() -> argparse.ArgumentParser:
    from finetuning.algorithms import METHODS

    parser = argparse.ArgumentParser(
        prog="finetuning preview",
        description="Show the first rows of the training data as the model will see them, and what of them is trained."
        " Reads the tokenizer and those rows; no model is loaded, and no file is written but the page.",
    )
    parser.add_argument("method", choices=list(METHODS), help="the method")
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--rows", type=int, default=5, help="rows to show, 1 to 100 (default: 5)")
    parser.add_argument("--html", type=Path, help="write a page that can be searched instead of printing")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="colours (default: auto)")
    return parser


def _preview(argv: Sequence[str]) -> int:
    options = _preview_parser().parse_intermixed_args(argv)
    from finetuning.algorithms import METHODS
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.data.chat.template import TemplateRenderer
    from finetuning.data.preprocessor import MAX_PREVIEW_ROWS
    from finetuning.data.preview import to_text
    from finetuning.training.setup import load_tokenizer, prepare

    if not 1 <= options.rows <= MAX_PREVIEW_ROWS:
        raise ConfigError(f"--rows {options.rows}: must be between 1 and {MAX_PREVIEW_ROWS}")
    method = METHODS[options.method]
    document = apply_overrides(read_document(options.config), options.overrides)
    with locate_errors(document):
        experiment = _of_first_rows(validate(document, method.experiment).experiment, options.rows * _LOOKED_AT)
        tokenizer = load_tokenizer(experiment)
        data = prepare(experiment, method, tokenizer, 1)
    rows = _first(data.preview, options.rows)
    special = TemplateRenderer(tokenizer.tokenizer).special_tokens
    if options.html is None:
        colour = sys.stdout.isatty() if options.colour == "auto" else options.colour == "always"
        print(to_text(rows, color=colour, special_tokens=special))
        for line in data.statistics.lines():
            print(line)
        return 0
    from finetuning.data.preview import to_html

    facts = [("config", options.config), ("tokenizer", str(tokenizer))]
    facts.append(("the rows that were looked at", "\n".join(line.strip() for line in data.statistics.lines())))
    options.html.write_text(to_html(rows, f"finetuning {options.method}: first rows", facts, special), encoding="utf-8")
    print(f"{options.html}: {len(rows)} rows")
    return 0


def _first(rows: Sequence, count: int) -> list:
    """The parts of the first so many rows; a preference is shown in two parts."""
    places = list(dict.fromkeys(row.place for row in rows))[:count]
    return [row for row in rows if row.place in set(places)]


def _of_first_rows(experiment: Experiment, count: int) -> Experiment:
    return experiment.model_copy(update={"data_conf": _first_rows(experiment.data_conf, count)})


def _first_rows(data: DataConfig, count: int) -> DataConfig:
    """The same data, no more than the first rows of each dataset; rows that are lost stop nothing."""
    from finetuning.config.sections.data import NoData

    training = data.training_data
    datasets = [
        source.model_copy(update={"max_rows": min(source.max_rows or count, count)}) for source in training.datasets
    ]
    return data.model_copy(
        update={
            "training_data": training.model_copy(update={"datasets": datasets}),
            "validation_data": NoData(type="NONE"),
            "cache": "off",
            "streaming": False,
            "on_bad_row": "skip",
            "max_lost_fraction": 1.0,
        }
    )


_GIB = 2**30


def prepare_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_prepare, argv)


def _prepare_parser() -> argparse.ArgumentParser:
    from finetuning.algorithms import METHODS

    parser = argparse.ArgumentParser(
        prog="finetuning prepare",
        description="Render, mask and tokenise the rows of a run. They are kept in the cache, where the run finds them,"
        " or in a folder that data_conf.prepared names. Reads the data and the tokenizer; no model is loaded.",
    )
    parser.add_argument("method", nargs="?", choices=list(METHODS), help="the method")
    parser.add_argument("config", nargs="?", help="path of the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--output", type=Path, help="also write the rows into this folder, which must not be there")
    parser.add_argument(
        "--shards", type=int, default=1, help="files that the folder's rows are spread over (default: 1)"
    )
    parser.add_argument(
        "--prune",
        type=float,
        metavar="GIB",
        help="instead: remove the entries of the cache longest unused until no more than so many GiB are left",
    )
    return parser


def _prepare(argv: Sequence[str]) -> int:
    parser = _prepare_parser()
    options = parser.parse_intermixed_args(argv)
    if options.prune is not None:
        return _prune(options.prune)
    if options.method is None or options.config is None:
        parser.error("a method and a config are needed")
    if options.shards < 1:
        raise ConfigError(f"--shards {options.shards}: must be at least 1")
    from finetuning.algorithms import METHODS
    from finetuning.atomic_io import require_empty
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.training.setup import load_tokenizer, prepare

    if options.output is not None:
        require_empty(options.output)
    method = METHODS[options.method]
    document = apply_overrides(read_document(options.config), options.overrides)
    with locate_errors(document):
        experiment = validate(document, method.experiment).experiment
        if experiment.data_conf.streaming:
            raise ConfigError(
                "rows are streamed during training, and there is nothing to prepare",
                place=Location(key="data_conf.streaming"),
                hint="Set data_conf.streaming=false to prepare all rows.",
            )
        data = prepare(experiment, method, load_tokenizer(experiment), 1)
    for line in [data.origin, *data.statistics.lines()]:
        print(line)
    if options.output is not None:
        from finetuning.data.cache import write_entry

        entry = data.entry
        write_entry(
            options.output,
            entry.train,
            entry.validation,
            entry.statistics,
            entry.preview,
            entry.key,
            shards=options.shards,
        )
        print(f"{options.output}: a run with data_conf.prepared={options.output} trains on these rows without the data")
    return 0


def _prune(gib: float) -> int:
    from finetuning.data.cache import cache_folder, prune

    folder = cache_folder("auto")
    if folder is None:
        raise ConfigError("the cache is off")
    removed = prune(folder, int(gib * _GIB))
    for entry, size in removed:
        print(f"removed {entry}: {size / _GIB:.2f} GiB")
    print(f"{folder}: {len(removed)} entries removed")
    return 0
