"""The report: one HTML page that holds all that it shows.

What other places show of a report: its curves as pictures, and the tuned model's card."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from finetuning.report import run_metrics as figures
from finetuning.report.charts import HEIGHT, WIDTH, Chart, timeline
from finetuning.report.console import shortened
from finetuning.report.run_folder import RunData, parse_time, read_run
from finetuning.report.run_metrics import key_figures, main_charts

FILE_NAME = "report.html"
logger = logging.getLogger(__name__)

_STATUS_KINDS = {"completed": "good", "running": "busy", "interrupted": "warn"}
_MOST_JOBS = 5


def write_report(folder: Path, compared: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Writes the report of a run, beside it or to `output`, and returns its path.

    Args:
        compared: output directories of other runs, whose curves and settings stand beside this one's.

    Raises:
        ConfigError: a directory holds no run.
        OSError: the page cannot be written.
    """
    path = output or folder / FILE_NAME
    text = render([read_run(one) for one in (folder, *compared)])
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
    return path


def write_report_or_warn(folder: Path) -> Path | None:
    """`write_report` at the end of a run, where a fault is one warning."""
    try:
        return write_report(folder)
    except Exception as error:  # noqa: BLE001  a run that has trained does not fail over its report
        logger.warning("no report could be made: %s: %s", type(error).__name__, error)
        return None


def render(runs: Sequence[RunData]) -> str:
    """The page of the first run, with the others beside it."""
    run = runs[0]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(resources.files(__package__).joinpath("page.jinja").read_text(encoding="utf-8"))
    record = run.record
    jobs = record.get("jobs") or []
    started = parse_time(jobs[-1].get("started")) if jobs else None
    return template.render(
        run=run,
        runs=runs,
        title=title_of(run),
        status=record.get("status", "unknown"),
        status_kind=_STATUS_KINDS.get(str(record.get("status")), "bad"),
        error=record.get("error"),
        jobs=len(jobs),
        started=f"{started:%Y-%m-%d %H:%M:%S} UTC" if started else None,
        figures=[figures.key_figures(one) for one in runs],
        charts=figures.main_charts(runs),
        others=figures.other_charts(runs),
        timelines=[drawn for job in run.jobs[-_MOST_JOBS:] if (drawn := timeline(job))],
        shares=figures.time_shares(run),
        session=figures.session_of(run),
        ledger=(record.get("data") or {}).get("statistics") or [],
        decisions=_decisions(record),
        warnings=record.get("warnings") or [],
        controlled=record.get("controller_actions") or [],
        proofs=_proofs(run),
        versions=_versions(record),
        differences=_differences(runs) if len(runs) > 1 else [],
    )


def title_of(run: RunData) -> str:
    """What was trained with what."""
    model = Path(str((run.record.get("model") or {}).get("name") or "")).name
    return " · ".join(part for part in (str(run.record.get("method") or ""), model) if part) or run.name


def _decisions(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was decided, and why: as the start summary told it, or what the plan alone says."""
    told = record.get("summary")
    if told:
        return [(str(label), shortened(str(value), 400), str(reason)) for label, value, reason in told]
    plan = record.get("plan") or {}
    batch, steps = plan.get("batch") or {}, plan.get("steps") or {}
    rows = [
        ("total batch", batch.get("total"), "processes x per-device rows x accumulation"),
        ("per-device batch", batch.get("per_device"), batch.get("reason")),
        ("learning rate", plan.get("learning_rate"), plan.get("learning_rate_reason")),
        ("optimizer steps", steps.get("total"), steps.get("reason")),
    ]
    return [(label, str(value), str(reason or "")) for label, value, reason in rows if value is not None]


def _proofs(run: RunData) -> list[tuple[str, str]]:
    """What was made of the run, and what was shown of it."""
    artifact = run.record.get("artifact") or {}
    proofs = [(str(artifact.get("kind")), str(artifact.get("folder")))] if artifact else []
    proofs += [("checked", check) for check in artifact.get("checks") or []]
    if artifact.get("stop_tokens"):
        proofs.append(("stops at", artifact["stop_tokens"]))
    for key in ("fingerprint", "layout"):
        if found := (run.record.get("model") or {}).get(key):
            proofs.append(({"fingerprint": "base model", "layout": "rows in a batch"}[key], str(found)))
    if found := (run.record.get("data") or {}).get("fingerprint"):
        proofs.append(("data fingerprint", str(found)))
    for path, certificate in run.certificates.items():
        passed = "passed" if certificate.get("passed") else "failed"
        numbers = ", ".join(f"{key} {value}" for key, value in flat(certificate).items() if isinstance(value, float))
        proofs.append((path, f"{passed}: {numbers}"))
    return proofs


def _versions(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    job = (record.get("jobs") or [{}])[-1]
    versions = [("engine", str(record.get("engine", ""))), ("Python", str(job.get("python", "")))]
    versions += [(name, str(version)) for name, version in (job.get("packages") or {}).items()]
    return [(name, version) for name, version in versions if version]


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """The keys of the configs that are not the same in all runs, with the value of each."""
    from finetuning.config.yaml.reader import parse_document

    configs = [flat(parse_document(run.config).values) if run.config else {} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [_shown(config.get(key)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists by dotted keys.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c.0': 2}
    """
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


CARD_NAME = "model_card.md"
PLOTS_NAME = "plots"
_ROOM = 34
_COLOURS = ("#1f5fbf", "#b8500a", "#14804a", "#8a3fa0", "#9c1c5a", "#5b6470")
_UNFIT = re.compile(r"[^a-z0-9]+")


def write_extracts_or_warn(folder: Path) -> list[Path]:
    """`model_card.md` and the folder `plots` of a run; a fault is one warning, and gives what was written before it.

    The card is also the README of the tuned model.
    """
    written: list[Path] = []
    try:
        for path, text in _extracts(folder):
            _write(path, text)
            written.append(path)
    except Exception as error:  # noqa: BLE001  a run that has trained does not fail over this
        logger.warning("not all of the model card and the plots could be made: %s: %s", type(error).__name__, error)
    return written


def _extracts(folder: Path) -> Iterator[tuple[Path, str]]:
    run = read_run(folder)
    for chart in main_charts([run]):
        yield folder / PLOTS_NAME / f"{_UNFIT.sub('-', chart.title.lower()).strip('-')}.svg", picture(chart)
    artifact = run.record.get("artifact") or {}
    if artifact:
        text = model_card(run)
        yield folder / CARD_NAME, text
        yield Path(str(artifact["folder"])) / "README.md", text


def picture(chart: Chart) -> str:
    """A chart as an SVG file of its own, on white, its title and the names of its curves on top."""
    strokes = "".join(f".c{n}{{stroke:{colour}}}circle.c{n}{{fill:{colour}}}" for n, colour in enumerate(_COLOURS))
    style = (
        "text{font:11px sans-serif;fill:#5b6470;text-anchor:end}text.step{text-anchor:middle}"
        "text.title{font-weight:bold;font-size:13px;fill:#1c2126;text-anchor:start}"
        ".grid{stroke:#dde1e6}.cursor{visibility:hidden}polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
        f".dashed{{stroke-dasharray:5 4}}{strokes}"
    )
    names = Markup("").join(
        Markup('<tspan dx="10" fill="{}">{}{}</tspan>').format(_COLOURS[colour], "- - " if dashed else "— ", name)
        for name, colour, dashed in chart.legend
    )
    _, _, inside = chart.svg.partition(">")
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {} {} {}" width="{}"><style>{}</style>'
        '<rect y="{}" width="100%" height="100%" fill="#fff"/><text class="title" x="8" y="-14">{}</text>'
        '<text x="{}" y="-14">{}</text>{}\n'
    ).format(-_ROOM, WIDTH, HEIGHT + _ROOM, 2 * WIDTH, style, -_ROOM, chart.title, WIDTH - 12, names, Markup(inside))


def model_card(run: RunData) -> str:
    """The tuned model in Markdown, with the front matter that the model hub reads."""
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
    lines += ["## Result", "", *_table(key_figures(run)), ""]
    lines += ["## Data", "", *_table(_rows(record)), ""]
    lines += ["## Training", "", *_table(_settings(record)), ""]
    lines += ["## Shown before it was published", ""]
    lines += [f"- {check}" for check in artifact.get("checks") or []]
    lines += [f"- {artifact['stop_tokens']}"] if artifact.get("stop_tokens") else []
    return "\n".join([*lines, ""])


def _table(rows: list[tuple[str, str]]) -> list[str]:
    body = [f"| {name} | {value} |" for name, value in rows if value]
    return ["| | |", "|---|---|", *body] if body else ["Not recorded."]


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = record.get("data") or {}
    told = [
        (f"{part['split']} rows", f"{part['kept']:,} of {part['rows']:,} kept, {part['tokens']:,} tokens")
        for part in data.get("statistics") or []
    ]
    return [*told, ("fingerprint", str(data.get("fingerprint") or ""))]


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan = record.get("plan") or {}
    batch, steps = plan.get("batch") or {}, plan.get("steps") or {}
    packages = ((record.get("jobs") or [{}])[-1].get("packages") or {}).items()
    told = [("optimizer steps", steps.get("total")), ("rows a step", batch.get("total"))]
    told += [("learning rate", plan.get("learning_rate")), *((note.partition(": ")[::2]) for note in _notes(record))]
    told.append(("versions", ", ".join(f"{name} {version}" for name, version in packages if version[0].isdigit())))
    return [(name, str(value)) for name, value in told if value not in (None, "")]


def _notes(record: Mapping[str, Any]) -> list[str]:
    return [str(note) for note in (record.get("model") or {}).get("notes") or [] if ": " in str(note)]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
