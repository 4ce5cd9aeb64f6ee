"""The console script `finetuning`: the table of subcommands and the parser of those that train."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from finetuning import __version__
from finetuning.cli.errors import Parser, near_option, run_command
from finetuning.errors import UsageError


@dataclass(frozen=True)
class Subcommand:
    """A subcommand that does not train."""

    target: str
    """`module:function`; the function takes the arguments that follow the name and returns the exit code."""
    summary: str
    """Its line in `finetuning --help`."""


SUBCOMMANDS = {
    "init": Subcommand("finetuning.cli.init:main", "write a config for a model and data"),
    "recipes": Subcommand("finetuning.cli.recipes:main", "list, show and copy the configs that ship with the package"),
    "launch": Subcommand("finetuning.cli.launch:main", "train in several processes, on one or more machines"),
    "preview": Subcommand("finetuning.cli.data_commands:preview_main", "show tokenized rows and their loss mask"),
    "prepare": Subcommand("finetuning.cli.data_commands:prepare_main", "tokenize the data before a run"),
    "data": Subcommand("finetuning.cli.data_doctor:main", "data doctor: examine all rows before a run"),
    "targets": Subcommand("finetuning.cli.info:targets_main", "list the modules that target_modules can name"),
    "schema": Subcommand("finetuning.cli.config_commands:schema_main", "print the JSON Schema of a method's YAML"),
    "doctor": Subcommand("finetuning.cli.info:doctor_main", "check hardware and installed packages"),
    "selftest": Subcommand(
        "finetuning.cli.selftest:main", "check that a config computes the same in different ways on this machine"
    ),
    "rehearse": Subcommand(
        "finetuning.cli.rehearse:main", "estimate the memory and time of a run on a GPU, without a GPU or weights"
    ),
    "runs": Subcommand("finetuning.cli.runs:runs_main", "list runs and their state"),
    "watch": Subcommand("finetuning.cli.watch:main", "show runs in the browser while they train"),
    "report": Subcommand("finetuning.cli.runs:report_main", "write an HTML report of a run"),
    "sync": Subcommand("finetuning.cli.runs:sync_main", "upload metrics that were queued while MLflow was unreachable"),
    "generate": Subcommand("finetuning.cli.generate:main", "generate answers with a model or an adapter"),
    "chat": Subcommand("finetuning.cli.chat:main", "talk to a model in the terminal"),
    "serve": Subcommand("finetuning.cli.serve:main", "start vLLM with the model of a run"),
    "evaluate": Subcommand("finetuning.cli.evaluate:main", "evaluate a model and its base model on held-out rows"),
    "export": Subcommand("finetuning.cli.export:main", "write a model as GGUF for llama.cpp and Ollama"),
    "merge_adapter": Subcommand("finetuning.cli.merge_adapter:main", "merge LoRA adapters into the base model"),
    "merge": Subcommand("finetuning.cli.merge_adapter:main", "short for merge_adapter"),
    "create_vllm_compatible_adapter": Subcommand(
        "finetuning.cli.create_vllm_compatible_adapter:main", "convert an adapter for vLLM"
    ),
    "replace_tokens": Subcommand("finetuning.cli.replace_tokens:main", "rename tokens of a tokenizer, keep their ids"),
    "import": Subcommand(
        "finetuning.cli.config_commands:import_main", "translate another engine's config to YAML for this one"
    ),
    "job": Subcommand("finetuning.cli.fms_job:main", "run an fms-hf-tuning JSON job"),
    "completion": Subcommand("finetuning.cli.completion:main", "print a script for completion in bash, zsh or fish"),
    "sft_trainer": Subcommand("finetuning.cli.fms_job:sft_trainer_main", "train with the flags of fms-hf-tuning"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommands that train."""
    from finetuning.algorithms import ALGORITHMS

    training = [(name, algorithm.title) for name, algorithm in ALGORITHMS.items()]
    not_training = [(name, subcommand.summary) for name, subcommand in SUBCOMMANDS.items()]
    parser = Parser(
        prog="finetuning",
        usage=_usage(),
        description="Fine-tune a language model from one YAML file.\n\n"
        f"subcommands that train:\n{_table(training)}\n\n"
        f"other subcommands, each with its own --help:\n{_table(not_training)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", metavar="SUBCOMMAND", help=f"one of {', '.join(ALGORITHMS)}")
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.path=value",
        help="values that override the file's, such as run_conf.model=/m",
    )
    parser.add_argument("--logging-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: INFO)")
    parser.add_argument(
        "--num-preprocess-workers", type=int, default=4, help="processes that tokenize the data (default: 4)"
    )
    parser.add_argument("--mlflow-server-uri", help="MLflow server or local store; overrides the file")
    parser.add_argument("--experiment-name", help="MLflow experiment; overrides the file")
    parser.add_argument(
        "--hf-mlflow-log-artifacts",
        help="whether checkpoints and the fine-tuned model are uploaded to MLflow (true, false)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything that needs no weights; do not train")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an internal error")
    parser.add_argument("--version", action="version", version=f"finetuning {__version__}")
    return parser


def _usage() -> str:
    from finetuning.algorithms import ALGORITHMS

    not_training = ", ".join(SUBCOMMANDS)
    return (
        f"finetuning {{{','.join(ALGORITHMS)}}} config\n            [key.path=value ...] [options]\n"
        + textwrap.fill(
            not_training, 79, initial_indent="       finetuning SUBCOMMAND ..., one of: ", subsequent_indent=" " * 7
        )
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<31} {summary}" for name, summary in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in SUBCOMMANDS:
        module, _, function = SUBCOMMANDS[arguments[0]].target.partition(":")
        return getattr(importlib.import_module(module), function)(arguments[1:])
    from finetuning.cli.train import train

    return run_command(partial(train, parse_options), arguments)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a subcommand that trains.

    Raises:
        UsageError: there is no such subcommand or option.
    """
    # Options may precede the subcommand. A wrong first argument is reported before the parser sees, and rejects, the
    # options of the subcommand that was meant.
    if argv and not argv[0].startswith("-"):
        _check_method(argv[0])
    options, unknown = build_parser().parse_known_intermixed_args(argv)
    _check_method(options.method)
    if unknown:
        raise _unknown_option(unknown[0], argv, options.method)
    return options


def _unknown_option(option: str, argv: Sequence[str], method: str) -> UsageError:
    """Return the error for an option that does not exist. Keys of the config are no options: it names the key."""
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.library_fields import table_fields
    from finetuning.config.validation.passthrough import library_keys
    from finetuning.config.validation.section_tree import key_index
    from finetuning.config.validation.suggestions import key_hint, nearest
    from finetuning.config.yaml.document import ConfigDocument

    name, equals, value = option.partition("=")
    following = argv[argv.index(option) + 1 :]
    if not equals and following and not following[0].startswith("-") and "=" not in following[0]:
        value = following[0]
    config, key = ALGORITHMS[method].experiment, name.lstrip("-").replace("-", "_")
    index = {**library_keys(ConfigDocument({}), config, table_fields()), **key_index(config)}
    last = key.rpartition(".")[2]
    near = last if last in index else nearest(last, index, cutoff=0.85)
    if last not in index and (same := near_option(name, build_parser())):
        hint = same
    elif near is not None:
        path = ".".join(part for part in (index[near][0], near) if part)
        hint = f"Keys of the config are set as key.path=value: {path}={value or '…'}"
    else:
        hint = key_hint(key, (), index) or "See finetuning --help."
    return UsageError(f"unknown option {name}", hint=hint)


def _check_method(name: str) -> None:
    """Raise UsageError unless `name` is a method."""
    from finetuning.algorithms import ALGORITHMS

    if name in ALGORITHMS:
        return
    if name in SUBCOMMANDS:
        raise UsageError(f"put the subcommand first: finetuning {name} ...")
    from finetuning.config.validation.suggestions import did_you_mean

    hint = did_you_mean(name, [*ALGORITHMS, *SUBCOMMANDS])
    if name in ("train", "finetune", "run", "cli") or name.endswith((".yaml", ".yml")):
        config = name if name.endswith((".yaml", ".yml")) else "config.yaml"
        hint = f"Training is started by the name of the method: finetuning sft {config}"
    raise UsageError(f'unknown subcommand "{name}"', hint=hint or "See finetuning --help.")


if __name__ == "__main__":
    sys.exit(main())
