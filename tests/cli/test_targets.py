"""`finetuning targets`: its counts, made without weights, match those of a loaded model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from finetuning.cli.info import targets_main
from finetuning.config.sections.model import NewPeft
from finetuning.model.peft.adapters import apply_peft


@pytest.fixture
def targets(sft_values: Any, write_config: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that returns the JSON of the subcommand for a peft_conf."""

    def run(peft_conf: dict[str, Any]) -> dict[str, Any]:
        assert targets_main([str(write_config(sft_values({"peft_conf": peft_conf}))), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    ("peft_type", "kwargs"),
    [
        ("LORA", {"r": 8, "target_modules": "all-linear"}),
        ("LORA", {"r": 2, "target_modules": ["lm_head", "all-linear"], "use_dora": True}),
        ("LORA", {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "pissa"}),
        ("LORA", {"r": 4, "target_modules": ["v_proj"], "rank_pattern": {"v_proj": 3}, "layers_to_transform": [1]}),
        ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ],
)
def test_trained_parameters_match_the_built_adapter(
    targets: Any, chatml_llama_dir: Any, peft_type: str, kwargs: dict[str, Any]
) -> None:
    summary = targets({"peft_type": peft_type, "peft_kwargs": kwargs})
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
    assert summary["parameters"] == sum(weight.numel() for weight in model.parameters())
    built = apply_peft(model, NewPeft(peft_type=peft_type, peft_kwargs=kwargs))
    assert summary["trained"] == built.trainable_parameters == sum(group["trained"] for group in summary["groups"])


def test_groups_report_the_bytes_of_the_files(targets: Any, chatml_llama_dir: Any) -> None:
    groups = {group["name"]: group for group in targets({"peft_type": "NO_PEFT"})["groups"]}
    assert groups["gate_proj"]["shapes"] == [[128, 64]]
    assert groups["gate_proj"]["count"] == 2
    assert groups["gate_proj"]["bytes"] == 4 * groups["gate_proj"]["parameters"] == 4 * 2 * 128 * 64
    assert groups["lm_head"]["parameters"] == 0, "tied to the embeddings"
    all_linear = {name for name, group in groups.items() if group["all_linear"]}
    assert all_linear == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_unknown_target_is_an_error_with_a_suggestion(
    sft_values: Any, write_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"peft_type": "LORA", "peft_kwargs": {"target_modules": ["q_projj"]}}
    assert targets_main([str(write_config(sft_values({"peft_conf": lora})))]) == 1
    assert "the model has no module 'q_projj'. Did you mean q_proj" in capsys.readouterr().err


def test_text_is_a_table(dpo_values: Any, write_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lora = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}}
    assert targets_main([str(write_config(dpo_values({"peft_conf": lora, "training_args.beta": 0.2})))]) == 0
    out = capsys.readouterr().out
    assert "peft_conf trains 512 (" in out
    assert any(line.startswith("q_proj") and line.endswith("512 in 1 of 2") for line in out.splitlines())
