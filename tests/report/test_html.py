"""The report: what it reads, what it draws, and that it needs nothing from anywhere."""

from __future__ import annotations

import html.parser
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.report.charts import Series, line_chart, nice_ticks, number, tick_labels
from finetuning.report.html import render, write_report_or_warn
from finetuning.report.run_folder import downsample, read_run, read_series
from finetuning.tracking.tracker import LogEvent, MetricsLog, StepMetrics

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
RECORD: dict[str, Any] = {
    "status": "completed",
    "method": "sft",
    "engine": "finetuning 1",
    "model": {"name": "/models/tiny", "fingerprint": "llama 1", "layout": "padded"},
    "plan": {"batch": {"total": 8, "per_device": 2, "reason": "divides"}, "learning_rate": 0.1, "steps": {"total": 9}},
    "data": {"statistics": [{"split": "training", "rows": 12, "kept": 10, "truncated": 1, "dropped": {"empty": 2}}]},
    "jobs": [{"started": "2026-01-01T10:00:00Z", "ended": "2026-01-01T11:05:00Z", "command": ["/x/finetuning", "sft"]}],
    "artifact": {"kind": "adapter", "folder": "out/final", "checks": ["all values finite"], "stop_tokens": "eos"},
    "warnings": [HOSTILE],
}
for _part in RECORD["data"]["statistics"]:
    _part |= {"tokens": 1000, "trained_tokens": 400, "warnings": {}}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and collects what a page asks of the network."""

    _VOID = frozenset({"meta", "input", "img", "br", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset")]
        self.wrong += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes an output directory as a run leaves it."""

    def make(name: str = "out", metrics: list[dict[str, Any]] = (), **record: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({**RECORD, **record}))
        (folder / "config.resolved.yaml").write_text(f"training_args:\n  learning_rate: {len(name)}\n")
        (folder / "preview.txt").write_text(
            f"--- rows.jsonl:1 (row): 9 tokens, 3 trained\nQ {HOSTILE}\nA ⟦yes⟧ end ⟦no⟧\n"
        )
        if metrics:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        return folder

    return make


def rows(count: int) -> list[dict[str, Any]]:
    return [{"step": step, "kind": "training", "loss": 2.0 / step, "grad_norm": 0.1} for step in range(1, count + 1)]


def test_the_page_is_valid_and_self_contained(make_run: Callable) -> None:
    folder = make_run(
        metrics=[
            *rows(20),
            {"step": 20, "kind": "validation", "eval_loss": 0.2, "eval_odd": 3},
            {"step": 21, "kind": "validation", "eval_odd": 4},
        ]
    )
    page = write_report_or_warn(folder)
    assert page == folder / "report.html"
    text = page.read_text()
    parsed = Page(text)
    assert not parsed.wrong and not parsed.open
    assert not parsed.loaded
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert parsed.tags.count("script") == 1, "text of users is escaped"
    assert "img" not in parsed.tags
    for expected in ("adapter", "all values finite", "divides", "1h 05m", "finetuning sft", "learning_rate: 3", "Odd"):
        assert expected in text
    assert re.findall("<mark>(.*?)</mark>", text)[1:] == ["yes", "no"]
    assert 'aria-label="Loss: training from 2 at step 1 to 0.1 at step 20' in text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: None,
        lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "lo'),
        lambda folder: (folder / "preview.txt").unlink(),
        lambda folder: (folder / "config.resolved.yaml").unlink(),
        lambda folder: (folder / "run.json").write_text('{"status": "failed", "error": "it broke"}'),
        lambda folder: (folder / "telemetry").mkdir(),
        lambda folder: (folder / "merged").mkdir() or (folder / "merged/merge_verification.json").write_text("{}"),
    ],
)
def test_an_incomplete_record_still_renders(spoil: Callable[[Path], Any], make_run: Callable) -> None:
    folder = make_run()
    spoil(folder)
    page = Page(render([read_run(folder)]))
    assert not page.wrong and not page.open


@pytest.mark.parametrize("name", ["merge_verification.json", "merge_certificate.json"])
def test_a_merge_verification_is_read_under_its_current_and_its_old_name(name: str, make_run: Callable) -> None:
    folder = make_run()
    (folder / "merged").mkdir()
    (folder / "merged" / name).write_text('{"passed": true, "tolerance": 0.125}')
    assert read_run(folder).merge_checks == {f"merged/{name}": {"passed": True, "tolerance": 0.125}}
    assert "passed: tolerance 0.125" in render([read_run(folder)])


def test_an_error_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert write_report_or_warn(tmp_path) is None
    assert "the report could not be written" in caplog.text


def test_runs_are_compared(make_run: Callable) -> None:
    first, second = make_run("one", rows(5)), make_run("three", rows(9), status="failed")
    text = render([read_run(first), read_run(second)])
    assert not Page(text).wrong
    assert "<code>training_args.learning_rate</code></th><td>3</td><td>5</td>" in text
    assert "one, training" not in text, "with one series per run, the run's name is enough"
    assert "one from 2 at step 1 to 0.4 at step 5; three from 2 at step 1" in text


def test_numbers_come_from_whichever_file_has_them(make_run: Callable) -> None:
    folder = make_run()
    assert read_series(folder) == {}
    loss_line = {"data": {"epoch": 1.0, "step": 3, "value": 2.5}, "name": "training_loss"}
    (folder / "training_logs.jsonl").write_text(json.dumps(loss_line) + "\n")
    assert read_series(folder) == {"loss": [(3, 2.5)]}
    for step in (9, 10):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        history = [{"step": step, "loss": float(step), "epoch": 1}]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_series(folder) == {"loss": [(10, 10.0)]}
    (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "training", "loss": 4.0, "time": 5}\n')
    assert read_series(folder) == {"loss": [(1, 4.0)]}


def test_the_last_value_of_a_repeated_step_is_used(tmp_path: Path) -> None:
    for losses in ({1: 3.0, 2: 2.5, 3: 2.0}, {3: 1.9, 4: math.nan, 5: 1.5}):
        log = MetricsLog(tmp_path)
        for step, loss in losses.items():
            log.log(LogEvent("training", StepMetrics(step, 5, tokens_per_s=100.0), {"loss": loss}))
        log.log_telemetry({"mfu": 0.5}, max(losses))
        log.close()
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"torn')
    series = read_series(tmp_path)
    assert series["loss"] == [(1, 3.0), (2, 2.5), (3, 1.9), (5, 1.5)]
    assert series["mfu"] == [(3, 0.5), (5, 0.5)]
    assert series["tokens_per_s"][0] == (1, 100.0)
    assert [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:4]] == [
        *["training"] * 3,
        "figures",
    ]


def test_downsampling_keeps_the_peaks() -> None:
    points = [(step, 1.0) for step in range(10_000)]
    points[4321] = (4321, 99.0)
    points[5432] = (5432, -7.0)
    few = downsample(points, 200)
    assert len(few) <= 210
    assert (4321, 99.0) in few and (5432, -7.0) in few
    assert few[0] == points[0] and few[-1] == points[-1]
    assert [step for step, _ in few] == sorted(step for step, _ in few)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 1), (0, 0), (-3, 1e9), (1e-9, 2e-9), (5.2, 6.3), (-2, -1)])
def test_ticks_enclose_the_values_and_have_distinct_labels(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert len(set(tick_labels(ticks))) == len(ticks)


def test_every_curve_stays_inside_its_chart() -> None:
    chart = line_chart("x", [Series("a", [(0, -5.0), (7, 80.0)]), Series("b", [(3, 1.0)])])
    assert chart is not None
    for points in re.findall('points="([^"]*)"', str(chart.svg)):
        for point in points.split():
            x, y = (float(part) for part in point.split(","))
            assert 0 <= x <= 400 and 0 <= y <= 210
    assert line_chart("x", [Series("a", [])]) is None


def test_numbers_are_formatted_briefly() -> None:
    assert [number(value) for value in (0.0, 12.0, 999.5, 1500.0, 20_000.0, 3e6, -1e-7)] == [
        *("0", "12", "999.5", "1500", "20k", "3M", "-1e-7")
    ]
