"""`create_vllm_compatible_adapter`: an adapter that vLLM loads, or a word on what to do instead."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The parser of `create_vllm_compatible_adapter`."""
    parser = argparse.ArgumentParser(
        prog="create_vllm_compatible_adapter",
        description="Checks whether vLLM can serve an adapter, and removes from it what vLLM does not take where that"
        " loses nothing: tensors that equal the base model's. Writes serving.json with the command that serves it.",
    )
    parser.add_argument(
        "model_path",
        help="Path to the model folder (e.g. path to the folder containing the adapter) to be made compatible",
    )
    parser.add_argument(
        "--training-config",
        help="Path to the training config, which decides whether the extra layers are needed: then nothing is removed.",
    )
    parser.add_argument("--output", help="Write to this folder instead of changing the adapter in place")
    parser.add_argument("--base", help="The base model, where the adapter's config does not name a folder that is here")
    parser.add_argument(
        "--new-embeddings",
        action="store_true",
        help="Put the rows of added tokens into new_embeddings.safetensors, for vLLM before November 2025",
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns its exit code."""
    return run_command(_convert, argv)


def _convert(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    from finetuning.export.vllm.convert import ORIGINAL, make_vllm_compatible

    folder = Path(options.model_path)
    if options.training_config is not None:
        from finetuning.export.vllm.convert import extra_layers_reason

        reason = extra_layers_reason(options.training_config, folder)
        if reason is not None:
            print(f"unchanged: {folder}: {reason}")
            return 0
    result = make_vllm_compatible(
        folder,
        base_name=options.base,
        output=Path(options.output) if options.output else None,
        new_embeddings=options.new_embeddings,
    )
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if result.changed:
        print(f"vLLM-compatible adapter: {result.folder}")
        if result.dropped:
            print(f"removed, equal to the base's or moved: {', '.join(result.dropped)}")
        if options.output is None:
            print(f"the original is kept as {ORIGINAL}")
    else:
        print(f"already compatible with vLLM: {result.folder}")
    print(f"serve it: {result.command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
