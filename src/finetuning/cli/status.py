"""Terminal output of commands that take long: a progress bar, and no chatter of the libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def transfer_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
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
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def quiet_libraries(bars: bool = False) -> None:
    """Silence the warnings that libraries address to programmers and, unless `bars`, their progress bars."""
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()
