"""`create_vllm_compatible_adapter`: convert an adapter for vLLM, or report why it cannot be served."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli.errors import Parser, run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `create_vllm_compatible_adapter`."""
    parser = Parser(
        prog="create_vllm_compatible_adapter",
        description="Check whether vLLM can serve an adapter, and remove tensors that vLLM does not accept where they"
        " equal the base model's. Writes serving.json with the command that serves the adapter.",
    )
    parser.add_argument(
        "model_path",
        help="path of the adapter folder",
    )
    parser.add_argument(
        "--training-config",
        help="path of the training config; nothing is removed if it shows that the extra layers are required",
    )
    parser.add_argument("--output", help="write to this folder instead of changing the adapter in place")
    parser.add_argument("--base", help="path of the base model, if it is not at the path in the adapter's config")
    parser.add_argument(
        "--initial-adapter",
        help="path of the adapter as it was saved before training, if its initialization changed the base model's"
        " weights (PiSSA, OLoRA, CorDA, LoRA-GA); PiSSA and OLoRA need it only if the base model is not there",
    )
    parser.add_argument(
        "--new-embeddings",
        action="store_true",
        help="write the embeddings of added tokens to new_embeddings.safetensors, for vLLM before November 2025",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    return run_command(_convert, argv)


def _convert(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    from finetuning.export.inputs import ADAPTER_CONFIG, read_json
    from finetuning.export.vllm.convert import ORIGINAL, make_vllm_compatible
    from finetuning.model.peft.lora_support import lora_init
    from finetuning.report.console import quiet_libraries

    folder = Path(options.model_path)
    if options.training_config is not None:
        from finetuning.export.vllm.convert import extra_layers_reason

        reason = extra_layers_reason(options.training_config, folder)
        if reason is not None:
            print(f"unchanged: {folder}: {reason}")
            return 0
    config = folder / ADAPTER_CONFIG
    if config.is_file() and lora_init(read_json(config)).changes_base:
        # Only a conversion loads a model.
        quiet_libraries()
    result = make_vllm_compatible(
        folder,
        base_name=options.base,
        output=Path(options.output) if options.output else None,
        new_embeddings=options.new_embeddings,
        initial_adapter=options.initial_adapter,
    )
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if result.changed:
        print(f"vLLM-compatible adapter: {result.folder}")
        if result.dropped:
            print(f"removed (equal to the base model's, or moved): {', '.join(result.dropped)}")
        if options.output is None:
            print(f"the original is kept as {ORIGINAL}")
    else:
        print(f"already compatible with vLLM: {result.folder}")
    print(f"serve it: {result.command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
