"""Module names in `peft_kwargs` are compared with the model before its weights load, by `--dry-run` too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.cli.main import main
from finetuning.cli.merge_adapter import main as merge

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "gate", "w2", "w3"]
"""The targets of an official Mixtral recipe for transformers 4, whose experts were modules."""


def lora(**kwargs: Any) -> dict[str, Any]:
    return {"peft_conf": {"peft_type": "LORA", "peft_kwargs": {**LORA, **kwargs}}}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], write_config: Any) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `finetuning sft` on values in this process: exit code, stdout, stderr."""

    def run(values: dict[str, Any], *options: str) -> tuple[int, str, str]:
        code = main(["sft", str(write_config(values)), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Path:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(chatml_llama_dir)
    config = MixtralConfig(
        vocab_size=504,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kwargs", "warning"),
    [
        ({"target_modules": ["q_proj", "embed_token"]}, "target_modules: the model has no module 'embed_token'"),
        ({"rank_pattern": {"q_proj": 1, "k_proj": 3}}, "rank_pattern: the model has no targeted module 'k_proj'"),
        ({"alpha_pattern": {"q_prj": 1}}, "alpha_pattern: the model has no targeted module 'q_prj'"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: the model has no module 'lm_haed'"),
        ({"exclude_modules": ["layer.0"]}, "exclude_modules: the model has no module 'layer.0'"),
        ({"exclude_modules": r".*\.layer\.0\..*"}, r"exclude_modules: the model has no module '.*\\.layer\\.0"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform: no targeted module is in layer 7, which is ignored"),
        ({"target_parameters": ["down_proj.weight", "w"]}, "target_parameters: the model has no parameter 'w'"),
    ],
)
def test_a_name_that_matches_nothing_is_a_warning_at_plan_time(
    say: Any, sft_values: Any, kwargs: dict[str, Any], warning: str
) -> None:
    code, out, err = say(sft_values(lora(**kwargs)), "--dry-run")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "the model has no" in line or "no targeted module" in line]
    assert line.startswith("warning: ") and "config.yaml:" in line and warning in line
    assert "No problem was found" in out


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"target_modules": ["qproj", "vproj"]}, "the model has no module 'qproj', 'vproj'. Did you mean q_proj"),
        ({"target_modules": r".*\.qproj"}, "matches no module of the model. It must match a whole name"),
        ({"target_modules": "(q_proj"}, "'(q_proj' is not a valid regular expression"),
        ({"rank_pattern": {"q_proj(": 2}}, "is not a valid regular expression"),
        ({"layers_to_transform": [5, 6]}, "no targeted module is in the layers [5, 6]. They are in the layers 0 to 1"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "PEFT rejects the arguments of LORA"),
    ],
)
def test_targets_that_match_nothing_are_refused_before_rows_and_weights(
    say: Any, sft_values: Any, tmp_path: Path, kwargs: dict[str, Any], error: str, options: list[str]
) -> None:
    code, _, err = say(sft_values(lora(**kwargs)), *options)
    assert code == 1 and error in err
    assert "config.yaml:" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_lora_bias_that_no_weights_can_hold_is_refused(
    say: Any, sft_values: Any, mixtral_dir: Path, options: list[str]
) -> None:
    values = sft_values({**lora(lora_bias=True), "run_conf.model": str(mixtral_dir)})
    code, _, err = say(values, *options)
    assert code == 1 and "config.yaml:" in err
    assert "peft_conf.peft_kwargs.lora_bias: MixtralForCausalLM has no bias in model.layers.0.self_attn.q_proj" in err


def test_a_lora_bias_that_a_field_of_the_config_allows_is_no_problem(say: Any, sft_values: Any) -> None:
    for targets in (["q_proj"], "all-linear"):
        code, out, err = say(sft_values(lora(lora_bias=True, target_modules=targets)), "--dry-run")
        assert code == 0 and "No problem was found" in out, err


def test_a_run_warns_of_a_name_once(say: Any, sft_values: Any) -> None:
    code, _, err = say(sft_values(lora(target_modules=["q_proj", "embed_token"])))
    assert code == 0, err
    assert err.count("embed_token'") == 1


def test_a_model_that_is_not_on_this_machine_is_not_looked_up(say: Any, sft_values: Any) -> None:
    values = sft_values({**lora(target_modules=["q_prj"]), "run_conf.model": "nobody/nothing"})
    code, out, err = say(values, "--dry-run")
    assert code == 0, err
    assert "not checked        model files: nobody/nothing is not a local folder" in out


def test_a_model_without_safetensors_is_looked_up_by_its_config(
    say: Any, sft_values: Any, tmp_path: Path, chatml_llama_dir: Path
) -> None:
    folder = tmp_path / "config-only"
    shutil.copytree(chatml_llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    code, _, err = say(sft_values({**lora(target_modules=["q_prj"]), "run_conf.model": str(folder)}), "--dry-run")
    assert code == 1 and "no module 'q_prj'. Did you mean q_proj" in err


def test_experts_are_trained_as_peft_does_and_shown(
    say: Any, sft_values: Any, mixtral_dir: Path, tmp_path: Path, read_tensors: Any
) -> None:
    values = sft_values({**lora(target_modules=EXPERTS), "run_conf.model": str(mixtral_dir)})
    fused = "gate, w1, w2, w3: trained in the model's fused parameters down_proj, gate.weight, gate_up_proj"
    code, out, err = say(values, "--dry-run")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("adapter ")]
    assert fused in line
    planned = line.split()[1]

    code, out, err = say(values)
    assert code == 0, err
    assert "no module" not in err
    assert f"{planned} of" in out, "the plan and the run count the same trained parameters"
    final = tmp_path / "out" / "checkpoint-final"
    config = json.loads((final / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) == {"gate_up_proj", "down_proj", "gate.weight"}
    saved = read_tensors(final)
    assert sum(tensor.numel() for tensor in saved.values()) == int(planned.replace(",", ""))
    trained = [name for name, tensor in saved.items() if "experts" in name and "lora_B" in name and tensor.any()]
    assert len(trained) == 4, "two parameters in each of two layers"

    assert merge([str(mixtral_dir), str(final), str(tmp_path / "merged")]) == 0
    merged, base = read_tensors(tmp_path / "merged"), read_tensors(mixtral_dir)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any(".experts." in name for name in changed) and any("q_proj" in name for name in changed)


def test_a_part_of_fused_experts_is_refused_at_plan_time(say: Any, sft_values: Any, mixtral_dir: Path) -> None:
    values = sft_values({**lora(target_modules=["q_proj", "w1"]), "run_conf.model": str(mixtral_dir)})
    code, _, err = say(values, "--dry-run")
    assert code == 1
    assert "Cannot convert PEFT target(s) w1 without also targeting w3" in err and "config.yaml:" in err
