"""`finetuning serve`: start vLLM with the model of a run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import MissingPackageError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning serve`."""
    parser = Parser(
        prog="finetuning serve",
        usage="%(prog)s RUN|MODEL [options] [-- FLAG ...]",
        description="Start vLLM with the model of a run, and with the flags that its tokenizer, chat template and stop"
        " tokens need. The server takes the place of this process: its signals and its exit code are the server's."
        " Where vLLM is not installed, the command is printed.",
        epilog="What follows -- are further flags of vLLM, such as -- --port 8080.",
    )
    parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help="output directory of a run, path of an adapter, or path or hub id of a model",
    )
    parser.add_argument("--base", help="path of the base model, if it is not at the path in the adapter's config")
    parser.add_argument(
        "--vllm", metavar="PROGRAM", default="vllm", help="the program vllm, if it is in another environment"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command; start nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_command(_serve, argv)


def _serve(argv: Sequence[str]) -> int:
    end = argv.index("--") if "--" in argv else len(argv)
    options = build_parser().parse_args(argv[:end])
    flags = argv[end + 1 :]
    from finetuning.cli.named_model import find_model
    from finetuning.cli.vllm_process import serving_command
    from finetuning.inference.vllm import find_vllm
    from finetuning.report.console import quiet_libraries

    quiet_libraries()
    model = find_model(options.model, options.base)
    command = serving_command(model.conf, model.quant_conf, options.base)
    for note in (*model.notes, *command.notes):
        _note(note)
    words = [options.vllm, *command.words[1:], *flags]
    if options.dry_run:
        print(shlex.join(words))
        return 0
    try:
        program = find_vllm(options.vllm)
    except MissingPackageError as error:
        print(shlex.join(words))
        raise MissingPackageError(
            f"{error.problems[0].message}, so nothing was started",
            hint="Run the command where vLLM is, or name its program with --vllm.",
        ) from None
    words[0] = program
    _note(shlex.join(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, words)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
