"""`finetuning prepare`: the rows of a run made ahead of time, for a run that starts at once, or without the data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli.errors import run
from finetuning.errors import ConfigError, Place

_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run(_prepare, argv)


def _parser() -> argparse.ArgumentParser:
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
    parser = _parser()
    options = parser.parse_intermixed_args(argv)
    if options.prune is not None:
        return _prune(options.prune)
    if options.method is None or options.config is None:
        parser.error("a method and a config are needed")
    if options.shards < 1:
        raise ConfigError(f"--shards {options.shards}: must be at least 1")
    from finetuning.algorithms import METHODS
    from finetuning.atomic_io import refuse_occupied
    from finetuning.cli.located import located
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.training.setup import load_tokenizer, prepare

    if options.output is not None:
        refuse_occupied(options.output)
    method = METHODS[options.method]
    document = apply_overrides(read_document(options.config), options.overrides)
    with located(document):
        experiment = validate(document, method.experiment).experiment
        if experiment.data_conf.streaming:
            raise ConfigError(
                "rows are made as training goes, and there is nothing to prepare",
                place=Place(key="data_conf.streaming"),
                hint="Say data_conf.streaming=false to prepare them all.",
            )
        data = prepare(experiment, method, load_tokenizer(experiment), 1)
    for line in [data.origin, *data.ledger.lines()]:
        print(line)
    if options.output is not None:
        from finetuning.data.store import write

        made = data.stored
        write(
            options.output, made.train, made.validation, made.ledger, made.preview, made.inputs, shards=options.shards
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
