"""Parameters of which an ordinary run of the tests takes a sample: `make test-full` runs all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sample(names: Iterable[str], chosen: Collection[str]) -> list[Any]:
    """Return the parameters `names`; those that are not `chosen` have the mark `full`."""
    names = list(names)
    unknown = set(chosen) - set(names)
    assert not unknown, f"no such parameters: {sorted(unknown)}"
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.full) for name in names]
