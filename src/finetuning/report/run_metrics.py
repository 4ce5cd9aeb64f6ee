"""What a report shows of a run's numbers: its charts, its key figures, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetuning.report.charts import Chart, Series, line_chart
from finetuning.report.console import UNKNOWN, duration, loss, rate
from finetuning.report.run_folder import RunData

_GIB = 2.0**30
_SKIPPED = ("total_flos", "train_loss", "tokens_seen", "num_tokens", "first_step_s", "goodput", "step")
_SKIPPED_ENDS = ("_runtime", "_per_second", "_num_tokens")


@dataclass(frozen=True)
class ChartSpec:
    """A chart that every report shows where its numbers are there: series by name, each with what to call it."""

    title: str
    series: tuple[tuple[str, str], ...]
    divisor: float = 1.0
    from_zero: bool = True


MAIN = (
    ChartSpec("Loss", (("loss", "training"), ("eval_loss", "validation")), from_zero=False),
    ChartSpec("Learning rate", (("learning_rate", "learning rate"),)),
    ChartSpec("Gradient norm", (("grad_norm", "gradient norm"),)),
    ChartSpec("Tokens per second", (("tokens_per_s", "tokens per second"),)),
    ChartSpec(
        "Peak memory, GiB",
        (
            ("peak_memory_allocated_bytes", "device"),
            ("peak_memory_reserved_bytes", "device, reserved"),
            ("peak_host_memory_bytes", "host"),
        ),
        _GIB,
    ),
    ChartSpec("Seconds per step", (("step_time_s", "seconds per step"),)),
    ChartSpec("Share of time waiting for data", (("data_wait_share", "waiting for data"),)),
    ChartSpec("Model FLOPs utilisation", (("mfu", "MFU"),)),
)


def main_charts(runs: Sequence[RunData]) -> list[Chart]:
    """The charts of all runs together: one colour a run, or, for one run alone, a series."""
    return [chart for wanted in MAIN if (chart := _chart(wanted, runs))]


def other_charts(runs: Sequence[RunData]) -> list[Chart]:
    """A chart for every other number that was logged, training and validation in one."""
    shown = {name for wanted in MAIN for name, _ in wanted.series}
    names = dict.fromkeys(
        name.removeprefix("eval_")
        for run in runs
        for name in sorted(run.series)
        if name not in shown and not _is_skipped(name)
    )
    wanted = [
        ChartSpec(_title(name), ((name, "training"), (f"eval_{name}", "validation")), from_zero=False) for name in names
    ]
    return [chart for one in wanted if (chart := _chart(one, runs))]


def key_figures(run: RunData) -> list[tuple[str, str]]:
    """The few numbers that come first: each with its name."""
    record = run.record
    steps = max((points[-1][0] for points in run.series.values() if points), default=0)
    total = ((record.get("plan") or {}).get("steps") or {}).get("total")
    figures = [
        ("final loss", loss(run.last("loss"))),
        ("validation loss", loss(run.last("eval_loss"))),
        ("steps", f"{steps:,} of {total:,}" if total and total != steps else f"{steps:,}"),
        ("tokens per second", rate(_typical(run, "tokens_per_s"))),
        ("time", duration(run.seconds)),
    ]
    goodput = (session_of(run) or {}).get("goodput")
    if goodput is not None:
        figures.append(("goodput", f"{goodput:.0%}"))
    return [(name, value) for name, value in figures if value != UNKNOWN]


def session_of(run: RunData) -> dict | None:
    """Telemetry's account of all jobs of the session; None where it is not recorded."""
    session = (run.record.get("telemetry") or {}).get("session")
    return session if isinstance(session, dict) else None


def time_shares(run: RunData) -> list[tuple[str, float, str]]:
    """Where the time of the session went: name, share of it, and how long; the largest first."""
    session = session_of(run) or {}
    total = session.get("total_sec") or 0.0
    if total <= 0:
        return []
    parts = {"kept steps": session.get("productive_sec") or 0.0, **(session.get("badput_sec") or {})}
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [(name.replace("_", " "), value / total, duration(value)) for name, value in ordered if value / total > 1e-3]


def _chart(wanted: ChartSpec, runs: Sequence[RunData]) -> Chart | None:
    several = len(runs) > 1
    curves = []
    for index, run in enumerate(runs):
        there = [(name, label) for name, label in wanted.series if run.series.get(name)]
        for kind, (name, label) in enumerate(there):
            points = [(step, value / wanted.divisor) for step, value in run.series[name]]
            text = label if not several else run.name if len(there) == 1 else f"{run.name}, {label}"
            curves.append(Series(text, points, index if several else kind, kind > 0))
    if all(len(curve.points) < 2 for curve in curves) and wanted.title != "Loss":
        return None
    return line_chart(wanted.title, curves, from_zero=wanted.from_zero)


def _title(name: str) -> str:
    text = name.replace("_", " ").replace("/", " / ")
    return text[:1].upper() + text[1:]


def _is_skipped(name: str) -> bool:
    plain = name.removeprefix("eval_").removeprefix("train_")
    telemetry = ("badput_", "peak_", "tokens_per_second", "tflops_per_device", "straggler")
    return name in _SKIPPED or plain in _SKIPPED or name.endswith(_SKIPPED_ENDS) or name.startswith(telemetry)


def _typical(run: RunData, name: str) -> float | None:
    """The middle value, which the slow beginning does not pull down."""
    values = sorted(value for _, value in run.series.get(name, ()))
    return values[len(values) // 2] if values else None
