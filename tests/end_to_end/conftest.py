"""A base model whose vocabulary has no free ids for new tokens."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def snug_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """`tiny_llama_dir` with exactly as many rows in its embeddings as its tokenizer has tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.resize_token_embeddings(len(tokenizer))
    directory = tmp_path_factory.mktemp("models") / "snug-llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
