from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapter_types import MINIMAL

from finetuning.export.merge.merge import merge_adapters


def test_a_quantized_base_is_dequantized(
    tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tmp_path / "nf4"
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=quantized).save_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", **MINIMAL["LORA"])
    adapter = make_adapter(tiny_llama_dir, lora, tmp_path / "a")
    logged: list[str] = []
    result = merge_adapters(str(base), [str(adapter)], tmp_path / "out", log=logged.append)
    assert "dequantized" in logged[0] and result.verification is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 64)
    assert not hasattr(model.config, "quantization_config")
