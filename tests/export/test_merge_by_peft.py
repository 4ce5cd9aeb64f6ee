from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import ModelError
from finetuning.export.merge import merge_adapters

OTHERS: dict[str, dict[str, Any]] = {
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"target_modules": ["q_proj"], "r": 4},
    "LoKrConfig": {"target_modules": ["q_proj"], "r": 4},
    "AdaLoraConfig": {"target_modules": ["q_proj"], "init_r": 4, "target_r": 2, "total_step": 10},
    "VeraConfig": {"target_modules": ["q_proj"], "r": 4},
    "OFTConfig": {"target_modules": ["q_proj"], "r": 4, "oft_block_size": 0},
    "HRAConfig": {"target_modules": ["q_proj"], "r": 4},
    "FourierFTConfig": {"target_modules": ["q_proj"], "n_frequency": 50},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "TrainableTokensConfig": {"target_modules": ["embed_tokens"], "token_indices": [1, 5]},
}
UNMERGEABLE: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {"num_virtual_tokens": 4},
    "PrefixTuningConfig": {"num_virtual_tokens": 4},
    "AdaptionPromptConfig": {"adapter_len": 4, "adapter_layers": 1},
}


def make_config(kind: str, arguments: dict[str, Any]) -> Any:
    import peft

    return getattr(peft, kind)(task_type="CAUSAL_LM", **arguments)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_types_go_through_peft_and_it_is_said(
    kind: str, tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, make_config(kind, OTHERS[kind]), tmp_path / "adapter")
    told: list[str] = []
    result = merge_adapters(str(tiny_llama_dir), [str(adapter)], tmp_path / "out", tell=told.append)
    assert not result.streamed and result.certificate is not None and result.certificate.passed
    assert told[0].startswith("merging in memory with PEFT: it is of type")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_what_cannot_be_merged_is_refused(
    kind: str, tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, make_config(kind, UNMERGEABLE[kind]), tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_adapters(str(tiny_llama_dir), [str(adapter)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_quantised_base_is_dequantised(
    tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tmp_path / "nf4"
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=quantised).save_pretrained(base)
    adapter = make_adapter(
        tiny_llama_dir, make_config("LoraConfig", {"r": 4, "target_modules": ["q_proj"]}), tmp_path / "a"
    )
    told: list[str] = []
    result = merge_adapters(str(base), [str(adapter)], tmp_path / "out", tell=told.append)
    assert "dequantised" in told[0] and result.certificate is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 64)
    assert not hasattr(model.config, "quantization_config")


def test_pissa_keeps_its_changed_base(tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    config = make_config("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    adapter = make_adapter(tiny_llama_dir, config, tmp_path / "adapter")
    told: list[str] = []
    merge_adapters(str(tiny_llama_dir), [str(adapter)], tmp_path / "out", tell=told.append)
    assert "changes the base" in told[0]


def test_fused_experts_go_through_peft(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    base = tmp_path / "mixtral"
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=128,
    )
    MixtralForCausalLM(config).save_pretrained(base)
    plain = make_config("LoraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    experts = make_config(
        "LoraConfig",
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    )
    for name, lora, streamed in (("attention", plain, True), ("experts", experts, False)):
        adapter = make_adapter(base, lora, tmp_path / name)
        result = merge_adapters(str(base), [str(adapter)], tmp_path / f"{name}-merged")
        assert result.streamed is streamed
        assert result.certificate is not None and result.certificate.passed
