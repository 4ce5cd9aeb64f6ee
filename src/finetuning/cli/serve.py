"""`finetuning serve`: start vLLM with the model of a run."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import run_command
from finetuning.errors import MissingPackageError, read_json_object, reading

if TYPE_CHECKING:
    from finetuning.cli.named_model import NamedModel


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning serve`."""
    parser = argparse.ArgumentParser(
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

    model = find_model(options.model, options.base)
    command = _serving_command(model, options.base)
    for note in model.notes:
        _note(note)
    program = shutil.which(options.vllm)
    words = [program or options.vllm, *shlex.split(command)[1:], *flags]
    if options.dry_run or program is None:
        print(shlex.join([options.vllm, *words[1:]]))
    if options.dry_run:
        return 0
    if program is None:
        raise MissingPackageError(
            f"{options.vllm} is not installed here, so nothing was started",
            hint="Run the command where vLLM is, or name its program with --vllm.",
        )
    _note(shlex.join(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, words)


def _serving_command(model: NamedModel, base: str | None) -> str:
    """Return the command for a model, after converting an adapter that vLLM does not take as it is.

    Raises:
        ModelError: vLLM can serve the adapter only merged, and there is no merged model next to it.
    """
    if model.conf.adapter is None:
        return shlex.join(["vllm", "serve", model.conf.model])
    from finetuning.export.vllm.convert import NotServableError, make_vllm_compatible, plan_serving
    from finetuning.export.vllm.serving import SERVING

    if model.quant_conf.quantization_type != "no-quantization":
        kind = model.quant_conf.quantization_type
        _note(f"vLLM loads the base model without the quantization that the adapter was trained with ({kind})")
    adapter = Path(model.conf.adapter).expanduser()
    converted, merged = (adapter.with_name(f"{adapter.name}-{end}") for end in ("vllm", "merged"))
    try:
        serving = plan_serving(adapter, base)
        if serving is not None:
            for note in serving["notes"]:
                _note(note)
            return serving["command"]
        if _is_older(converted / SERVING, adapter):
            result = make_vllm_compatible(adapter, base_name=base, output=converted)
            for note in (f"{adapter} converted for vLLM: {converted}", *result.notes):
                _note(note)
            return result.command
    except NotServableError as error:
        if not (merged / "config.json").is_file():
            raise
        _note(f"{error.problems[0].message} Served merged, from {merged}")
        return shlex.join(["vllm", "serve", str(merged)])
    with reading(f"{converted / SERVING} cannot be read"):
        return str(read_json_object(converted / SERVING)["command"])


def _is_older(file: Path, adapter: Path) -> bool:
    """Return whether a conversion is missing, or older than the weights of its adapter."""
    weights = adapter / "adapter_model.safetensors"
    return not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
