"""`finetuning selftest`: run a config in ways that must give the same result on this machine, and compare."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import EXIT_GUARD, EXIT_OK, ConfigError, Location, ModelError, first_line

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import Experiment
    from finetuning.selftest.checks import Result, SelfTest


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(
        prog="finetuning selftest",
        description="Check that this machine computes what it should: train a few steps of a config in ways that must"
        " give the same result (other micro-batches, other layouts, killed and resumed, after running out of memory,"
        " merged) and print the largest differences. Run it after changing a driver, a library or a cluster.",
    )
    parser.add_argument("method", help="the training subcommand of the config, such as sft")
    parser.add_argument("config", type=Path, help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override the file's"
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes of the trials, as in finetuning launch")
    parser.add_argument("--preset", help="how the model is distributed, as in finetuning launch")
    parser.add_argument("--folder", type=Path, help="folder for the trials, kept afterwards (default: temporary)")
    parser.add_argument("--json", action="store_true", help="print the results as a JSON list instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code: 3 if a check failed."""
    return run_command(_selftest, argv)


def _selftest(argv: Sequence[str]) -> int:
    options = build_parser().parse_intermixed_args(argv)
    with _folder(options.folder) as folder:
        test = _build(options, folder)
        results: list[Result] = []
        for result in test.run():
            results.append(result)
            if not options.json:
                _print(result)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    failed = [result.name for result in results if result.failed]
    if not options.json:
        print(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}" if failed else "All checks passed.")
    return EXIT_GUARD if failed else EXIT_OK


def _build(options: argparse.Namespace, folder: Path) -> SelfTest:
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.suggestions import did_you_mean
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.report.console import quiet_libraries
    from finetuning.selftest.checks import SelfTest
    from finetuning.selftest.trials import TrialRunner, dropouts_of, trial_overrides

    if options.method not in ALGORITHMS:
        raise ConfigError(f'unknown method "{options.method}"', hint=did_you_mean(options.method, ALGORITHMS))
    if options.nproc < 1:
        raise ConfigError(f"--nproc {options.nproc}: must be at least 1")
    quiet_libraries()
    document = apply_overrides(read_document(options.config), options.overrides)
    experiment = validate(document, ALGORITHMS[options.method].experiment).experiment
    launch = ["launch", "--nproc", str(options.nproc), *(["--preset", options.preset] if options.preset else [])]
    config = _model_config(experiment)
    runner = TrialRunner(
        method=options.method,
        config=options.config.absolute(),
        overrides=(*options.overrides, *trial_overrides(experiment, options.nproc, dropouts_of(config))),
        folder=folder,
        final_name=experiment.run_conf.final_checkpoint_name,
        launch=tuple(launch) if options.nproc > 1 or options.preset else (),
    )
    return SelfTest(experiment, runner, options.nproc, _dtype(experiment, config))


def _model_config(experiment: Experiment) -> dict[str, object]:
    """Return the values of the model's config and of its text part.

    Raises:
        ModelError: the model has no config that transformers can read.
    """
    from transformers import AutoConfig

    run = experiment.run_conf
    try:
        config = AutoConfig.from_pretrained(
            run.model,
            revision=run.model_args.revision,
            trust_remote_code=run.model_args.trust_remote_code,
            cache_dir=run.model_args.cache_dir,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the model's config: {first_line(error)}", location=Location(key="run_conf.model")
        ) from error
    return {**config.to_dict(), **config.get_text_config().to_dict()}


def _dtype(experiment: Experiment, config: dict[str, object]) -> str:
    args = experiment.training_args
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    asked = experiment.run_conf.model_args.dtype
    name = asked if asked != "auto" else config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(name) if name in ("float16", "bfloat16") else "float32"


@contextmanager
def _folder(asked: Path | None) -> Iterator[Path]:
    """Yield the folder of the trials; a temporary one is removed."""
    if asked is None:
        with tempfile.TemporaryDirectory(prefix="finetuning-selftest-") as folder:
            yield Path(folder)
        return
    if asked.exists() and any(os.scandir(asked)):
        raise ConfigError(f"--folder {asked}: the folder is not empty")
    asked.mkdir(parents=True, exist_ok=True)
    yield asked


def _print(result: Result) -> None:
    difference = "" if result.difference is None else f"{result.difference:.1e} of {result.tolerance:.1e}"
    print(f"{result.verdict:<7}  {result.name:<20}  {difference:<18}  {result.compared}".rstrip())
    if result.reason:
        print(f"{'':<9}{result.reason}")


def _work(argv: list[str]) -> int:
    """Run a process of the self-test: `out-of-memory METHOD CONFIG ...` or `MEASUREMENT OUTPUT METHOD CONFIG ...`.

    A measurement writes {"difference": ..., "reason": ...} to OUTPUT.
    """
    from finetuning.report.console import configure_logging

    if argv[0] == "out-of-memory":
        from finetuning.cli.main import parse_options
        from finetuning.cli.train import train
        from finetuning.selftest.measure import OutOfMemoryOnce

        return train(parse_options, argv[1:], callbacks=[OutOfMemoryOnce()])
    measurement, output, method, config, *overrides = argv
    configure_logging("ERROR", is_main=True)
    from finetuning.selftest.measure import MEASUREMENTS, set_up

    difference, reason = MEASUREMENTS[measurement](set_up(method, config, overrides))
    Path(output).write_text(json.dumps({"difference": difference, "reason": reason}), encoding="utf-8")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_command(_work))
