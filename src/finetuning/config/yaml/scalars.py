"""YAML's unquoted words, read as people mean them."""

from __future__ import annotations

import re

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
_BASED = re.compile(r"([-+]?)0([xob])([0-9a-fA-F]+(?:_[0-9a-fA-F]+)*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.(?:[0-9]+(?:_[0-9]+)*)?(?:[eE][-+]?[0-9]+)?"
    r"|\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+)"
)
_INFINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NOT_A_NUMBER = frozenset({".nan", ".NaN", ".NAN"})
_BASES = {"x": 16, "o": 8, "b": 2}
# Longer runs of digits are names or hashes, and Python refuses to read very long ones.
_MOST_DIGITS = 100


def read_scalar(text: str) -> str | int | float | bool | None:
    """The value of an unquoted YAML word.

    YAML 1.2 without its surprises: `1e-5` is a number, `010` is ten, `1:30`, dates, yes, no, on and off are text.

    >>> [read_scalar(word) for word in ("1e-5", "010", "1:30", "no", "TRUE", "~", "1_000", "0x1F")]
    [1e-05, 10, '1:30', 'no', True, None, 1000, 31]
    """
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if len(text) > _MOST_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _read_rare(text)


def _read_rare(text: str) -> str | int | float:
    based = _BASED.fullmatch(text)
    if based:
        sign, base, digits = based.groups()
        try:
            value = int(digits, _BASES[base])
        except ValueError:
            return text
        return -value if sign == "-" else value
    infinite = _INFINITE.fullmatch(text)
    if infinite:
        return float(f"{infinite.group(1)}inf")
    return float("nan") if text in _NOT_A_NUMBER else text
