"""A saved model passes verification, or the failure is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from finetuning.config.sections.model import NewPeft
from finetuning.errors import GuardStopped, StorageError
from finetuning.export.verify import verify_saved
from finetuning.model.peft.adapter_files import adapter_state_dict
from finetuning.model.peft.adapters import AdaptedModel, apply_peft
from finetuning.model.save import save_model

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 20, 21]])


@pytest.fixture
def saved(tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path) -> Path:
    return save_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), tiny_tokenizer, tmp_path / "saved")


def lora(folder: Path, peft_type: str = "LORA", **kwargs) -> AdaptedModel:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return apply_peft(base, NewPeft(peft_type=peft_type, peft_kwargs={"target_modules": ["q_proj"], **kwargs}))


def train(model) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def change(folder: Path, name: str, **tensors) -> None:
    file = folder / name
    kept = {key: tensor for key, tensor in (load_file(file) | tensors).items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_a_saved_model_passes(saved: Path, tiny_tokenizer):
    texts = {text: tiny_tokenizer.encode(text, add_special_tokens=False) for text in ("hello", "What is two?")}
    verified = verify_saved(saved, sample_texts=texts)
    assert verified.kind == "model" and verified.num_tensors == 21
    assert "all values finite" in str(verified) and "2 texts" in str(verified)


def test_a_tied_model_passes(chatml_llama_dir: Path):
    assert verify_saved(chatml_llama_dir).num_tensors == 20


def test_experts_that_are_saved_apart_pass_and_missed_when_gone(tmp_path: Path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert "loads in plain transformers" in verify_saved(tmp_path).checks
    expert = next(name for name in load_file(tmp_path / "model.safetensors") if ".experts.3." in name)
    change(tmp_path, "model.safetensors", **{expert: None})
    with pytest.raises(GuardStopped, match=r"transformers cannot load it|are missing"):
        verify_saved(tmp_path)


def test_an_adapters_tensors_are_the_expected_ones(tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path):
    adapted = lora(tiny_llama_dir)
    train(adapted.model)
    folder = save_model(adapted.model, tiny_tokenizer, tmp_path / "adapter")
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(adapted.model).items()}
    assert "keys and shapes as expected" in verify_saved(folder, expected=shapes).checks
    with pytest.raises(GuardStopped, match="1 tensors are missing, such as another"):
        verify_saved(folder, expected=shapes | {"another": (1,)})


def test_missing_extra_misshapen_and_infinite_tensors_are_all_named(saved: Path):
    name = "model.safetensors"
    change(
        saved, name, **{"model.norm.weight": None, "lm_head.weight": torch.zeros(3, 3), "stray": torch.tensor([1.0])}
    )
    change(saved, name, **{"model.layers.0.mlp.up_proj.weight": torch.full((128, 64), float("nan"))})
    with pytest.raises(GuardStopped) as caught:
        verify_saved(saved)
    text = str(caught.value)
    assert caught.value.exit_code == 3 and len(caught.value.problems) == 4
    for part in (
        "missing, such as model.norm",
        "such as stray",
        "wrong shape, such as lm_head",
        "finite, such as model.l",
    ):
        assert part in text


def test_a_truncated_file_is_named(saved: Path):
    with (saved / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(GuardStopped, match="truncated"):
        verify_saved(saved)


def test_a_tokenizer_that_encodes_differently_is_named(saved: Path, chatml_tokenizer):
    with pytest.raises(GuardStopped, match="its tokenizer encodes 'hello'"):
        verify_saved(saved, sample_texts={"hello": [*chatml_tokenizer.encode("hello"), 3]})


@pytest.mark.parametrize("peft_type", ["LORA", "LOHA", "VERA", "LN_TUNING"])
def test_an_adapter_that_was_not_trained_is_caught(
    peft_type: str, tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path
):
    kwargs = {"target_modules": None} if peft_type == "LN_TUNING" else {"r": 4}
    adapted = lora(tiny_llama_dir, peft_type, **kwargs)
    save_model(adapted.model, tiny_tokenizer, tmp_path / "idle")
    with pytest.raises(GuardStopped, match="tensors changed in training"):
        verify_saved(tmp_path / "idle", initial=adapted.initial_digests)
    if peft_type == "LORA":
        with pytest.raises(GuardStopped, match="every lora_B of the adapter is zero"):
            verify_saved(tmp_path / "idle")
    train(adapted.model)
    save_model(adapted.model, tiny_tokenizer, tmp_path / "trained")
    verified = verify_saved(tmp_path / "trained", initial=adapted.initial_digests)
    assert verified.kind == "adapter" and "adapter moved from its initial value" in verified.checks


def test_files_have_the_umasks_modes(tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path):
    before = os.umask(0o027)
    try:
        save_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), tiny_tokenizer, tmp_path / "saved")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o640}


def test_a_failed_save_leaves_nothing(tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with pytest.raises(AttributeError):
        save_model(model, None, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(StorageError, match="not empty"):
        save_model(model, tiny_tokenizer, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_model_whose_sampling_settings_are_off_is_saved(tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.generation_config.temperature = 0.6
    original = model.generation_config
    saved = save_model(model, tiny_tokenizer, tmp_path / "saved")
    assert model.generation_config is original and not original.do_sample
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert again.generation_config.do_sample and torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(saved).eos_token == "</s>"
