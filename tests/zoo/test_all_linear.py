"""`target_modules: all-linear` is what PEFT can adapt in this architecture, and the plan counts what the run trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from finetuning.config.sections.model import NewPeft
from finetuning.model.peft.adapters import make_peft_config
from zoo.architectures import make_model, tiny_config

VOCABULARY = {"vocab_size": 304, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ALL_LINEAR = NewPeft(peft_type="LORA", peft_kwargs={"r": 4, "target_modules": "all-linear", "init_lora_weights": False})


def model_of(model_type: str) -> PreTrainedModel:
    torch.manual_seed(3)
    return make_model(tiny_config(model_type, VOCABULARY)).train()


def adapted(model_type: str) -> dict[str, torch.nn.Parameter]:
    """The second factor of each layer's adapter, after one backward pass."""
    model = model_of(model_type)
    peft_model = get_peft_model(model, make_peft_config(model, ALL_LINEAR))
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    peft_model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    return {name: weight for name, weight in peft_model.named_parameters() if "lora_B" in name}


@pytest.mark.parametrize(
    "model_type",
    [
        "llama4_text",  # routers are a subclass of Linear that returns a tuple
        "phimoe",
        "deepseek_v4",  # a grouped subclass of Linear
        "mamba",  # PEFT refuses the output projections
        "falcon_h1",
        "jamba",  # the step projection is read by its weight
        "deepseek_v32",  # indexers get no gradient
        "mixtral",  # PEFT adapts fused experts, and would adapt routers
        "bart",  # cross-attention without an encoder
    ],
)
def test_every_adapter_of_all_linear_gets_a_gradient(model_type: str) -> None:
    weights = adapted(model_type)
    # A compressor of the attention works on longer texts than this one.
    untrained = [
        name
        for name, weight in weights.items()
        if (weight.grad is None or not weight.grad.any()) and "compressor" not in name
    ]
    assert weights
    assert untrained == []
    assert [name for name in weights if "router" in name or ".gate." in name] == []


def test_a_model_without_exceptions_keeps_the_plain_name() -> None:
    assert make_peft_config(model_of("llama"), ALL_LINEAR).target_modules == "all-linear"


def test_a_falcon_layer_is_adapted_though_it_is_a_subclass() -> None:
    assert any("query_key_value" in name for name in adapted("falcon"))


def test_a_text_model_leaves_out_the_vision_tower() -> None:
    targets = make_peft_config(model_of("gemma3"), ALL_LINEAR).target_modules
    assert isinstance(targets, set)
    assert not [name for name in targets if "vision" in name]
    assert any(name.endswith("q_proj") for name in targets)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "mamba", "ctrl"])
def test_the_dry_run_counts_what_the_run_trains(
    train: Any,
    sft_values: Any,
    write_config: Any,
    run_cli: Any,
    tmp_path: Path,
    chatml_llama_dir: Path,
    model_type: str,
) -> None:
    from transformers import AutoTokenizer

    from zoo.harness import save_base

    save_base(model_type, tmp_path / "base", AutoTokenizer.from_pretrained(chatml_llama_dir))
    peft = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
    values = sft_values({"run_conf.model": str(tmp_path / "base"), "peft_conf": peft, "training_args.max_steps": 1})
    printed = run_cli(["sft", write_config(values, "dry.yaml"), "--dry-run"]).stdout
    run = train(values)
    record = json.loads((run.final / "adapter_config.json").read_text(encoding="utf-8"))
    assert record["peft_type"] == "LORA"
    trained = sum(weight.numel() for weight in run.trainer.model.parameters() if weight.requires_grad)
    assert f"{trained:,} trainable" in printed


def test_experts_keep_the_configured_scaling_and_own_patterns() -> None:
    peft = NewPeft(
        peft_type="LORA",
        peft_kwargs={"r": 3, "lora_alpha": 12, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}},
    )
    config = make_peft_config(model_of("mixtral"), peft)
    assert config.target_parameters == ["down_proj", "gate_up_proj"]
    # Two fused matrices: twice the rank, and the same factor.
    assert config.rank_pattern == {r".*\.gate_up_proj": 6, "q_proj": 5}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 24}


def test_an_experts_layer_is_a_target_that_exists(caplog: pytest.LogCaptureFixture) -> None:
    peft = NewPeft(peft_type="LORA", peft_kwargs={"r": 4, "target_modules": ["q_proj", "w1", "w2", "w3"]})
    make_peft_config(model_of("mixtral"), peft)
    assert "has no module" not in caplog.text
