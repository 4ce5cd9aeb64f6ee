"""Numbers as people read them."""

from __future__ import annotations

import math

UNKNOWN = "–"


def duration(seconds: float | None) -> str:
    """
    >>> duration(0.34), duration(42), duration(185), duration(7384), duration(200000)
    ('0.3s', '42s', '3m 05s', '2h 03m', '2d 07h')
    """
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole}s"
    if minutes < 60:
        return f"{minutes}m {whole % 60:02d}s"
    if hours < 24:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{days}d {hours % 24:02d}h"


def loss(value: float | None) -> str:
    """
    >>> loss(2.34567), loss(0.00012345), loss(float("nan")), loss(None)
    ('2.3457', '0.000123', 'nan', '–')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.4f}" if not math.isfinite(value) or abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def rate(value: float | None) -> str:
    """
    >>> rate(12.34), rate(1234.5), rate(1_234_567), rate(None)
    ('12.3', '1,234', '1,234,567', '–')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def shortened(text: str, most: int = 240) -> str:
    """
    >>> shortened("a long story", 8), shortened("short", 8)
    ('a long …', 'short')
    """
    return text if len(text) <= most else text[: most - 1].rstrip() + " …"


def small(value: float | None) -> str:
    """
    >>> small(5e-5), small(1.23456e-4), small(0), small(None)
    ('5e-05', '0.000123', '0', '–')
    """
    return UNKNOWN if value is None else f"{value:.3g}"
