from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from adapter_types import MINIMAL

from finetuning.errors import ModelError, StorageError
from finetuning.export.merge.merge import merge_adapters
from finetuning.model.fingerprint import compute_fingerprint, write_fingerprint


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


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, make_adapter: Callable[..., Path]) -> Path:
    """An adapter that records that its base was quantized to 4 bits in training."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    trained = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=nf4)
    config = LoraConfig(task_type="CAUSAL_LM", **MINIMAL["LORA"])
    adapter = make_adapter(tiny_llama_dir, config, tmp_path_factory.mktemp("qlora") / "adapter")
    write_fingerprint(compute_fingerprint(tiny_llama_dir).loaded_as(trained), adapter)
    return adapter


def test_a_merge_is_compared_with_the_quantized_base_of_training(
    tiny_llama_dir: Path, qlora: Path, tmp_path: Path
) -> None:
    """The merge itself is exact in both cases; only one of them is the model that was trained."""
    differences = {}
    for dequantize in (False, True):
        logged: list[str] = []
        out = tmp_path / str(dequantize)
        result = merge_adapters(str(tiny_llama_dir), [str(qlora)], out, dequantize=dequantize, log=logged.append)
        verification = result.verification
        assert verification is not None and verification.merged_against_adapter.max_logit_difference < 1e-4
        assert verification.merged_against_trained is not None
        differences[dequantize] = verification.merged_against_trained.max_logit_difference
        assert "against the base quantized by bitsandbytes, as trained" in str(verification)
        warned = any("the merged model differs from that by more than rounding" in line for line in logged)
        assert warned is verification.differs_from_trained is not dequantize
        assert any("merge with --dequantize" in line for line in logged) is not dequantize
        recorded = json.loads((out / "merge_verification.json").read_text())
        assert recorded["merged_against_trained"]["max_logit_difference"] == differences[dequantize]
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert differences[False] > 1e-2 > 1e-4 > differences[True]


def test_a_merge_into_other_weights_is_not_taken_for_one_that_is_there(
    tiny_llama_dir: Path, qlora: Path, tmp_path: Path
) -> None:
    merge = partial(merge_adapters, str(tiny_llama_dir), [str(qlora)], tmp_path / "out", verify=False)
    merge(dequantize=True)
    assert merge(dequantize=True).existed
    with pytest.raises(StorageError, match="not empty"):
        merge()


def test_dequantize_needs_an_adapter_of_a_quantized_base(
    tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig

    adapter = make_adapter(tiny_llama_dir, LoraConfig(task_type="CAUSAL_LM", **MINIMAL["LORA"]), tmp_path / "a")
    with pytest.raises(ModelError, match=r"--dequantize: .* has no record that its base was quantized in training"):
        merge_adapters(str(tiny_llama_dir), [str(adapter)], tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()
