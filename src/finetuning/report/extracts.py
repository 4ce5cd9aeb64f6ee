"""What other places show of a report: its curves as pictures, and the tuned model's card."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from finetuning.report.charts import HEIGHT, WIDTH, Chart
from finetuning.report.html import title_of
from finetuning.report.run_folder import Run, read_run
from finetuning.report.run_metrics import key_figures, main_charts

CARD_NAME = "model_card.md"
PLOTS_NAME = "plots"
_ROOM = 34
_COLOURS = ("#1f5fbf", "#b8500a", "#14804a", "#8a3fa0", "#9c1c5a", "#5b6470")
_UNFIT = re.compile(r"[^a-z0-9]+")
logger = logging.getLogger(__name__)


def write_extracts_if_possible(folder: Path) -> list[Path]:
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


def model_card(run: Run) -> str:
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
        (f"{part['part']} rows", f"{part['kept']:,} of {part['rows']:,} kept, {part['tokens']:,} tokens")
        for part in data.get("ledger") or []
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
