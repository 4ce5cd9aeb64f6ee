"""The findings of `finetuning data doctor` as text for the terminal and as an HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from finetuning.config.redaction import redact_text
from finetuning.data.doctor.findings import Finding, Histogram, Verdict

_COLORS = {Verdict.OK: "\x1b[32m", Verdict.LOOK: "\x1b[33m", Verdict.STOP: "\x1b[31m"}
_RESET, _DIM = "\x1b[0m", "\x1b[2m"
_BAR = 40
_WIDTH = 110


@dataclass(frozen=True)
class DataReport:
    """All findings on the data of a run."""

    title: str
    facts: tuple[tuple[str, str], ...]
    """(name, value) pairs, such as the file and the number of rows."""
    findings: tuple[Finding, ...]
    histogram: Histogram | None

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all findings."""
        verdicts = {finding.verdict for finding in self.findings}
        return next((verdict for verdict in (Verdict.STOP, Verdict.LOOK) if verdict in verdicts), Verdict.OK)

    def summary(self) -> str:
        """The verdict with the number of findings of each."""
        counts = [(sum(finding.verdict is verdict for finding in self.findings), verdict) for verdict in _COLORS]
        return f"{self.verdict}: " + ", ".join(f"{count} x {verdict}" for count, verdict in counts)


def to_text(report: DataReport, *, color: bool = False) -> str:
    """The report as text, with every finding and its worst rows."""
    lines = [f"{name}: {value}" for name, value in report.facts]
    if report.histogram is not None:
        lines += ["", "tokens per row", *_bars(report.histogram)]
    lines.append("")
    for finding in report.findings:
        lines += _finding_lines(finding, color=color)
    return redact_text("\n".join([*lines, "", _colored(report.summary(), report.verdict, color)]))


def _finding_lines(finding: Finding, *, color: bool) -> Iterator[str]:
    label = _colored(f"{finding.verdict.value:<4}", finding.verdict, color)
    first, *rest = textwrap.wrap(f"{finding.title}: {finding.text}", _WIDTH - 6, break_on_hyphens=False) or [
        finding.title
    ]
    yield f"{label}  {first}"
    yield from (f"      {line}" for line in rest)
    if finding.key and finding.verdict is not Verdict.OK:
        yield f"      change: {finding.key}"
    for row in finding.rows:
        line = f"        {row.location}: {' '.join(row.detail.split())}"
        yield f"{_DIM}{line}{_RESET}" if color else line


def _colored(text: str, verdict: Verdict, color: bool) -> str:
    return f"{_COLORS[verdict]}{text}{_RESET}" if color else text


def labels_of(histogram: Histogram) -> list[str]:
    """The range of tokens of each bar."""
    last = len(histogram.bars) - 1
    starts = [index * histogram.width + 1 for index in range(len(histogram.bars))]
    return [
        f"{start}-{start + histogram.width - 1}" if index < last or index < 1 else f"{start}+"
        for index, start in enumerate(starts)
    ]


def is_over(histogram: Histogram, index: int) -> bool:
    """Whether all rows of a bar are longer than the limit."""
    return histogram.limit is not None and index * histogram.width + 1 > histogram.limit


def _bars(histogram: Histogram) -> Iterator[str]:
    labels = labels_of(histogram)
    width = max(map(len, labels))
    for index, (label, count) in enumerate(zip(labels, histogram.bars, strict=True)):
        size = -(-count * _BAR // max(histogram.longest_bar, 1))
        mark = "  over the limit" if count and is_over(histogram, index) else ""
        yield f"  {label:>{width}}  {'█' * size}{' ' * bool(size)}{count}{mark}"


def to_html(report: DataReport) -> str:
    """The report as a self-contained HTML page."""
    source = resources.files("finetuning.data.doctor").joinpath("doctor.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return redact_text(template.render(report=report, bars=_html_bars(report.histogram), Verdict=Verdict))


def _html_bars(histogram: Histogram | None) -> Sequence[dict[str, object]]:
    if histogram is None:
        return []
    return [
        {"label": label, "count": count, "share": 100 * count / max(histogram.longest_bar, 1),
         "over": is_over(histogram, index)}
        for index, (label, count) in enumerate(zip(labels_of(histogram), histogram.bars, strict=True))
    ]  # fmt: skip
