"""Every adapter of PEFT, and each quantisation, through a whole run: trained, checkpointed, resumed, verified."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from finetuning.errors import ConfigError

QV = {"target_modules": ["q_proj", "v_proj"]}
MINIMAL: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, **QV},
    "ADAMSS": {"r": 8, "num_subspaces": 2, **QV},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "C3A": {"block_size": 16, **QV},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "DEFT": {"r": 4, **QV},
    "DELORA": {"r": 4, **QV},
    "FOURIERFT": {"n_frequency": 50, **QV},
    "FROD": {"target_modules": ["q_proj"], "progressbar": False},
    "GLORA": {"r": 4, **QV},
    "GRALORA": {"r": 4, **QV},
    "HIRA": {"r": 4, **QV},
    "HRA": {"r": 4, **QV},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": {"r": 4, **QV},
    "LN_TUNING": {},
    "LOHA": {"r": 4, **QV},
    "LOKR": {"r": 4, **QV},
    "LORA": {"r": 4, **QV},
    "MISS": {"r": 4, **QV},
    "OFT": {"oft_block_size": 8, **QV},
    "OSF": QV,
    "PEANUT": {"r": 4, **QV},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4, **QV},
    "PVERA": {"r": 8, "target_modules": ["q_proj"]},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4, **QV},
    "ROAD": {"group_size": 8, **QV},
    "SHADOW": {"r": 4},
    "SHIRA": {"r": 4, **QV},
    "SUPERTUNING": QV,
    "TINYLORA": QV,
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7], "target_modules": ["embed_tokens"]},
    "UNILORA": QV,
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 16, **QV},
    "VERA": {"r": 8, "target_modules": ["q_proj"]},
    "WAVEFT": {"n_frequency": 50, **QV},
}
TWO_SAVED = {"training_args.max_steps": 2, "training_args.save_strategy": "steps", "training_args.save_steps": 1}
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def cut_and_resumed_equals(train: Any, make: Any, changes: dict[str, Any], read_tensors: Any) -> Any:
    """The run, once its repetition from checkpoint-1 has ended with the very same tensors."""
    whole = train(make({**TWO_SAVED, **changes}))
    assert "all values finite" in whole.result.artifact.checks
    shutil.rmtree(whole.output_dir / "checkpoint-2")
    again = {"run_conf.final_checkpoint_name": "again", "run_conf.resume_from_checkpoint": "auto"}
    resumed = train(make({**TWO_SAVED, **changes, **again}))
    assert resumed.losses == whole.losses
    first, second = read_tensors(whole.final), read_tensors(whole.output_dir / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    return whole


@pytest.mark.parametrize("peft_type", sorted(MINIMAL))
def test_each_type_trains_and_resumes(train: Any, sft_values: Any, read_tensors: Any, peft_type: str) -> None:
    adapter = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "peft_kwargs": MINIMAL[peft_type]}
    run = cut_and_resumed_equals(train, sft_values, {"peft_conf": adapter}, read_tensors)
    assert run.result.artifact.kind == "adapter"


@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, FOUR_BIT], ids=["8 bit", "4 bit"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_each_quantisation_trains_and_resumes(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, method: str, bits: dict[str, Any]
) -> None:
    changes = {
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}},
        "quant_conf": {"quantization_type": "bits-and-bytes", **bits},
        "training_args.gradient_checkpointing": True,
    }
    run = cut_and_resumed_equals(train, sft_values if method == "sft" else dpo_values, changes, read_tensors)
    if method == "dpo":
        assert run.losses[0] == pytest.approx(0.6931, abs=0.01)


@pytest.mark.parametrize("peft_type", ["IA3", "PROMPT_TUNING", "OFT", "P_TUNING", "LN_TUNING", "VERA"])
def test_preferences_through_other_adapters(train: Any, dpo_values: Any, peft_type: str) -> None:
    adapter = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "peft_kwargs": MINIMAL[peft_type]}
    run = train(dpo_values({"peft_conf": adapter, "training_args.max_steps": 2}))
    assert run.result.artifact.kind == "adapter"


def test_preferences_with_new_tokens(train: Any, dpo_values: Any, tiny_llama_dir: Any, read_tensors: Any) -> None:
    lora = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj"]}}
    changes = {"run_conf.model": str(tiny_llama_dir), "training_args.max_steps": 2, "peft_conf": lora}
    with pytest.raises(ConfigError, match=r"brings 2 new tokens.*modules_to_save: \[embed_tokens, lm_head\]"):
        train(dpo_values(changes))
    lora["peft_kwargs"]["modules_to_save"] = ["embed_tokens", "lm_head"]
    run = train(dpo_values(changes))
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-4)
    before, after = read_tensors(tiny_llama_dir), read_tensors(run.final)
    head = next(after[name] for name in after if "lm_head" in name)
    assert not torch.equal(head, before["lm_head.weight"])
