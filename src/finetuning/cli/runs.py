"""`finetuning runs`: the runs below a directory, and how each of them does.

`finetuning report`: what a run did, on one page.

`finetuning sync`: what a run could not send to MLflow, sent now."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import run_command
from finetuning.errors import EXIT_OK, EXIT_USER

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from finetuning.report.run_list import RunState

_STYLES = {"running": "cyan", "completed": "green", "interrupted": "yellow", "dead": "red", "failed": "red"}
_WIDE = 100


def runs_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_runs, argv)


def _runs(argv: Sequence[str]) -> int:
    from rich.console import Console

    from finetuning.report.run_list import list_runs

    parser = argparse.ArgumentParser(
        prog="finetuning runs", description="List the runs in and below a directory, the newest first."
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path(), help="where to look (default: here)")
    parser.add_argument("--json", action="store_true", help="write a list of objects instead of a table")
    options = parser.parse_args(argv)
    found = list_runs(options.directory)
    if options.json:
        print(json.dumps([asdict(state) for state in found], indent=2))
        return 0
    if not found:
        print(f"no run in {options.directory}")
        return 0
    console = Console(highlight=False, emoji=False)
    (_table if console.width >= _WIDE else _cards)(console, found, options.directory)
    return 0


def _table(console: Console, found: Sequence[RunState], root: Path) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run", "state", "method", "model"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "loss", "tokens/s", "goodput"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("started", no_wrap=True)
    for state in found:
        table.add_row(_name(state, root), _state(state), state.method, _model(state), *_numbers(state), _started(state))
    console.print(table)


def _cards(console: Console, found: Sequence[RunState], root: Path) -> None:
    """Two lines a run, for terminals that are too narrow for a table."""
    from rich.text import Text

    for state in found:
        console.print(Text.assemble((_name(state, root), "bold"), "  ", _state(state)))
        steps, loss, tokens, goodput = _numbers(state)
        facts = [f"{state.method} {_model(state)}", f"step {steps}", f"loss {loss}", f"{tokens} tokens/s"]
        facts += [f"goodput {goodput}"] if state.goodput is not None else []
        console.print(Text("  " + ", ".join([*facts, _started(state)]), style="dim"))


def _name(state: RunState, root: Path) -> str:
    folder = Path(state.folder)
    return str(folder.relative_to(root)) if folder != root else folder.resolve().name


def _state(state: RunState) -> Text:
    from rich.text import Text

    return Text(state.state, style=_STYLES.get(state.state, "magenta"))


def _model(state: RunState) -> str:
    return Path(state.model).name if state.model else ""


def _numbers(state: RunState) -> tuple[str, str, str, str]:
    from finetuning.report.console import UNKNOWN, loss, rate

    step = UNKNOWN if state.step is None else f"{state.step:,}"
    steps = f"{step}/{state.steps:,}" if state.steps else step
    goodput = UNKNOWN if state.goodput is None else f"{state.goodput:.0%}"
    return steps, loss(state.loss), rate(state.tokens_per_s), goodput


def _started(state: RunState) -> str:
    return (state.started or "").replace("T", " ").removesuffix("Z")[:16]


def report_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_report, argv)


def _report(argv: Sequence[str]) -> int:
    from finetuning.report.html import FILE_NAME, write_report

    parser = argparse.ArgumentParser(
        prog="finetuning report",
        description="Write what a run did as one HTML page that needs nothing from anywhere.",
    )
    parser.add_argument("run", type=Path, help="the run's output directory")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN", help="other runs, shown beside this one"
    )
    parser.add_argument(
        "--output", type=Path, help=f"the file to write (default: {FILE_NAME} in the run's output directory)"
    )
    options = parser.parse_args(argv)
    print(write_report(options.run, options.compare, options.output))
    return 0


def sync_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_sync, argv)


def _sync(argv: Sequence[str]) -> int:
    from finetuning.tracking.mlflow.sync import sync_run

    parser = argparse.ArgumentParser(
        prog="finetuning sync",
        description="Upload what was queued while MLflow was unreachable. Nothing is uploaded twice.",
    )
    parser.add_argument("run", type=Path, help="the run's output directory")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds to go on without an answer (default: %(default)s)"
    )
    options = parser.parse_args(argv)
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
