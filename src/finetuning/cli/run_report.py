"""`finetuning report`: what a run did, on one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli.errors import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run(_report, argv)


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
