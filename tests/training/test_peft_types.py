"""Every adapter of PEFT, and each quantization, through a whole run: trained, checkpointed, resumed, verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_types import MINIMAL
from matrix import sample
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetuning.errors import ConfigError
from finetuning.model.fingerprint import FINGERPRINT_FILE

TWO_SAVED = {"training_args.max_steps": 2, "training_args.save_strategy": "steps", "training_args.save_steps": 1}
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def cut_and_resumed_equals(train: Any, make: Any, changes: dict[str, Any], read_tensors: Any) -> Any:
    """The run, once its repetition from checkpoint-1 has ended with the very same tensors."""
    whole = train(make({**TWO_SAVED, **changes}))
    assert "all values finite" in whole.result.model.checks
    shutil.rmtree(whole.output_dir / "checkpoint-2")
    again = {"run_conf.final_checkpoint_name": "again", "run_conf.resume_from_checkpoint": "auto"}
    resumed = train(make({**TWO_SAVED, **changes, **again}))
    assert resumed.losses == whole.losses
    first, second = read_tensors(whole.final), read_tensors(whole.output_dir / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    return whole


# One of each kind: added to the weights or the activations, virtual tokens, norms, single tokens, shared projections,
# a rank that shrinks, a basis that is rotated, a type that keeps no separate adapter.
SAMPLE = (
    *("ADALORA", "ADAPTION_PROMPT", "IA3", "LN_TUNING", "LORA", "OFT", "OSF", "PREFIX_TUNING", "PROMPT_TUNING"),
    *("SHADOW", "TRAINABLE_TOKENS", "VERA"),
)


@pytest.mark.parametrize("peft_type", sample(sorted(MINIMAL), SAMPLE))
def test_each_type_trains_and_resumes(train: Any, sft_values: Any, read_tensors: Any, peft_type: str) -> None:
    adapter = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "peft_kwargs": MINIMAL[peft_type]}
    run = cut_and_resumed_equals(train, sft_values, {"peft_conf": adapter}, read_tensors)
    assert run.result.model.kind == "adapter"


@pytest.mark.parametrize(
    "quant_conf",
    [
        {"quantization_type": "bits-and-bytes", "load_in_8bit": True},
        {"quantization_type": "bits-and-bytes", **FOUR_BIT},
        {"quantization_type": "torchao"},
    ],
    ids=["8 bit", "4 bit", "torchao"],
)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_each_quantization_trains_and_resumes(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, method: str, quant_conf: dict[str, Any]
) -> None:
    changes = {
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}},
        "quant_conf": quant_conf,
        "training_args.gradient_checkpointing": True,
    }
    run = cut_and_resumed_equals(train, sft_values if method == "sft" else dpo_values, changes, read_tensors)
    quantization = json.loads((run.final / FINGERPRINT_FILE).read_text())["quantization"]
    assert quantization["quant_method"] == quant_conf["quantization_type"].replace("bits-and-bytes", "bitsandbytes")
    if method == "dpo":
        assert run.losses[0] == pytest.approx(0.6931, abs=0.01)


def test_a_checkpoint_that_comes_quantized_trains_adapters_only(
    train: Any, run_cli: Any, sft_values: Any, write_config: Any, chatml_llama_dir: Path, tmp_path: Path
) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(chatml_llama_dir, quantization_config=nf4).save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(chatml_llama_dir).save_pretrained(tmp_path / "nf4")
    lora = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
    changes = {"run_conf.model": str(tmp_path / "nf4")}
    run = train(sft_values({**changes, "peft_conf": lora}))
    assert run.losses[-1] < run.losses[0]
    # As a process of its own, which leaves PEFT out.
    refused = run_cli(["sft", write_config(sft_values(changes | {"training_args.output_dir": str(tmp_path / "all")}))])
    assert refused.returncode == 1
    assert "peft_conf.peft_type: quantized weights cannot be trained" in refused.stderr


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_gptq_checkpoint_trains_and_resumes(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, run_cli: Any, gptq_llama_dir: Path, method: str
) -> None:
    changes = {
        "run_conf.model": str(gptq_llama_dir),
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}},
        "training_args.gradient_checkpointing": True,
    }
    run = cut_and_resumed_equals(train, sft_values if method == "sft" else dpo_values, changes, read_tensors)
    if method == "dpo":
        assert run.losses[0] == pytest.approx(0.6931, abs=0.01)
        return
    answered = run_cli(["--model", run.final, "--text", "Hello"], program="generate", cwd=run.output_dir)
    assert answered.returncode == 0, answered.stderr
    merged = run_cli([gptq_llama_dir, run.final, run.output_dir / "merged"], program="merge_adapter")
    assert merged.returncode == 1
    assert "is quantized with gptq, which cannot be dequantized" in merged.stderr
    assert "Merge into the unquantized base model." in merged.stderr
    assert not (run.output_dir / "merged").exists()


@pytest.mark.parametrize("peft_type", ["IA3", "PROMPT_TUNING", "OFT", "P_TUNING", "LN_TUNING", "VERA"])
def test_preferences_through_other_adapters(train: Any, dpo_values: Any, peft_type: str) -> None:
    adapter = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "peft_kwargs": MINIMAL[peft_type]}
    run = train(dpo_values({"peft_conf": adapter, "training_args.max_steps": 2}))
    assert run.result.model.kind == "adapter"


def test_preferences_with_new_tokens(train: Any, dpo_values: Any, tiny_llama_dir: Any, read_tensors: Any) -> None:
    lora = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj"]}}
    changes = {"run_conf.model": str(tiny_llama_dir), "training_args.max_steps": 2, "peft_conf": lora}
    with pytest.raises(ConfigError, match=r"adds 2 tokens.*modules_to_save: \[embed_tokens, lm_head\]"):
        train(dpo_values(changes))
    lora["peft_kwargs"]["modules_to_save"] = ["embed_tokens", "lm_head"]
    run = train(dpo_values(changes))
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-4)
    before, after = read_tensors(tiny_llama_dir), read_tensors(run.final)
    head = next(after[name] for name in after if "lm_head" in name)
    assert not torch.equal(head, before["lm_head.weight"])
