"""The parts of the live pages: the list of runs, and one run or several with the parts of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

from finetuning.config.redaction import redact_text
from finetuning.errors import FinetuningError
from finetuning.report.console import duration, loss, rate
from finetuning.report.html import key_results, page_templates, render_sections, status_kind, title_of
from finetuning.report.run_folder import JsonRecord, RunData, files_read, read_run
from finetuning.report.terminal import columns, validation_text
from finetuning.tracking.tracker import LogEvent, StepMetrics
from finetuning.watch.run_folders import RunFolders, Signature, WatchedRun, links_outside, signature_of

if TYPE_CHECKING:
    import jinja2

_LOG_LINES = 40
_KINDS = {"dead": "bad", "stopped": "warn"}
"""Colors of states that are none of a record."""
MOST_COMPARED = 6
"""Runs in one chart: as many as it has colors."""


@dataclass(frozen=True)
class LivePage:
    """A page at one time: the title of its window, and the HTML of its parts."""

    title: str
    sections: Mapping[str, str] = field(default_factory=dict)


@cache
def templates() -> jinja2.Environment:
    """Return the templates of these pages and of the report."""
    environment = page_templates("finetuning.watch")
    environment.filters.update(duration=duration, loss=loss, rate=rate, percent=percent, sparkline=sparkline)
    environment.globals.update(kind_of=kind_of)
    return environment


def kind_of(state: str) -> str:
    """Return the kind of a run's state, which has a color."""
    return "busy" if state.startswith("on ") else _KINDS.get(state) or status_kind(state)


def percent(run: WatchedRun) -> str:
    """Return how much of a run is done; empty where it is not known."""
    return f"{min(run.state.step / run.state.steps, 1):.0%}" if run.state.step is not None and run.state.steps else ""


def sparkline(points: Sequence[tuple[int, float]]) -> Markup:
    """Draw a small curve without axes; nothing for less than two points."""
    if len(points) < 2:
        return Markup("")
    (first, _), (last, _) = points[0], points[-1]
    low, high = min(value for _, value in points), max(value for _, value in points)
    places = " ".join(
        f"{1 + 98 * (step - first) / max(last - first, 1):.1f},{23 - 22 * (value - low) / ((high - low) or 1):.1f}"
        for step, value in points
    )
    label = f"loss from {loss(points[0][1])} to {loss(points[-1][1])}"
    return Markup(
        '<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<polyline class="c0" points="{}"/></svg>'
    ).format(label, places)


def _block(name: str, **values: object) -> str:
    template = templates().get_template("live.jinja")
    return "".join(template.blocks[name](template.new_context(values))).strip()


def render_list(runs: Sequence[WatchedRun], roots: Sequence[str]) -> LivePage:
    """Return the list of runs."""
    running = sum(run.is_running for run in runs)
    title = f"{len(runs)} run{'s' * (len(runs) != 1)}" + (f", {running} running" if running else "")
    return LivePage(title, {"list": redact_text(_block("list", runs=runs, roots=roots, title=title))})


class RunPages:
    """Renders pages of runs, and reads a run again only when its files have changed."""

    def __init__(self, folders: RunFolders):
        self._folders = folders
        self._read: dict[str, tuple[Signature, RunData]] = {}

    def render(self, run_ids: Sequence[str]) -> LivePage:
        """Return the page of a run; of several, a comparison."""
        matches = [self._folders.find(run_id) for run_id in run_ids]
        runs = [run for run in matches if run is not None]
        if len(runs) < len(run_ids):
            return _gone("This run is not here any more: its folder was deleted or moved.")
        try:
            data = [self._data(run) for run in runs]
        except FinetuningError as error:
            return _gone(str(error))
        return _comparison(runs, data) if len(runs) > 1 else _single(runs[0], data[0])

    def _data(self, run: WatchedRun) -> RunData:
        outside = links_outside(run)
        if outside:
            raise FinetuningError(
                f"{outside[0].name} in {run.name} is a link to a file outside of {run.root}, so this run is not read"
            )
        signature = signature_of(files_read(run.folder))
        before = self._read.get(run.id)
        if before is not None and before[0] == signature:
            return before[1]
        data = read_run(run.folder)
        if len(self._read) >= MOST_COMPARED:
            self._read.pop(next(iter(self._read)))
        self._read[run.id] = signature, data
        return data


def _gone(text: str) -> LivePage:
    notice = Markup('<h1>{}</h1><div class="notice bad">{}</div>').format("Not shown", text)
    return LivePage("Not shown", {"top": redact_text(notice), "progress": ""})


def _single(run: WatchedRun, data: RunData) -> LivePage:
    results = key_results(data)
    if run.is_running:
        # They are final when it has ended; the steps are in the progress bar.
        results = [(name.removeprefix("final "), value) for name, value in results if name != "steps"]
    sections = render_sections(
        [data], folder=run.name, status=run.state.state, status_kind=kind_of(run.state.state), key_results=[results]
    )
    sections["progress"] = Markup(_block("progress", run=run))
    sections["log"] = Markup(_block("log", lines=log_lines(run.rows, run.state.steps)))
    done = f"{percent(run)} · " if run.may_run and percent(run) else ""
    title = f"{done}loss {loss(run.state.loss)} – {title_of(data)}"
    return LivePage(title, {name: redact_text(text) for name, text in sections.items()})


def _comparison(runs: Sequence[WatchedRun], data: Sequence[RunData]) -> LivePage:
    sections = render_sections(data)
    parts = {
        "top": Markup("<h1>{} runs</h1>").format(len(runs)),
        "progress": Markup(_block("several", runs=runs)),
        "runs": sections["runs"],
        "metrics": sections["metrics"],
    }
    title = f"{len(runs)} runs compared"
    return LivePage(title, {name: redact_text(text) for name, text in parts.items()})


def log_lines(rows: Sequence[JsonRecord], steps: int | None) -> list[str]:
    """Return the newest logged rows as the lines that a log file of the run has, each with its time."""
    lines: list[str] = []
    for row in rows:
        step, time = row.get("step"), row.get("time")
        if not isinstance(step, int):
            continue
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
        metrics = StepMetrics(
            step,
            steps or step,
            epoch=numbers.get("epoch"),
            loss=numbers.get("loss"),
            learning_rate=numbers.get("learning_rate"),
            grad_norm=numbers.get("grad_norm"),
            tokens_per_s=numbers.get("tokens_per_s"),
        )
        if row.get("kind") == "training":
            text = "  ".join(columns(metrics)[:-1])
        elif row.get("kind") == "validation":
            text = validation_text(LogEvent("validation", metrics, numbers))
        else:
            continue
        if text:
            clock = f"{datetime.fromtimestamp(time):%H:%M:%S}  " if isinstance(time, int | float) else ""
            lines.append(clock + text)
    return lines[-_LOG_LINES:]
