"""The charts, key results and time breakdown of a run, for its report."""

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
    """A chart that each report has if the metrics were logged: the metrics, each with its label."""

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
    ChartSpec("Model FLOPs utilization", (("mfu", "MFU"),)),
)


def main_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return the main charts. Several runs have one color each; a single run has one color per series."""
    return [chart for spec in MAIN if (chart := _chart(spec, runs))]


def other_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return a chart for each remaining logged metric, with training and validation in one chart."""
    main = {name for spec in MAIN for name, _ in spec.series}
    names = dict.fromkeys(
        name.removeprefix("eval_")
        for run in runs
        for name in sorted(run.series)
        if name not in main and not _is_skipped(name)
    )
    specs = [
        ChartSpec(_title(name), ((name, "training"), (f"eval_{name}", "validation")), from_zero=False) for name in names
    ]
    return [chart for spec in specs if (chart := _chart(spec, runs))]


def key_results(run: RunData) -> list[tuple[str, str]]:
    """Return the most important results of a run, each with its name."""
    record = run.record
    steps = max((points[-1][0] for points in run.series.values() if points), default=0)
    total = ((record.get("plan") or {}).get("steps") or {}).get("total")
    results = [
        ("final loss", loss(run.last("loss"))),
        ("validation loss", loss(run.last("eval_loss"))),
        ("steps", f"{steps:,} of {total:,}" if total and total != steps else f"{steps:,}"),
        ("tokens per second", rate(_typical(run, "tokens_per_s"))),
        ("time", duration(run.seconds)),
    ]
    goodput = (session_of(run) or {}).get("goodput")
    if goodput is not None:
        results.append(("goodput", f"{goodput:.0%}"))
    return [(name, value) for name, value in results if value != UNKNOWN]


def session_of(run: RunData) -> dict | None:
    """Return telemetry's summary of the session's jobs; None if there is none."""
    session = (run.record.get("telemetry") or {}).get("session")
    return session if isinstance(session, dict) else None


def time_shares(run: RunData) -> list[tuple[str, float, str]]:
    """Return the time categories of the session: name, share and duration, largest first."""
    session = session_of(run) or {}
    total = session.get("total_sec") or 0.0
    if total <= 0:
        return []
    parts = {"productive steps": session.get("productive_sec") or 0.0, **(session.get("badput_sec") or {})}
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [(name.replace("_", " "), value / total, duration(value)) for name, value in ordered if value / total > 1e-3]


def _chart(spec: ChartSpec, runs: Sequence[RunData]) -> Chart | None:
    several = len(runs) > 1
    curves = []
    for index, run in enumerate(runs):
        logged = [(name, label) for name, label in spec.series if run.series.get(name)]
        for kind, (name, label) in enumerate(logged):
            points = [(step, value / spec.divisor) for step, value in run.series[name]]
            text = label if not several else run.name if len(logged) == 1 else f"{run.name}, {label}"
            curves.append(Series(text, points, index if several else kind, kind > 0))
    if all(len(curve.points) < 2 for curve in curves) and spec.title != "Loss":
        return None
    return line_chart(spec.title, curves, from_zero=spec.from_zero)


def _title(name: str) -> str:
    text = name.replace("_", " ").replace("/", " / ")
    return text[:1].upper() + text[1:]


def _is_skipped(name: str) -> bool:
    plain = name.removeprefix("eval_").removeprefix("train_")
    telemetry = ("badput_", "peak_", "tokens_per_second", "tflops_per_device", "straggler")
    return name in _SKIPPED or plain in _SKIPPED or name.endswith(_SKIPPED_ENDS) or name.startswith(telemetry)


def _typical(run: RunData, name: str) -> float | None:
    """Return the median, which the slow first steps do not affect."""
    values = sorted(value for _, value in run.series.get(name, ()))
    return values[len(values) // 2] if values else None
