"""`merge_adapter`: merge adapters into their base model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import ConfigError, Location, parse_json

if TYPE_CHECKING:
    from finetuning.export.merge.with_peft import DeviceMap


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `merge_adapter`."""
    parser = Parser(
        prog="merge_adapter",
        usage="%(prog)s BASEMODEL PEFTMODEL OUTPATH [options]\n       %(prog)s RUN OUTPATH [options]",
        description="Merge adapters into a base model, verify the result and save it as a single model. RUN is the"
        " output directory of a run, or an adapter whose base model is the one in its config.",
    )
    parser.add_argument("basemodel", metavar="BASEMODEL", help="hub id or path of the base model; or RUN")
    parser.add_argument("peftmodel", metavar="PEFTMODEL", help="hub id or path of the PEFT adapter; with RUN, OUTPATH")
    parser.add_argument(
        "outpath",
        metavar="OUTPATH",
        nargs="?",
        help="folder for the merged model: new, empty, or holding the same merge",
    )
    parser.add_argument(
        "--tokenizer",
        help="hub id or path of the tokenizer to save with the model (default: the adapter's, else the base model's)",
    )
    parser.add_argument(
        "--device_map",
        "--device-map",
        help="device map for merges that load the model: auto, cpu, cuda or JSON; the streaming merge runs on the CPU",
    )
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="PEFTMODEL",
        help="another adapter to merge into the result; may be repeated",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the comparison of the merged model with base model plus adapter"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="merge even if the base model differs from that of training, has layers without adapter weights, or rounds"
        " off most of what the adapter changes",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="merge into the weights of training: quantize the base model as the run did, and dequantize it again",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickled (.bin) weights, which can execute arbitrary code"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    return run_command(_merge, argv)


def _merge(argv: list[str]) -> int:
    options = build_parser().parse_intermixed_args(argv)
    device_map = _read_device_map(options.device_map)
    base, adapter, out = options.basemodel, options.peftmodel, options.outpath
    if out is None:
        out = adapter
        base, adapter = _base_and_adapter(base)
    from finetuning.export.merge.merge import merge_adapters
    from finetuning.report.console import quiet_libraries

    quiet_libraries()
    with _progress_bar() as progress:
        result = merge_adapters(
            base,
            [adapter, *options.then],
            Path(out),
            tokenizer=options.tokenizer,
            device_map=device_map,
            verify=not options.no_verify,
            force=options.force,
            allow_pickle=options.allow_pickle,
            dequantize=options.dequantize,
            log=lambda line: print(line, file=sys.stderr),
            progress=progress,
        )
    if result.existed:
        print(f"{result.out} holds this merge already, complete and unchanged; nothing to do")
        return 0
    print(f"merged model: {result.out} ({result.num_bytes / 1e9:.2f} GB)")
    print(f"verified: {result.verification}" if result.verification else "not verified (--no-verify)")
    return 0


def _base_and_adapter(name: str) -> tuple[str, str]:
    """Return the base model and the adapter of a run, or of an adapter's folder.

    Raises:
        ConfigError: there is no adapter.
    """
    from finetuning.cli.named_model import find_model

    model = find_model(name)
    if model.conf.adapter is None:
        what = "is neither an adapter nor a run that trained one" if model.run is None else "trained a whole model"
        raise ConfigError(
            f"{what}: there is nothing to merge",
            location=Location(file=name),
            hint="Name the base model, the adapter and the folder for the merged model.",
        )
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    return model.conf.model, model.conf.adapter


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Display a progress bar while the block runs.

    Yields a function to call with the bytes done and the total; None if stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _read_device_map(text: str | None) -> DeviceMap:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(f"--device_map: not valid JSON: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
