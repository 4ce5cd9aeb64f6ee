"""Garbage is looked for seldom while a run starts, and as always from then on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from finetuning.training.garbage import seldom_collected


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_a_start_leaves_is_not_gone_through_again() -> None:
    collections: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            collections.append(info["generation"])

    before = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(note)
    try:
        with seldom_collected():
            kept = [[number] for number in range(100_000)]
    finally:
        gc.callbacks.remove(note)
    assert collections == []
    assert gc.get_freeze_count() > len(kept)
    assert not any(one is kept for one in gc.get_objects())
    assert gc.get_threshold() == before


def test_an_error_leaves_everything_as_it_was() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(ValueError, match="no"), seldom_collected():
        raise ValueError("no")
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == frozen
