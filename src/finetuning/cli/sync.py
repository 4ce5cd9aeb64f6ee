"""`finetuning sync`: what a run could not send to MLflow, sent now."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli.errors import run
from finetuning.errors import EXIT_OK, EXIT_USER


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run(_sync, argv)


def _sync(argv: Sequence[str]) -> int:
    from finetuning.tracking.mlflow.sync import sync_run

    parser = argparse.ArgumentParser(
        prog="finetuning sync",
        description="Send what a run kept beside itself while MLflow was away. What was sent is not sent again.",
    )
    parser.add_argument("run", type=Path, help="the run's output directory")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds to go on without an answer (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    results = sync_run(options.run, patience_s=options.patience)
    for result in results:
        sent = result.waiting_before - result.waiting
        state = "all is delivered" if result.delivered else f"{result.waiting} still wait: {result.error}"
        print(f"{result.spool}: {sent} sent to {result.uri}; {state}")
        if result.url:
            print(f"  {result.url}")
        for problem in result.problems:
            print(f"  refused for good: {problem}")
    return EXIT_OK if all(result.delivered for result in results) else EXIT_USER
