"""A base model is recognized, and another one is distinguished from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetuning.errors import ModelError
from finetuning.model.fingerprint import (
    FINGERPRINT_FILE,
    compute_fingerprint,
    describe_difference,
    read_fingerprint,
    write_fingerprint,
)


@pytest.fixture
def copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


def test_a_copy_under_another_name_is_the_same(tiny_llama_dir: Path, copy: Path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "use_cache": False}))
    assert describe_difference(compute_fingerprint(tiny_llama_dir), compute_fingerprint(copy)) is None


def test_shards_make_no_difference(tiny_llama_dir: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert describe_difference(compute_fingerprint(tiny_llama_dir), compute_fingerprint(tmp_path)) is None


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_other_weights_of_the_same_shape_are_distinguished(name: str, tiny_llama_dir: Path, copy: Path):
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name] * 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert (
        describe_difference(compute_fingerprint(tiny_llama_dir), compute_fingerprint(copy))
        == "the shapes agree but the weights differ"
    )


def test_other_shapes_and_settings_are_named(tiny_llama_dir: Path, chatml_llama_dir: Path, copy: Path):
    original = compute_fingerprint(tiny_llama_dir)
    assert "tensors" in describe_difference(original, compute_fingerprint(chatml_llama_dir))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert "config.json differs" in describe_difference(original, compute_fingerprint(copy))
    weights = {name: t.to(torch.bfloat16) for name, t in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "dtypes" in describe_difference(original, compute_fingerprint(copy))


def test_it_is_written_and_read_again(tiny_llama_dir: Path, tmp_path: Path):
    assert read_fingerprint(tmp_path) is None
    original = compute_fingerprint(tiny_llama_dir)
    write_fingerprint(original, tmp_path)
    assert read_fingerprint(tmp_path) == original
    (tmp_path / FINGERPRINT_FILE).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_fingerprint(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        compute_fingerprint(tmp_path)
