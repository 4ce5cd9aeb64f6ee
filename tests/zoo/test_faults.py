"""Faults of single architectures that the sweep over all of them has shown."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.atomic_io import staging_path
from finetuning.config.sections.model import NewPeft, RunConfig
from finetuning.errors import GuardStopped, ModelError
from finetuning.export.merge.merge import merge_adapters
from finetuning.model.load import load_model
from finetuning.model.padding import describe_padding_error
from finetuning.model.peft.adapter_files import restore_lora_tensors
from finetuning.model.peft.adapters import make_peft_config
from finetuning.model.safetensors_io import shared_by_layers
from finetuning.model.saved_weights import load_saved_weights, restore_padding_rows
from finetuning.model.varlen_attention import check_row_lengths
from zoo.architectures import make_model, tiny_config
from zoo.harness import prepare, train

VOCABULARY = {"vocab_size": 304, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model_of(model_type: str, **fields: Any) -> Any:
    torch.manual_seed(3)
    config = tiny_config(model_type, VOCABULARY)
    config.update(fields)
    return make_model(config).eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next", "bert"])
def test_the_check_of_lengths_leaves_the_model_and_the_random_state(model_type: str) -> None:
    model = model_of(model_type).train()
    state = torch.get_rng_state()
    check_row_lengths(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_class_that_takes_some_lengths_only_is_refused(tmp_path: Path, chatml_llama_dir: Path) -> None:
    with pytest.raises(ModelError, match="ReformerModelWithLMHead cannot be trained on rows of any length"):
        check_row_lengths(model_of("reformer"))
    architecture = prepare("reformer", tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
    with pytest.raises(ModelError, match="cannot be trained on rows of any length"):
        train(architecture.values("run", "full"))


def test_padding_is_compared_on_the_side_that_is_padded() -> None:
    assert describe_padding_error(model_of("llama"), "left", 0) is None
    # Learned positions count from the start of the padding, as the trainer passes no position ids.
    assert describe_padding_error(model_of("gpt2"), "right", 0) is None
    assert "padding on the left changes the logits" in str(describe_padding_error(model_of("gpt2"), "left", 0))
    assert "padding on the right changes the logits" in str(describe_padding_error(model_of("prophetnet"), "right", 0))


@pytest.mark.parametrize(("side", "warned"), [("left", True), ("right", False)])
def test_a_padded_run_warns_where_padding_changes_its_rows(
    tmp_path: Path, chatml_llama_dir: Path, caplog: pytest.LogCaptureFixture, side: str, warned: bool
) -> None:
    architecture = prepare("gpt2", tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
    values = architecture.values("run", "full")
    values["sft_args"]["batching"] = "padded"
    values["data_conf"]["padding_side"] = side
    with caplog.at_level(logging.WARNING):
        train(values)
    assert ("set data_conf.padding_side: right" in caplog.text) is warned


def test_a_loss_that_is_not_of_the_next_token_is_not_trained_on(tmp_path: Path, chatml_llama_dir: Path) -> None:
    from zoo.harness import check

    # The class compares each logit with the token that it has seen.
    architecture = prepare("trocr", tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
    assert check(architecture, ["sft full"]) == {"sft full": "pass"}


def test_lora_tensors_that_peft_drops_are_restored(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model_of("llama"), config).save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(model_of("llama"), str(tmp_path))
    name, weight = next((name, weight) for name, weight in loaded.named_parameters() if "lora_B" in name)
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    restore_lora_tensors(loaded, tmp_path)
    assert torch.equal(dict(loaded.named_parameters())[name], expected)


def test_a_merge_has_the_tensors_that_peft_drops(tmp_path: Path, chatml_llama_dir: Path) -> None:
    from zoo.harness import check

    architecture = prepare("laguna", tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
    steps = ("sft LoRA", "merge", "resume LoRA")
    assert check(architecture, steps) == dict.fromkeys(steps, "pass")


@pytest.mark.parametrize(
    ("model_type", "note"),
    [
        ("bart", "only prompts of equal length share a batch"),
        ("rwkv", "each prompt is a batch of its own"),  # Its cache mixes the rows of a batch.
        ("llama", ""),
    ],
)
def test_a_batch_answers_like_each_prompt_alone(
    tmp_path: Path, chatml_llama_dir: Path, model_type: str, note: str
) -> None:
    from zoo.harness import _generate, save_base

    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    architecture = prepare(model_type, tmp_path, tokenizer)
    save_base(model_type, tmp_path / "base", tokenizer)
    _generate(architecture, tmp_path / "base")
    assert architecture.notes["generate"].endswith(note)
    assert bool(architecture.notes["generate"]) is bool(note)


def test_the_padding_row_that_transformers_zeroes_is_restored(tmp_path: Path) -> None:
    model = model_of("youtu")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0.5
    model.save_pretrained(tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    if plain.model.embed_tokens.weight[0].any():
        pytest.fail("transformers loads the row: `restore_padding_rows` can be removed")
    loaded: Any = load_model(RunConfig(model=str(tmp_path)))
    assert (loaded.model.embed_tokens.weight[0] == 0.5).all()
    resumed = model_of("youtu")
    load_saved_weights(resumed, tmp_path)
    assert (resumed.model.embed_tokens.weight[0] == 0.5).all()


def test_a_padding_row_that_is_zero_in_the_file_stays_zero(tmp_path: Path) -> None:
    model = model_of("llama")
    assert not model.model.embed_tokens.weight[0].any()
    model.save_pretrained(tmp_path)
    assert restore_padding_rows(model, tmp_path) == []
    assert not model.model.embed_tokens.weight[0].any()


def test_a_class_whose_padding_row_is_zeroed_resumes(tmp_path: Path, chatml_llama_dir: Path) -> None:
    from zoo.harness import check

    architecture = prepare("youtu", tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
    steps = ("sft full", "resume full")
    assert check(architecture, steps) == dict.fromkeys(steps, "pass")


def test_layers_that_share_a_weight_are_not_those_of_a_base_with_fewer_layers() -> None:
    stored = ["model.layers.0.mamba.weight", "model.layers.1.mamba.weight", "model.layers.0.shared.q_proj.weight"]
    names = [f"model.layers.{layer}.shared.q_proj.weight" for layer in range(3)]
    assert shared_by_layers(names, stored) == ["model.layers.1.shared.q_proj.weight"]


@pytest.fixture
def experts_in_bfloat16(tmp_path: Path, chatml_llama_dir: Path) -> tuple[Path, Path]:
    """A mixture of experts in bfloat16, and an adapter of all its layers."""
    from peft import get_peft_model

    from zoo.harness import save_base

    base = tmp_path / "base"
    save_base("mixtral", base, AutoTokenizer.from_pretrained(chatml_llama_dir))
    AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").save_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
    conf = NewPeft(peft_type="LORA", peft_kwargs={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    torch.manual_seed(0)
    adapted = get_peft_model(model, make_peft_config(model, conf))
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_a_merge_whose_rounding_exchanges_experts_is_not_refused(
    tmp_path: Path, experts_in_bfloat16: tuple[Path, Path]
) -> None:
    base, adapter = experts_in_bfloat16
    verification = merge_adapters(str(base), [str(adapter)], tmp_path / "out").verification
    assert verification is not None and verification.passed
    assert verification.rounding_noise is not None, "the tolerance alone refuses it: choose another seed if it does not"


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.v_proj.weight", "down_proj of an expert"])
def test_a_merge_of_experts_that_leaves_something_out_is_refused(
    tmp_path: Path, experts_in_bfloat16: tuple[Path, Path], lost: str
) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = experts_in_bfloat16
    original = load_file(base / "model.safetensors")
    name = lost if lost in original else next(name for name in original if ".experts.1.w2." in name)

    def damage(line: str) -> None:
        if line.startswith("verifying"):
            file = staging_path(tmp_path / "out") / "model.safetensors"
            save_file({**load_file(file), name: original[name]}, file, {"format": "pt"})

    with pytest.raises(GuardStopped, match=r"differs from the trained model.*rounding noise measured on this model"):
        merge_adapters(str(base), [str(adapter)], tmp_path / "out", log=damage)
