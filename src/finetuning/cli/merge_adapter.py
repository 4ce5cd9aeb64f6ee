"""`merge_adapter`: a base model and its adapter become one model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuning.cli.errors import run_command
from finetuning.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    """The parser of `merge_adapter`."""
    parser = argparse.ArgumentParser(
        prog="merge_adapter",
        description="Merges adapters into a base model and saves the output as a single model",
    )
    parser.add_argument("basemodel", help="Name (e.g. HuggingFace Hub id) or path of the base model")
    parser.add_argument("peftmodel", help="Name or path of the PEFT adapter")
    parser.add_argument("outpath", help="Where to save the merged model: a folder that is empty or does not exist")
    parser.add_argument(
        "--tokenizer",
        help="Name or path of the tokenizer to save with the model. If not specified, the adapter's is used,"
        " or the base model's where the adapter has none.",
    )
    parser.add_argument(
        "--device_map",
        "--device-map",
        help="Where a model that must be loaded is put: 'auto', 'cpu', 'cuda' or a JSON string. The streaming merge"
        " itself runs on the CPU.",
    )
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="PEFTMODEL",
        help="Another adapter, merged into the result of the one before; may be given several times",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="Skip the comparison of the merged model with base and adapter"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Merge although the base is not the one recorded at training, or has layers that the adapter leaves out",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="Read pickled (.bin) weights, which can run code of their maker's"
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns its exit code."""
    return run_command(_merge, argv)


def _merge(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    device_map = _read_device_map(options.device_map)
    from finetuning.cli.status import quiet_libraries, transfer_bar
    from finetuning.export.merge.merge import merge_adapters

    quiet_libraries()
    with transfer_bar("merging") as progress:
        result = merge_adapters(
            options.basemodel,
            [options.peftmodel, *options.then],
            Path(options.outpath),
            tokenizer=options.tokenizer,
            device_map=device_map,
            verify=not options.no_verify,
            force=options.force,
            allow_pickle=options.allow_pickle,
            log=lambda line: print(line, file=sys.stderr),
            progress=progress,
        )
    print(f"merged model: {result.out} ({result.num_bytes / 1e9:.2f} GB)")
    print(f"verified: {result.verification}" if result.verification else "not verified (--no-verify)")
    return 0


def _read_device_map(text: str | None) -> str | dict[str, Any] | None:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--device_map is neither a name nor JSON: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
