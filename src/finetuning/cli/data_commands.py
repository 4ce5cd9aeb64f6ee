"""`finetuning preview` and `finetuning prepare`: the tokenized rows of a run, without its model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.algorithms import ALGORITHMS
from finetuning.cli.errors import Parser, check_output_file, method_argument, run_command
from finetuning.config.redaction import redact_text
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    from finetuning.config.sections.data import DataConfig
    from finetuning.data.prepared import PreparedData
    from finetuning.data.preview import PreviewRow

_GIB = 2**30
_READ_PER_PREVIEW_ROW = 4
"""Input rows read for each row that is displayed, because some may be dropped."""


def preview_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning preview` and return its exit code."""
    return run_command(_preview, argv)


def _preview_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetuning preview",
        description="Show the first training rows as the model sees them, and which of their tokens are trained. Reads"
        " those rows and the tokenizer; loads no model and writes no file except the HTML page.",
    )
    parser.add_argument("method", type=method_argument, help=f"the method: {', '.join(ALGORITHMS)}")
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override the file's"
    )
    parser.add_argument("--rows", type=int, default=5, help="number of rows, 1 to 100 (default: 5)")
    parser.add_argument("--html", type=Path, help="write a searchable HTML page instead of printing")
    parser.add_argument(
        "--color", "--colour", choices=("auto", "always", "never"), default="auto", help="use colors (default: auto)"
    )
    return parser


def _preview(argv: Sequence[str]) -> int:
    options = _preview_parser().parse_intermixed_args(argv)
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.data.chat.template import TemplateRenderer
    from finetuning.data.preprocessor import MAX_PREVIEW_ROWS
    from finetuning.data.preview import to_html, to_text
    from finetuning.training.setup import load_tokenizer, prepare

    if not 1 <= options.rows <= MAX_PREVIEW_ROWS:
        raise ConfigError(f"--rows {options.rows}: must be between 1 and {MAX_PREVIEW_ROWS}")
    if options.html is not None:
        check_output_file(options.html, "--html")
    method = ALGORITHMS[options.method]
    document = apply_overrides(read_document(options.config), options.overrides)
    with locate_errors(document):
        experiment = validate(document, method.experiment).experiment
        data_conf = _limit_rows(experiment.data_conf, options.rows * _READ_PER_PREVIEW_ROW)
        experiment = experiment.model_copy(update={"data_conf": data_conf})
        tokenizer = load_tokenizer(experiment)
        data = prepare(experiment, method, tokenizer, 1)
    rows = _first_rows(data.preview, options.rows)
    statistics = data.statistics.lines()
    special_tokens = TemplateRenderer(tokenizer.tokenizer).special_tokens
    if options.html is None:
        color = sys.stdout.isatty() if options.color == "auto" else options.color == "always"
        print(to_text(rows, color=color, special_tokens=special_tokens))
        for line in statistics:
            print(line)
        return 0
    facts = [
        ("config", options.config),
        ("tokenizer", str(tokenizer)),
        ("rows read", "\n".join(line.strip() for line in statistics)),
    ]
    page = to_html(rows, f"finetuning {options.method}: first rows", facts, special_tokens)
    options.html.write_text(redact_text(page), encoding="utf-8")
    print(f"{options.html}: {len(rows)} rows")
    return 0


def _first_rows(preview: Sequence[PreviewRow], count: int) -> list[PreviewRow]:
    """Return the parts of the first `count` input rows; a preference has two parts, chosen and rejected."""
    places = list(dict.fromkeys(row.location for row in preview))[:count]
    return [row for row in preview if row.location in set(places)]


def _limit_rows(data: DataConfig, count: int) -> DataConfig:
    """Return the config of the first `count` rows of each training dataset, where dropped rows never stop the run."""
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


def prepare_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning prepare` and return its exit code."""
    return run_command(_prepare, argv)


def _prepare_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetuning prepare",
        description="Render, mask and tokenize the rows of a run ahead of time. They are written to the cache that the"
        " run reads, and with --output to a folder for data_conf.prepared. Reads the data and the tokenizer; loads no"
        " model.",
    )
    parser.add_argument("method", nargs="?", type=method_argument, help=f"the method: {', '.join(ALGORITHMS)}")
    parser.add_argument("config", nargs="?", help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override the file's"
    )
    parser.add_argument("--output", type=Path, help="also write the rows to this folder, which must be empty or new")
    parser.add_argument("--shards", type=int, default=1, help="number of data files in the folder (default: 1)")
    parser.add_argument(
        "--prune",
        type=float,
        metavar="GIB",
        help="prepare nothing; remove the least recently used cache entries until at most this many GiB are left",
    )
    return parser


def _prepare(argv: Sequence[str]) -> int:
    parser = _prepare_parser()
    options = parser.parse_intermixed_args(argv)
    if options.prune is not None:
        return _prune_cache(options.prune)
    if options.method is None or options.config is None:
        parser.error("method and config are required")
    if options.shards < 1:
        raise ConfigError(f"--shards {options.shards}: must be at least 1")
    from finetuning.atomic_io import require_empty
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.training.setup import load_tokenizer, prepare

    if options.output is not None:
        require_empty(options.output)
    method = ALGORITHMS[options.method]
    document = apply_overrides(read_document(options.config), options.overrides)
    with locate_errors(document):
        experiment = validate(document, method.experiment).experiment
        if experiment.data_conf.streaming:
            raise ConfigError(
                "rows are streamed during training, and there is nothing to prepare",
                location=Location(key="data_conf.streaming"),
                hint="Set data_conf.streaming=false to prepare all rows.",
            )
        data = prepare(experiment, method, load_tokenizer(experiment), 1)
    for line in [data.origin, *data.statistics.lines()]:
        print(line)
    if options.output is not None:
        _write_folder(data, options.output, options.shards)
    return 0


def _write_folder(data: PreparedData, folder: Path, shards: int) -> None:
    from finetuning.data.cache import write_entry

    entry = data.entry
    assert entry is not None, "only streams have no entry"
    write_entry(folder, entry.train, entry.validation, entry.statistics, entry.preview, entry.key, shards=shards)
    print(f"{folder}: set data_conf.prepared={folder} to train on these rows without the data files")


def _prune_cache(gib: float) -> int:
    from finetuning.data.cache import cache_folder, prune

    folder = cache_folder("auto")
    if folder is None:
        raise ConfigError("the cache is off")
    removed = prune(folder, int(gib * _GIB))
    for entry, size in removed:
        print(f"removed {entry}: {size / _GIB:.2f} GiB")
    print(f"{folder}: removed {len(removed)} entr{'y' if len(removed) == 1 else 'ies'}")
    return 0
