"""Garbage collection is paused during the imports of a run, and as before once they are over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from finetuning.cli.train import _gc_paused


@pytest.fixture(autouse=True)
def _unfreeze() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_imported_objects_are_never_scanned() -> None:
    generations: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    try:
        with _gc_paused():
            kept = [[number] for number in range(100_000)]
    finally:
        gc.callbacks.remove(note)
    assert generations == []
    assert gc.get_freeze_count() > len(kept)
    assert gc.isenabled()


def test_an_error_resumes_collection() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(ValueError, match="no"), _gc_paused():
        raise ValueError("no")
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
