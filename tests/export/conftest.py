"""Adapters for the tiny models: made by PEFT, with random weights that change the model much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def copy_in_dtype(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """A function that saves a model with its tokenizer in another dtype, in shards of 100 KB; once per pair."""
    made: dict[tuple[Path, str], Path] = {}

    def copy(source: Path, dtype: str) -> Path:
        if (source, dtype) not in made:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            folder = tmp_path_factory.mktemp("base") / f"{source.name}-{dtype}"
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
            model.save_pretrained(folder, max_shard_size="100KB")
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            made[source, dtype] = folder
        return made[source, dtype]

    return copy


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """A function that puts a PEFT config on a base, moves all its weights at random, and saves the adapter."""

    def make(
        base: Path, config: Any, folder: Path, *, dtype: str | None = None, seed: int = 0, scale: float = 0.05
    ) -> Path:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    moved = torch.randn_like(parameter) * scale
                    # DoRA's lengths and saved modules begin at what the base has.
                    keep = "magnitude" in name or "modules_to_save" in name or "trainable_tokens" in name
                    parameter.data = parameter.data + moved if keep else moved
        if dtype is not None:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(getattr(torch, dtype))
        model.save_pretrained(folder)
        return folder

    return make
