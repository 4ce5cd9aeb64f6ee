"""The terminal while training runs: a bar where lines can be rewritten, a line at each log elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetuning.report.console import UNKNOWN, duration, is_live, loss, rate, small
from finetuning.tracking.tracker import LogEvent, StepMetrics, Tracker

_REDRAW_S = 0.2


def progress_tracker(console: Console) -> Tracker:
    """The progress that fits this console."""
    return LiveProgress(console) if is_live(console) else LineProgress(console)


class LineProgress(Tracker):
    """For log files and containers: one line at each log, each a whole statement."""

    name = "progress"

    def __init__(self, console: Console):
        self._console = console

    def on_train_begin(self, metrics: StepMetrics) -> None:
        self._tell(f"training starts: {_start(metrics)}")

    def log(self, event: LogEvent) -> None:
        if event.kind == "training":
            self._tell("  ".join(_columns(event.metrics)))
        elif event.kind == "validation" and (text := _validation(event)):
            self._tell(text)

    def on_save(self, step: int, folder: Path) -> None:
        self._tell(f"checkpoint saved: {folder}")

    def on_train_end(self, metrics: StepMetrics) -> None:
        self._tell(_end(metrics))

    def _tell(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


class LiveProgress(LineProgress):
    """For terminals: two lines at the bottom that change, and above them what stays: validation losses, checkpoints.

    It is redrawn at steps, five times a second at most; there is no thread that takes turns with training.
    """

    def __init__(self, console: Console):
        super().__init__(console)
        self._live: Live | None = None
        self._drawn_at = 0.0

    def on_train_begin(self, metrics: StepMetrics) -> None:
        super().on_train_begin(metrics)
        self.close()
        self._live = Live(self._picture(metrics), console=self._console, auto_refresh=False, transient=True)
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
            self._live.update(self._picture(metrics), refresh=True)

    def _picture(self, metrics: StepMetrics) -> Table:
        steps, epoch, *values, pace, left = _columns(metrics)
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True, justify="right")
        total = max(metrics.max_steps, 1)
        first.add_row(steps, ProgressBar(total=total, completed=metrics.step), Text(left, style="cyan"))
        picture = Table.grid(expand=True)
        picture.add_row(first)
        picture.add_row(Text("  ".join([epoch, *values, pace]), no_wrap=True, overflow="ellipsis"))
        return picture


def _start(metrics: StepMetrics) -> str:
    if metrics.step:
        return f"step {metrics.step + 1} of {metrics.max_steps}, resumed after step {metrics.step}"
    return f"{metrics.max_steps} steps"


def _columns(metrics: StepMetrics) -> list[str]:
    """Step, epoch, loss, learning rate, gradient norm, tokens per second and time left, each with its name."""
    width = len(str(metrics.max_steps))
    epoch = UNKNOWN if metrics.epoch is None else f"{metrics.epoch:.2f}"
    columns = [f"step {metrics.step:>{width}}/{metrics.max_steps}", f"epoch {epoch}", f"loss {loss(metrics.loss)}"]
    columns.append(f"lr {small(metrics.learning_rate)}")
    if metrics.grad_norm is not None:
        columns.append(f"grad {small(metrics.grad_norm)}")
    columns.append(f"{rate(metrics.tokens_per_s)} tokens/s")
    return [*columns, f"{duration(metrics.seconds_left)} left"]


def _validation(event: LogEvent) -> str:
    shown = [
        f"{key.removeprefix('eval_').replace('_', ' ')} {loss(value)}"
        for key, value in event.values.items()
        if key.endswith("loss")
    ]
    return f"step {event.metrics.step}: validation {', '.join(shown)}" if shown else ""


def _end(metrics: StepMetrics) -> str:
    text = f"training ended at step {metrics.step} of {metrics.max_steps} after {duration(metrics.elapsed_s)}"
    if metrics.first_step_s is not None:
        text += f" (first step {duration(metrics.first_step_s)})"
    return text
