"""Garbage is looked for seldom while a program starts, and as always from then on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuning.cli import generate, merge_adapter
from finetuning.garbage import seldom_collected


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


@pytest.fixture
def adapter(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of random weights for the tiny model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_generate_and_merge_adapter_spare_what_they_import(tiny_llama_dir: Path, adapter: Path, tmp_path: Path) -> None:
    base, frozen = str(tiny_llama_dir), [gc.get_freeze_count()]
    assert generate.main(["--model", base, "--text", "a", "--out_file", str(tmp_path / "a.json")]) == 0
    frozen.append(gc.get_freeze_count())
    assert merge_adapter.main([base, str(adapter), str(tmp_path / "merged")]) == 0
    frozen.append(gc.get_freeze_count())
    assert frozen == sorted(set(frozen))
