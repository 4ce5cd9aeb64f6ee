"""`finetuning runs`, `finetuning report` and `finetuning sync`: commands on the output directories of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, check_output_file, run_command
from finetuning.errors import EXIT_OK, EXIT_USER

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from finetuning.report.run_list import RunState

_STYLES = {"running": "cyan", "completed": "green", "interrupted": "yellow", "dead": "red", "failed": "red"}
_TABLE_WIDTH = 100
"""Narrower terminals get two lines per run instead of a table."""


def runs_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning runs` and return its exit code."""
    return run_command(_list_runs, argv)


def _list_runs(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="finetuning runs", description="List the runs in a directory and its subdirectories, newest first."
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path(), help="where to look (default: here)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects instead of a table")
    options = parser.parse_args(argv)
    from rich.console import Console

    from finetuning.report.run_list import list_runs

    runs = list_runs(options.directory)
    if options.json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
        return 0
    if not runs:
        print(f"no runs in {options.directory}")
        return 0
    console = Console(highlight=False, emoji=False)
    (_print_table if console.width >= _TABLE_WIDTH else _print_cards)(console, runs, options.directory)
    return 0


def _print_table(console: Console, runs: Sequence[RunState], root: Path) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run", "state", "method", "model"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "loss", "tokens/s", "goodput"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("losses at the end", overflow="fold", style="dim")
    table.add_column("started", no_wrap=True)
    for run in runs:
        table.add_row(
            _name(run, root), _state(run), run.method, _model(run), *_numbers(run), _losses(run), _started(run)
        )
    console.print(table)


def _print_cards(console: Console, runs: Sequence[RunState], root: Path) -> None:
    from rich.text import Text

    for run in runs:
        console.print(Text.assemble((_name(run, root), "bold"), "  ", _state(run)))
        steps, loss, tokens, goodput = _numbers(run)
        loss = _losses(run) or f"loss {loss}"
        facts = [f"{run.method} {_model(run)}", f"step {steps}", loss, f"{tokens} tokens/s"]
        facts += [f"goodput {goodput}"] if run.goodput is not None else []
        console.print(Text("  " + ", ".join([*facts, _started(run)]), style="dim"))


def _name(run: RunState, root: Path) -> str:
    folder = Path(run.folder)
    return str(folder.relative_to(root)) if folder != root else folder.resolve().name


def _state(run: RunState) -> Text:
    from rich.text import Text

    return Text(run.state, style=_STYLES.get(run.state, "magenta"))


def _model(run: RunState) -> str:
    return Path(run.model).name if run.model else ""


def _losses(run: RunState) -> str:
    """Return what the losses of a run that has ended are: of the last step or a mean, and the best."""
    return ", ".join(f"{label} {value}" for label, value in run.losses.items())


def _numbers(run: RunState) -> tuple[str, str, str, str]:
    from finetuning.report.console import UNKNOWN, loss, rate

    step = UNKNOWN if run.step is None else f"{run.step:,}"
    steps = f"{step}/{run.steps:,}" if run.steps else step
    goodput = UNKNOWN if run.goodput is None else f"{run.goodput:.0%}"
    return steps, loss(run.loss), rate(run.tokens_per_s), goodput


def _started(run: RunState) -> str:
    return (run.started or "").replace("T", " ").removesuffix("Z")[:16]


def report_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning report` and return its exit code."""
    return run_command(_report, argv)


def _report(argv: Sequence[str]) -> int:
    from finetuning.report.html import FILE_NAME, write_report

    parser = Parser(prog="finetuning report", description="Write the report of a run as one self-contained HTML page.")
    parser.add_argument("run", type=Path, help="the run's output directory")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="other runs to plot in the same charts",
    )
    parser.add_argument(
        "--output", type=Path, help=f"the file to write (default: {FILE_NAME} in the run's output directory)"
    )
    options = parser.parse_args(argv)
    if options.output is not None:
        check_output_file(options.output, "--output")
    print(write_report(options.run, options.compare, options.output))
    return 0


def sync_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning sync` and return its exit code."""
    return run_command(_sync, argv)


def _sync(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="finetuning sync",
        description="Upload what was queued while MLflow was unreachable. Nothing is uploaded twice.",
    )
    parser.add_argument("run", type=Path, help="the run's output directory")
    parser.add_argument(
        "--patience",
        type=float,
        default=30.0,
        help="seconds to retry while MLflow does not respond (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    from finetuning.tracking.mlflow.sync import sync_run

    results = sync_run(options.run, patience_s=options.patience)
    for result in results:
        uploaded = result.waiting_before - result.waiting
        status = f"{result.waiting} not uploaded: {result.error}" if result.error else "nothing left"
        print(f"{result.queue}: {uploaded} uploaded, {status}")
        if result.state.url:
            print(f"  {result.state.url}")
        for message in result.state.rejected:
            print(f"  rejected: {message}")
    return EXIT_OK if all(result.error is None for result in results) else EXIT_USER
