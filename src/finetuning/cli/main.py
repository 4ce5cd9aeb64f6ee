"""`finetuning`: one YAML file in, a tuned model out."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from finetuning import __version__
from finetuning.cli.errors import run_command

METHODS = ("sft", "dpo", "kto", "reward", "grpo", "orpo", "cpo")
"""The subcommands that train. A test compares them with the table in `algorithms`, which `--help` does not import."""

SUBCOMMANDS = {
    "targets": "finetuning.cli.info:targets_main",
    "doctor": "finetuning.cli.info:doctor_main",
    "prepare": "finetuning.cli.data_commands:prepare_main",
    "preview": "finetuning.cli.data_commands:preview_main",
    "report": "finetuning.cli.runs:report_main",
    "runs": "finetuning.cli.runs:runs_main",
    "schema": "finetuning.cli.info:schema_main",
    "sync": "finetuning.cli.runs:sync_main",
    "launch": "finetuning.cli.launch:main",
    "job": "finetuning.cli.import_config:job_main",
    "import": "finetuning.cli.import_config:import_main",
}
"""The subcommands that do not train, each as `module:function`."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the subcommands that train."""
    parser = argparse.ArgumentParser(
        prog="finetuning",
        description="Fine-tune a language model as a YAML file says.",
        epilog="Other subcommands, each with its own --help: " + ", ".join(SUBCOMMANDS),
    )
    parser.add_argument(
        "method",
        choices=METHODS,
        metavar="{" + ",".join(METHODS) + "}",
        help="sft is supervised fine-tuning; dpo is direct preference optimisation and its family, IPO among them;"
        " kto learns from answers rated good or bad; reward trains a reward model; grpo learns from rewards of what the"
        " model writes. Experimental: orpo; cpo, which SimPO is a loss of.",
    )
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="values that replace the file's, such as run_conf.model=/m",
    )
    parser.add_argument("--logging-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: INFO)")
    parser.add_argument(
        "--num-preprocess-workers", type=int, default=4, help="processes that prepare the data (default: 4)"
    )
    parser.add_argument("--mlflow-server-uri", help="MLflow server or local store; overrides the file")
    parser.add_argument("--experiment-name", help="MLflow experiment; overrides the file")
    parser.add_argument(
        "--hf-mlflow-log-artifacts", help="whether checkpoints and the tuned model are copied to MLflow (true, false)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan with its reasons, train nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an internal error")
    parser.add_argument("--version", action="version", version=f"finetuning {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in SUBCOMMANDS:
        module, _, function = SUBCOMMANDS[arguments[0]].partition(":")
        return getattr(importlib.import_module(module), function)(arguments[1:])
    return run_command(_train, arguments)


def _train(argv: Sequence[str]) -> int:
    options = build_parser().parse_intermixed_args(argv)
    from finetuning.cli.train import train

    return train(options)


if __name__ == "__main__":
    sys.exit(main())
