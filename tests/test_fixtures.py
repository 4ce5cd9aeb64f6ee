"""The shared fixtures are what the other tests take them for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig


def test_tiny_llama_has_no_pad_token_and_no_template(tiny_llama_dir: Path, tiny_tokenizer: Any):
    assert tiny_tokenizer.pad_token is None and tiny_tokenizer.chat_template is None
    assert tiny_tokenizer("hello")["input_ids"][0] == tiny_tokenizer.bos_token_id
    assert 400 < len(tiny_tokenizer) <= 500
    assert AutoConfig.from_pretrained(tiny_llama_dir).vocab_size % 8 == 0
    with safe_open(tiny_llama_dir / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" in weights.keys()  # noqa: SIM118  (safe_open is no mapping)


def test_chatml_llama_renders_and_is_tied(chatml_llama_dir: Path, chatml_tokenizer: Any):
    text = chatml_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    ids = chatml_tokenizer(text)["input_ids"]
    assert chatml_tokenizer.decode(ids) == text and ids.count(chatml_tokenizer.eos_token_id) == 1
    assert (chatml_tokenizer.eos_token, chatml_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    with safe_open(chatml_llama_dir / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


def test_rows_differ(sft_rows: Callable[[int], list], dpo_rows: Callable[[int], list], write_jsonl: Callable, tmp_path):
    path = write_jsonl(tmp_path / "a" / "rows.jsonl", sft_rows(5))
    assert len(set(path.read_text().splitlines())) == 5
    assert all(row["chosen_messages"] != row["rejected_messages"] for row in dpo_rows(7))
