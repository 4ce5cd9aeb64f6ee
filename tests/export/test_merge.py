from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.export.merge import MergeResult, merge_adapters

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR},
    "odd scaling": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 6, "lora_alpha": 7, "use_rslora": True, "target_modules": ALL_LINEAR},
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ALL_LINEAR},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 3},
    },
    "head and embeddings": {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora embeddings": {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    "modules to save": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms to save": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["input_layernorm"]},
    "tokens": {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [3, 300, 17]},
    "one layer": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "regex": {"r": 4, "target_modules": r".*\.(q|v)_proj"},
    "gaussian": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
}


def lora(**arguments: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **arguments)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def merged_by_peft(base: Path, adapters: list[Path], folder: Path) -> Path:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    model.save_pretrained(folder)
    return folder


def assert_same_bits(ours: Path, theirs: Path) -> None:
    import torch

    mine, other = tensors(ours), tensors(theirs)
    assert set(mine) == set(other)
    differing = [
        name for name in mine if mine[name].dtype != other[name].dtype or not torch.equal(mine[name], other[name])
    ]
    assert differing == []


def merge(base: Path, adapters: list[Path], out: Path, **options: Any) -> MergeResult:
    return merge_adapters(str(base), [str(adapter) for adapter in adapters], out, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_streaming_gives_the_bits_of_peft(
    kind: str,
    dtype: str,
    tied: bool,
    tiny_llama_dir: Path,
    chatml_llama_dir: Path,
    copy_in_dtype: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = copy_in_dtype(chatml_llama_dir if tied else tiny_llama_dir, dtype)
    adapter = make_adapter(base, lora(**LORAS[kind]), tmp_path / "adapter")
    result = merge(base, [adapter], tmp_path / "out")
    assert result.streamed
    assert result.certificate is not None and result.certificate.passed
    if tied and kind in ("head and embeddings", "dora embeddings"):
        # PEFT adds both deltas to the one tensor that both sides share, which is not the model that was trained.
        assert "lm_head.weight" in tensors(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    else:
        assert_same_bits(tmp_path / "out", merged_by_peft(base, [adapter], tmp_path / "peft"))
