"""Garbage collection during start-up is rare, and as before once it is over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from finetuning.training.run import _infrequent_gc


@pytest.fixture(autouse=True)
def _unfreeze() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_objects_of_start_up_are_never_scanned() -> None:
    generations: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    before = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(note)
    try:
        with _infrequent_gc():
            kept = [[number] for number in range(100_000)]
    finally:
        gc.callbacks.remove(note)
    assert generations == []
    assert gc.get_freeze_count() > len(kept)
    assert gc.get_threshold() == before


def test_an_error_restores_the_thresholds() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(ValueError, match="no"), _infrequent_gc():
        raise ValueError("no")
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == frozen
