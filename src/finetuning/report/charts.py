"""Line charts and timelines as SVG, so that a report needs no script or image from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetuning.report.console import duration
from finetuning.report.run_folder import Span, downsample

WIDTH, HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 8, 24
_COLORS = 6
_MAX_SPANS = 400


@dataclass(frozen=True)
class Series:
    """One line of a chart. `color` counts from 0; `dashed` distinguishes a second kind of line without color."""

    name: str
    points: list[tuple[int, float]]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart, ready for a page."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, int, bool], ...]
    """Name, color and dashes of each curve; empty where there is one that needs no name."""


def line_chart(title: str, curves: Sequence[Series], *, from_zero: bool = False) -> Chart | None:
    """Return a chart of these curves over steps, the first on top; None without a point.

    Args:
        from_zero: whether the vertical axis begins at 0.
    """
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return None
    points = [point for curve in drawn for point in curve.points]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    low = min(y for _, y in points)
    ticks = nice_ticks(min(low, 0.0) if from_zero else low, max(y for _, y in points))
    scale = _Scale(x0, x1 if x1 > x0 else x0 + 1, ticks[0], ticks[-1])
    parts = [_grid(scale, ticks), *(_curve(curve, scale) for curve in reversed(drawn))]
    data = json.dumps(
        {
            "x": [scale.x0, scale.x1],
            "at": [_LEFT, WIDTH - _RIGHT],
            "curves": [
                {"name": curve.name, "color": curve.color, "points": downsample(curve.points)} for curve in drawn
            ],
        }
    )
    svg = Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-chart="{}">{}'
        '<line class="cursor" y1="{}" y2="{}"/></svg>'
    ).format(WIDTH, HEIGHT, _describe(title, drawn), data, Markup("").join(parts), _TOP, HEIGHT - _BOTTOM)
    named = len(drawn) > 1 or drawn[0].dashed
    return Chart(
        title, svg, tuple((curve.name, curve.color % _COLORS, curve.dashed) for curve in drawn) if named else ()
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers from below the lowest value to above the highest.

    >>> nice_ticks(0.3, 9.1)
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw), 10 * power)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(index * step, 12) if abs(index * step) > 1e-9 else index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """
    >>> number(0.00005), number(0.00075), number(1234567.0), number(2.0), number(0.1234567)
    ('5e-5', '7.5e-4', '1.23M', '2', '0.123')
    """
    size = abs(value)
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / limit * (10 if unit == 'k' else 1):.3g}{unit}"
    return f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the shortest labels that distinguish the ticks.

    >>> tick_labels([0.0, 0.005]), tick_labels([0.4725, 0.473, 0.4735])
    (['0', '0.005'], ['0.4725', '0.4730', '0.4735'])
    """
    labels = [number(tick) for tick in ticks]
    decimals = 0
    while len(set(labels)) < len(labels) and decimals < 12:
        decimals += 1
        labels = [f"{tick:.{decimals}f}" for tick in ticks]
    return labels


def timeline(spans: Sequence[Span]) -> Markup:
    """Draw one job's spans as bars, one row per name, in the order in which they first began."""
    visible = [span for span in spans if span.end_s > span.start_s or span.depth == 0]
    visible = sorted(visible, key=lambda span: span.start_s - span.end_s)[:_MAX_SPANS]
    names = list(dict.fromkeys(span.name for span in sorted(visible, key=lambda span: (span.start_s, span.depth))))
    total = max((span.end_s for span in visible), default=0.0)
    if not names or total <= 0:
        return Markup("")
    rows = []
    for name in names:
        row_spans = [span for span in visible if span.name == name]
        seconds = sum(span.end_s - span.start_s for span in row_spans)
        bars = Markup("").join(
            Markup('<rect x="{:.2f}%" width="{:.2f}%" height="100%" rx="1"><title>{} at {}, {}</title></rect>').format(
                100 * span.start_s / total,
                max(100 * (span.end_s - span.start_s) / total, 0.25),
                name.replace("_", " "),
                duration(span.start_s),
                duration(span.end_s - span.start_s),
            )
            for span in row_spans
        )
        count = f" × {len(row_spans)}" if len(row_spans) > 1 else ""
        rows.append(
            Markup(
                '<div class="lane"><span class="lane-name">{}{}</span><svg class="lane-bar">{}</svg>'
                '<span class="lane-time">{}</span></div>'
            ).format(name.replace("_", " "), count, bars, duration(seconds))
        )
    return Markup('<div class="timeline">{}</div>').format(Markup("").join(rows))


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)


def _grid(scale: _Scale, ticks: Sequence[float]) -> Markup:
    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}">{}</text>').format(
            _LEFT, WIDTH - _RIGHT, scale.y(tick), scale.y(tick), _LEFT - 6, scale.y(tick) + 4, label
        )
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
    ]
    steps = [tick for tick in nice_ticks(scale.x0, scale.x1) if scale.x0 <= tick <= scale.x1 and tick == int(tick)]
    for tick in steps:
        parts.append(
            Markup('<text class="step" x="{:.1f}" y="{}">{}</text>').format(scale.x(tick), HEIGHT - 7, number(tick))
        )
    return Markup("").join(parts)


def _curve(curve: Series, scale: _Scale) -> Markup:
    points = [(scale.x(x), scale.y(y)) for x, y in downsample(curve.points)]
    style = f"c{curve.color % _COLORS}" + (" dashed" if curve.dashed else "")
    dots = Markup("")
    if len(points) <= 12:
        dots = Markup("").join(
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(style, x, y) for x, y in points
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(style, path) + dots


def _describe(title: str, curves: Sequence[Series]) -> str:
    parts = []
    for curve in curves:
        (first, start), (last, end) = curve.points[0], curve.points[-1]
        parts.append(f"{curve.name} from {number(start)} at step {first} to {number(end)} at step {last}")
    return f"{title}: {'; '.join(parts)}"
