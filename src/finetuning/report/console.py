"""The one console that a command writes to."""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console


def open_console(*, is_main: bool = True, file: IO[str] | None = None) -> Console:
    """A console on stdout, or on `file`; one that writes nothing on processes other than the main one.

    In a log file it writes plain lines of any length. Colours follow NO_COLOR and FORCE_COLOR.
    """
    return Console(file=file or sys.stdout, highlight=False, quiet=not is_main, soft_wrap=True, emoji=False)


def is_live(console: Console) -> bool:
    """Whether lines can be rewritten: a terminal, and not a dumb one."""
    return console.is_terminal and not console.is_dumb_terminal
