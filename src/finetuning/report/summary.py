"""The two blocks around a run: what will happen and why, and what was made and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetuning.report.console import duration, is_live, loss, shortened

_INDENT = "  "


@dataclass(frozen=True)
class SummaryLine:
    """One line of the start summary: what, how much or which, and why. No reason: the user chose it."""

    label: str
    value: str
    reason: str = ""


@dataclass(frozen=True)
class OutputFile:
    """Something that the run has made, and where it is."""

    what: str
    path: Path


@dataclass(frozen=True)
class NextCommand:
    """A command to type next, and what it is for."""

    command: str
    purpose: str


@dataclass(frozen=True)
class RunSummary:
    """What the closing block tells. `headline` says how the run ended; losses and times may be unknown."""

    headline: str
    good: bool
    made: Sequence[OutputFile] = ()
    final_loss: float | None = None
    validation_loss: float | None = None
    training_s: float | None = None
    first_step_s: float | None = None
    total_s: float | None = None
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    commands: Sequence[NextCommand] = ()


def print_start(console: Console, title: str, lines: Sequence[SummaryLine]) -> None:
    """Writes what will happen: in a terminal as a table as wide as it, in a log file one line each.

    Of a very long value the beginning is shown; the run's record holds all of it.
    """
    _heading(console, title)
    width = max((len(line.label) for line in lines), default=0)
    if not is_live(console):
        for line in lines:
            reason = f"  ({line.reason})" if line.reason else ""
            _plain(console, f"{_INDENT}{line.label:<{width}}  {shortened(line.value)}{reason}")
        _plain(console, "")
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(
            f"{_INDENT}{line.label}",
            Text.assemble(shortened(line.value), (f"  ({line.reason})" if line.reason else "", "dim")),
        )
    console.print(table, soft_wrap=False)
    _plain(console, "")


def print_warning(console: Console, text: str) -> None:
    """Writes one warning: in a terminal broken between words, in a log file on one line."""
    console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=not is_live(console))


def print_end(console: Console, closing: RunSummary) -> None:
    """Writes the closing block. Paths and commands stand whole on lines of their own, so that they can be copied."""
    _plain(console, "")
    _heading(console, closing.headline, "green" if closing.good else "red")
    facts = [*_figures(closing), *((made.what, str(made.path)) for made in closing.made), *closing.facts]
    width = max((len(label) for label, _ in facts), default=0)
    for label, value in facts:
        _fact(console, f"{label:<{width}}", value)
    for warning in closing.warnings:
        _fact(console, "warning:", warning, "yellow", gap=1)
    if closing.commands:
        _plain(console, "")
        _heading(console, "Next")
    for command in closing.commands:
        _plain(console, f"{_INDENT}# {command.purpose}", "dim")
        _plain(console, f"{_INDENT}{command.command}", "cyan")


def _fact(console: Console, label: str, value: str, style: str = "", gap: int = 2) -> None:
    """One line; in a terminal a longer one goes on below its beginning, broken between words, or one word whole."""
    if not is_live(console) or " " not in value:
        _plain(console, f"{_INDENT}{label}{' ' * gap}{value}", style)
        return
    table = Table.grid(padding=(0, gap, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(f"{_INDENT}{label}", style=style), Text(value, style=style))
    console.print(table, soft_wrap=False)


def _figures(closing: RunSummary) -> list[tuple[str, str]]:
    figures = [
        (label, loss(value))
        for label, value in (("final loss", closing.final_loss), ("validation loss", closing.validation_loss))
        if value is not None
    ]
    if closing.total_s is not None:
        parts = [("training", closing.training_s), ("first step", closing.first_step_s)]
        inside = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts if seconds is not None)
        figures.append(("time", duration(closing.total_s) + (f" ({inside})" if inside else "")))
    return figures


def _heading(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=f"bold {style}".strip()), soft_wrap=True)


def _plain(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
