"""The report of a run as a self-contained HTML page, its charts as SVG files, and the model card."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from finetuning.config.redaction import redact_text
from finetuning.data.preview import head_of
from finetuning.errors import ConfigError, reading
from finetuning.report.charts import HEIGHT, WIDTH, Chart, Series, line_chart, timeline
from finetuning.report.console import UNKNOWN, duration, rate, shortened
from finetuning.report.run_folder import JsonRecord, RunData, final_losses, parse_time, read_run

FILE_NAME = "report.html"
logger = logging.getLogger(__name__)

_STATUS_KINDS = {"completed": "good", "running": "busy", "interrupted": "warn"}
_MAX_JOBS = 5
_GIB = 2.0**30
_SKIPPED = ("total_flos", "train_loss", "tokens_seen", "num_tokens", "first_step_s", "goodput", "step")
_SKIPPED_ENDS = ("_runtime", "_per_second", "_num_tokens")


def write_report(folder: Path, compared: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the report of a run to `output`, by default into its output directory. Return the path.

    Args:
        compared: output directories of other runs, to compare with this one.

    Raises:
        ConfigError: a directory holds no run.
        OSError: the page cannot be written.
    """
    path = output or folder / FILE_NAME
    text = render([read_run(item) for item in (folder, *compared)])
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, text)
    return path


def write_report_or_warn(folder: Path) -> Path | None:
    """Write the report at the end of a run. An error is logged as a warning."""
    try:
        return write_report(folder)
    except Exception as error:  # noqa: BLE001  a completed run must not fail because of its report
        logger.warning("the report could not be written: %s: %s", type(error).__name__, error)
        return None


def render(runs: Sequence[RunData]) -> str:
    """Return the page of the first run, compared with the others."""
    # Records are files that anybody may have changed.
    with reading(f"the records of {', '.join(str(run.folder) for run in runs)} cannot be shown", ConfigError):
        return page_templates().get_template("page.jinja").render(_page_values(runs))


SECTIONS = (
    "top", "runs", "metrics", "evaluation", "time", "data", "rows", "plan", "checks", "versions", "command", "config",
)  # fmt: skip
"""The parts of a page, in its order."""


def render_sections(runs: Sequence[RunData], **replaced: object) -> dict[str, Markup]:
    """Return the parts of the page by name, for a page of another layout; empty for what a run does not have.

    A part that cannot be rendered, because the record of a run is damaged or of another version, says so.

    Args:
        replaced: values of the page in place of those in the record, such as `status`.
    """
    template = page_templates().get_template("page.jinja")
    context = template.new_context({**_page_values(runs), **replaced})
    sections: dict[str, Markup] = {}
    for name in SECTIONS:
        try:
            sections[name] = Markup("".join(template.blocks[name](context)).strip())
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"{name} cannot be shown: {type(error).__name__}: {error}"
            sections[name] = Markup('<div class="notice bad">{}</div>').format(text)
    return sections


@cache
def page_templates(*packages: str) -> jinja2.Environment:
    """Return the environment of the report's templates, and of those in other packages. All values are escaped.

    Kept from call to call: compiling the page takes longer than filling it in.
    """
    return jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: _read_template(name, (*packages, "finetuning.report"))),
    )


def _read_template(name: str, packages: Sequence[str]) -> str | None:
    paths = (resources.files(package).joinpath(name) for package in packages)
    return next((path.read_text(encoding="utf-8") for path in paths if path.is_file()), None)


def status_kind(status: str) -> str:
    """Return the kind of a status, which has a color: good, busy, warn or bad."""
    return _STATUS_KINDS.get(status, "bad")


def _picture_of(label: str) -> str:
    from finetuning.data.images.thumbnails import thumbnail_of_label

    return thumbnail_of_label(label)


def _page_values(runs: Sequence[RunData]) -> dict[str, object]:
    run = runs[0]
    record = run.record
    jobs = record.get("jobs") or []
    started = parse_time(jobs[-1].get("started")) if jobs else None
    return {
        "run": run,
        "folder": run.folder,
        "head_of": head_of,
        "picture_of": _picture_of,
        "runs": runs,
        "title": title_of(run),
        "status": record.get("status", "unknown"),
        "status_kind": status_kind(str(record.get("status"))),
        "error": record.get("error"),
        "jobs": len(jobs),
        "started": f"{started:%Y-%m-%d %H:%M:%S} UTC" if started else None,
        "key_results": [key_results(item) for item in runs],
        "charts": main_charts(runs),
        "more_charts": other_charts(runs),
        "timelines": [drawn for job in run.jobs[-_MAX_JOBS:] if (drawn := timeline(job))],
        "shares": time_shares(run),
        "session": session_of(run),
        "statistics": (record.get("data") or {}).get("statistics") or [],
        "decisions": _decisions(record),
        "warnings": record.get("warnings") or [],
        "controller_actions": record.get("controller_actions") or [],
        "checks": _checks(run),
        "versions": _versions(record),
        "differences": _differences(runs) if len(runs) > 1 else [],
    }


def title_of(run: RunData) -> str:
    """Return the title of a run: its method and model."""
    model = Path(str((run.record.get("model") or {}).get("name") or "")).name
    return " · ".join(part for part in (str(run.record.get("method") or ""), model) if part) or run.name


def _decisions(record: JsonRecord) -> list[tuple[str, str, str]]:
    """Return the settings and their reasons: from the start summary, or else from the plan."""
    summary = record.get("summary")
    if summary:
        return [(str(label), shortened(str(value), 400), str(reason)) for label, value, reason in summary]
    plan = record.get("plan") or {}
    batch, steps = plan.get("batch") or {}, plan.get("steps") or {}
    rows = [
        ("total batch", batch.get("total"), "processes x per-device rows x accumulation"),
        ("per-device batch", batch.get("per_device"), batch.get("reason")),
        ("learning rate", plan.get("learning_rate"), plan.get("learning_rate_reason")),
        ("optimizer steps", steps.get("total"), steps.get("reason")),
    ]
    return [(label, str(value), str(reason or "")) for label, value, reason in rows if value is not None]


def _checks(run: RunData) -> list[tuple[str, str]]:
    """Return the final model, its checks, and the fingerprints of model and data."""
    artifact = run.record.get("artifact") or {}
    checks = [(str(artifact.get("kind")), str(artifact.get("folder")))] if artifact else []
    checks += [("checked", check) for check in artifact.get("checks") or []]
    if artifact.get("stop_tokens"):
        checks.append(("stops at", artifact["stop_tokens"]))
    for key in ("fingerprint", "layout"):
        if value := (run.record.get("model") or {}).get(key):
            checks.append(({"fingerprint": "base model", "layout": "batch layout"}[key], str(value)))
    if value := (run.record.get("data") or {}).get("fingerprint"):
        checks.append(("data fingerprint", str(value)))
    for path, merge_check in run.merge_checks.items():
        passed = "passed" if merge_check.get("passed") else "failed"
        numbers = ", ".join(f"{key} {value}" for key, value in flatten(merge_check).items() if isinstance(value, float))
        checks.append((path, f"{passed}: {numbers}"))
    return checks


def _versions(record: JsonRecord) -> list[tuple[str, str]]:
    job = (record.get("jobs") or [{}])[-1]
    versions = [("engine", str(record.get("engine", ""))), ("Python", str(job.get("python", "")))]
    versions += [(name, str(version)) for name, version in (job.get("packages") or {}).items()]
    return [(name, version) for name, version in versions if version]


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return the config keys that differ between runs, with the value of each run."""
    from finetuning.config.yaml.reader import parse_document

    configs = [flatten(parse_document(run.config).values) if run.config else {} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [_format_value(config.get(key)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _format_value(value: object) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flatten(values: object, prefix: str = "") -> dict[str, object]:
    """Return nested mappings and lists as one mapping with dotted keys.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c.0': 2}
    """
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {prefix: values}
    result: dict[str, object] = {}
    for key, item in items:
        result |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return result


CARD_NAME = "model_card.md"
PLOTS_NAME = "plots"
_TITLE_HEIGHT = 34
_COLORS = ("#1f5fbf", "#b8500a", "#14804a", "#8a3fa0", "#9c1c5a", "#5b6470")
_NOT_IN_FILE_NAMES = re.compile(r"[^a-z0-9]+")


def write_extracts_or_warn(folder: Path) -> list[Path]:
    """Write `model_card.md` and the charts in `plots`. Return what was written; an error is logged as a warning.

    The card is also the README of the final model.
    """
    written: list[Path] = []
    try:
        for path, text in _extracts(folder):
            _write(path, text)
            written.append(path)
    except Exception as error:  # noqa: BLE001  a completed run must not fail because of them
        logger.warning("the model card and the plots could not all be written: %s: %s", type(error).__name__, error)
    return written


def _extracts(folder: Path) -> Iterator[tuple[Path, str]]:
    run = read_run(folder)
    for chart in main_charts([run]):
        yield folder / PLOTS_NAME / f"{_NOT_IN_FILE_NAMES.sub('-', chart.title.lower()).strip('-')}.svg", picture(chart)
    artifact = run.record.get("artifact") or {}
    if artifact:
        text = model_card(run)
        yield folder / CARD_NAME, text
        yield Path(str(artifact["folder"])) / "README.md", text


def picture(chart: Chart) -> str:
    """Return a chart as a standalone SVG file with a white background, its title and a legend."""
    strokes = "".join(f".c{n}{{stroke:{color}}}circle.c{n}{{fill:{color}}}" for n, color in enumerate(_COLORS))
    style = (
        "text{font:11px sans-serif;fill:#5b6470;text-anchor:end}text.step{text-anchor:middle}"
        "text.title{font-weight:bold;font-size:13px;fill:#1c2126;text-anchor:start}"
        ".grid{stroke:#dde1e6}.cursor{visibility:hidden}polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
        f".dashed{{stroke-dasharray:5 4}}{strokes}"
    )
    names = Markup("").join(
        Markup('<tspan dx="10" fill="{}">{}{}</tspan>').format(_COLORS[color], "- - " if dashed else "— ", name)
        for name, color, dashed in chart.legend
    )
    _, _, inside = chart.svg.partition(">")
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {} {} {}" width="{}"><style>{}</style>'
        '<rect y="{}" width="100%" height="100%" fill="#fff"/><text class="title" x="8" y="-14">{}</text>'
        '<text x="{}" y="-14">{}</text>{}\n'
    ).format(
        -_TITLE_HEIGHT,
        WIDTH,
        HEIGHT + _TITLE_HEIGHT,
        2 * WIDTH,
        style,
        -_TITLE_HEIGHT,
        chart.title,
        WIDTH - 12,
        names,
        Markup(inside),
    )


def model_card(run: RunData) -> str:
    """Return the model card in Markdown, with the front matter for the model hub."""
    record = run.record
    artifact = record.get("artifact") or {}
    is_adapter = artifact.get("kind") == "adapter"
    base = str(artifact.get("base") or (record.get("model") or {}).get("name") or "")
    method = str(record.get("method") or "")
    front = {
        "base_model": base,
        "library_name": "peft" if is_adapter else "transformers",
        "tags": [method, "finetuning", *(["lora"] if "LORA" in " ".join(_notes(record)) else [])],
    }
    if artifact.get("stop_tokens"):
        front["pipeline_tag"] = "text-generation"
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {title_of(run)}", ""]
    what = f"An adapter for `{base}`" if is_adapter else f"`{base}`"
    lines += [f"{what}, trained by {record.get('engine', 'finetuning')} ({method}).", ""]
    lines += ["## Result", "", *_table(key_results(run)), ""]
    lines += ["## Data", "", *_table(_rows(record)), ""]
    lines += ["## Training", "", *_table(_settings(record)), ""]
    lines += ["## Checks before publication", ""]
    lines += [f"- {check}" for check in artifact.get("checks") or []]
    lines += [f"- {artifact['stop_tokens']}"] if artifact.get("stop_tokens") else []
    return "\n".join([*lines, ""])


def _table(rows: list[tuple[str, str]]) -> list[str]:
    body = [f"| {name} | {value} |" for name, value in rows if value]
    return ["| | |", "|---|---|", *body] if body else ["Not recorded."]


def _rows(record: JsonRecord) -> list[tuple[str, str]]:
    data = record.get("data") or {}
    table = [
        (f"{part['split']} rows", f"{part['kept']:,} of {part['rows']:,} kept, {part['tokens']:,} tokens")
        for part in data.get("statistics") or []
    ]
    return [*table, ("fingerprint", str(data.get("fingerprint") or ""))]


def _settings(record: JsonRecord) -> list[tuple[str, str]]:
    plan = record.get("plan") or {}
    batch, steps = plan.get("batch") or {}, plan.get("steps") or {}
    packages = ((record.get("jobs") or [{}])[-1].get("packages") or {}).items()
    settings = [("optimizer steps", steps.get("total")), ("rows per step", batch.get("total"))]
    settings += [
        ("learning rate", plan.get("learning_rate")),
        *((note.partition(": ")[::2]) for note in _notes(record)),
    ]
    settings.append(("versions", ", ".join(f"{name} {version}" for name, version in packages if version[0].isdigit())))
    return [(name, str(value)) for name, value in settings if value not in (None, "")]


def _notes(record: JsonRecord) -> list[str]:
    return [str(note) for note in (record.get("model") or {}).get("notes") or [] if ": " in str(note)]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(redact_text(text), encoding="utf-8")
    os.replace(staging, path)


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
        *final_losses(run.series, run.folder).lines(),
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
