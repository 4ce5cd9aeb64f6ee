"""What a run prints to the terminal: the start summary, progress while training, and the closing summary.

A terminal gets a progress bar and tables; a log file gets plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetuning.report.console import UNKNOWN, duration, is_live, loss, rate, shortened, small, wrap_words
from finetuning.report.run_folder import FinalLosses
from finetuning.tracking.tracker import LogEvent, StepMetrics, Tracker

_INDENT = "  "
_REDRAW_S = 0.2


@dataclass(frozen=True)
class SummaryLine:
    """One line of the start summary. `reason` is empty for a value that the user chose."""

    label: str
    value: str
    reason: str = ""


@dataclass(frozen=True)
class OutputFile:
    """A file or folder that the run has written."""

    label: str
    path: Path


@dataclass(frozen=True)
class NextCommand:
    """A command that the user may run next, and its purpose."""

    command: str
    purpose: str


@dataclass(frozen=True)
class RunSummary:
    """The content of the closing summary. `headline` says how the run ended; None marks unknown values."""

    headline: str
    good: bool
    outputs: Sequence[OutputFile] = ()
    losses: FinalLosses | None = None
    training_s: float | None = None
    first_step_s: float | None = None
    total_s: float | None = None
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    commands: Sequence[NextCommand] = ()


def print_start(console: Console, title: str, lines: Sequence[SummaryLine]) -> None:
    """Print the start summary: a table in a terminal, plain lines in a log file.

    Long values are shortened; the run record has them in full.
    """
    _heading(console, title)
    width = max((len(line.label) for line in lines), default=0)
    if not is_live(console):
        for line in lines:
            reason = f"  ({line.reason})" if line.reason else ""
            _plain(console, f"{_INDENT}{line.label:<{width}}  {shortened(line.value)}{reason}")
        _plain(console, "")
        return
    for line in lines:
        reason = f"  ({line.reason})" if line.reason else ""
        _labeled(console, f"{line.label:<{width}}", shortened(line.value), reason, label_style="bold")
    _plain(console, "")


def print_warning(console: Console, text: str) -> None:
    """Print a warning: wrapped in a terminal, on one line in a log file."""
    text = f"warning: {text}"
    _plain(console, wrap_words(text, console.width) if is_live(console) else text, "yellow")


def print_end(console: Console, summary: RunSummary) -> None:
    """Print the closing summary. Paths and commands are never wrapped, so that they can be copied."""
    _plain(console, "")
    _heading(console, summary.headline, "green" if summary.good else "red")
    facts = [*_result_facts(summary), *((output.label, str(output.path)) for output in summary.outputs), *summary.facts]
    width = max((len(label) for label, _ in facts), default=0)
    for label, value in facts:
        _fact(console, f"{label:<{width}}", value)
    for warning in summary.warnings:
        _fact(console, "warning:", warning, "yellow", gap=1)
    if summary.commands:
        _plain(console, "")
        _heading(console, "Next")
    for command in summary.commands:
        _plain(console, f"{_INDENT}# {command.purpose}", "dim")
        _plain(console, f"{_INDENT}{command.command}", "cyan")


def _fact(console: Console, label: str, value: str, style: str = "", gap: int = 2) -> None:
    """Print one labeled value. In a terminal a value of several words is wrapped below its first word."""
    if not is_live(console) or " " not in value:
        _plain(console, f"{_INDENT}{label}{' ' * gap}{value}", style)
        return
    _labeled(console, label, value, label_style=style, style=style, gap=gap)


def _labeled(
    console: Console, label: str, value: str, reason: str = "", *, label_style: str = "", style: str = "", gap: int = 2
) -> None:
    """Print a label and its value, wrapped below its first word; words, such as paths, are not broken."""
    start = f"{_INDENT}{label}{' ' * gap}"
    text = Text(wrap_words(f"{start}{value}{reason}", console.width, len(start)), style=style)
    text.stylize(label_style, 0, len(start))
    if reason:
        # Wrapping changes white space only.
        letters = [index for index, letter in enumerate(text.plain) if not letter.isspace()]
        text.stylize("dim", letters[len("".join((start + value).split()))])
    console.print(text, soft_wrap=True)


def _result_facts(summary: RunSummary) -> list[tuple[str, str]]:
    facts = summary.losses.lines() if summary.losses else []
    if summary.total_s is not None:
        parts = [("training", summary.training_s), ("first step", summary.first_step_s)]
        inside = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts if seconds is not None)
        facts.append(("time", duration(summary.total_s) + (f" ({inside})" if inside else "")))
    return facts


def _heading(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=f"bold {style}".strip()), soft_wrap=True)


def _plain(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def progress_tracker(console: Console) -> Tracker:
    """Return the progress display for this console."""
    return LiveProgress(console) if is_live(console) else LineProgress(console)


class LineProgress(Tracker):
    """Progress for log files and containers: one line per log."""

    name = "progress"

    def __init__(self, console: Console):
        self._console = console

    def on_train_begin(self, metrics: StepMetrics) -> None:
        self._print(f"training starts: {_start(metrics)}")

    def log(self, event: LogEvent) -> None:
        if event.kind == "training":
            self._print("  ".join(columns(event.metrics)))
        elif event.kind == "validation" and (text := validation_text(event)):
            self._print(text)

    def on_save(self, step: int, folder: Path) -> None:
        self._print(f"checkpoint saved: {folder}")

    def on_train_end(self, metrics: StepMetrics) -> None:
        self._print(_end(metrics))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


class LiveProgress(LineProgress):
    """Progress for terminals: two lines that are redrawn, below the lines for validation losses and checkpoints.

    It is redrawn at steps, at most five times per second, and not by a thread that would compete with training.
    """

    def __init__(self, console: Console):
        super().__init__(console)
        self._live: Live | None = None
        self._drawn_at = 0.0

    def on_train_begin(self, metrics: StepMetrics) -> None:
        super().on_train_begin(metrics)
        self.close()
        self._live = Live(self._table(metrics), console=self._console, auto_refresh=False, transient=True)
        self._live.start(refresh=True)

    def on_step_end(self, metrics: StepMetrics) -> None:
        if time.monotonic() - self._drawn_at >= _REDRAW_S:
            self._draw(metrics)

    def log(self, event: LogEvent) -> None:
        if event.kind == "training":
            self._draw(event.metrics)
        else:
            super().log(event)

    def on_train_end(self, metrics: StepMetrics) -> None:
        self.close()
        super().on_train_end(metrics)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, metrics: StepMetrics) -> None:
        if self._live is not None:
            self._drawn_at = time.monotonic()
            self._live.update(self._table(metrics), refresh=True)

    def _table(self, metrics: StepMetrics) -> Table:
        steps, epoch, *values, pace, left = columns(metrics)
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True, justify="right")
        total = max(metrics.max_steps, 1)
        first.add_row(steps, ProgressBar(total=total, completed=metrics.step), Text(left, style="cyan"))
        table = Table.grid(expand=True)
        table.add_row(first)
        table.add_row(Text("  ".join([epoch, *values, pace]), no_wrap=True, overflow="ellipsis"))
        return table


def _start(metrics: StepMetrics) -> str:
    if metrics.step:
        return f"step {metrics.step + 1} of {metrics.max_steps}, resumed after step {metrics.step}"
    return f"{metrics.max_steps} steps"


def columns(metrics: StepMetrics) -> list[str]:
    """Return step, epoch, loss, learning rate, gradient norm, tokens per second and time left, with their names."""
    width = len(str(metrics.max_steps))
    epoch = UNKNOWN if metrics.epoch is None else f"{metrics.epoch:.2f}"
    columns = [f"step {metrics.step:>{width}}/{metrics.max_steps}", f"epoch {epoch}", f"loss {loss(metrics.loss)}"]
    columns.append(f"lr {small(metrics.learning_rate)}")
    if metrics.grad_norm is not None:
        columns.append(f"grad {small(metrics.grad_norm)}")
    columns.append(f"{rate(metrics.tokens_per_s)} tokens/s")
    return [*columns, f"{duration(metrics.seconds_left)} left"]


def validation_text(event: LogEvent) -> str:
    losses = [
        f"{key.removeprefix('eval_').replace('_', ' ')} {loss(value)}"
        for key, value in event.values.items()
        if key.endswith("loss")
    ]
    return f"step {event.metrics.step}: validation {', '.join(losses)}" if losses else ""


def _end(metrics: StepMetrics) -> str:
    text = f"training ended at step {metrics.step} of {metrics.max_steps} after {duration(metrics.elapsed_s)}"
    if metrics.first_step_s is not None:
        text += f" (first step {duration(metrics.first_step_s)})"
    return text
