"""Adapters: what is trained, saved and loaded, and how errors are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_types import MINIMAL, QV
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.config.sections.model import NewPeft, NoPeft, PretrainedPeft, RunConfig
from finetuning.errors import ModelError
from finetuning.model import fingerprint
from finetuning.model.load import load_model
from finetuning.model.peft.adapter_files import adapter_digests
from finetuning.model.peft.adapters import NEEDS_TASK_IDS, apply_peft, make_peft_config
from finetuning.model.save import save_model

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 20, 21], [1, 5, 6, 7, 30, 31, 32, 33]])


def conf(peft_type: str, **peft_kwargs) -> NewPeft:
    return NewPeft(peft_type=peft_type, peft_kwargs=peft_kwargs)


@pytest.fixture
def model(tiny_llama_dir: Path):
    return load_model(RunConfig(model=str(tiny_llama_dir)))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model, steps: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_matrix_is_all_of_peft():
    assert {member.value for member in PeftType} == {*MINIMAL, *NEEDS_TASK_IDS, "XLORA"}


@pytest.mark.parametrize("peft_type", sorted(MINIMAL))
def test_every_type_trains_saves_and_loads_again(peft_type: str, model, tiny_llama_dir: Path, tmp_path: Path):
    torch.manual_seed(0)
    adapted = apply_peft(model, conf(peft_type, **MINIMAL[peft_type]), total_steps=10)
    assert (
        0 < adapted.trainable_parameters < adapted.total_parameters and adapted.peft_config.peft_type.value == peft_type
    )
    assert f"{peft_type} adapter: {adapted.trainable_parameters:,} of {adapted.total_parameters:,}" in str(adapted)
    assert adapter_digests(adapted.model) == adapted.initial_digests
    losses = train(adapted.model)
    assert all(torch.tensor(losses).isfinite())
    assert adapter_digests(adapted.model) != adapted.initial_digests
    save_model(adapted.model, AutoTokenizer.from_pretrained(tiny_llama_dir), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted.model))


def test_xlora_mixes_trained_adapters(model, tiny_llama_dir: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    first = apply_peft(model, conf("LORA", r=4, **QV))
    train(first.model)
    save_model(first.model, tokenizer, tmp_path / "lora")
    base = load_model(RunConfig(model=str(tiny_llama_dir)))
    adapted = apply_peft(base, conf("XLORA", adapters={"0": str(tmp_path / "lora")}))
    train(adapted.model)
    save_model(adapted.model, tokenizer, tmp_path / "xlora")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, use_cache=False)
    again = PeftModel.from_pretrained(plain, tmp_path / "xlora")
    assert torch.allclose(logits(again), logits(adapted.model))


@pytest.mark.parametrize("peft_type", NEEDS_TASK_IDS)
def test_types_that_need_task_ids_are_refused(peft_type: str, model):
    with pytest.raises(ModelError, match=f"{peft_type} needs a task id with each row"):
        apply_peft(model, conf(peft_type))


@pytest.mark.parametrize(
    "extra",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"alora_invocation_tokens": [5, 6]},
    ],
    ids=lambda extra: "-".join(map(str, extra)),
)
def test_variants_of_lora_attach_and_train(extra: dict, model):
    adapted = apply_peft(model, conf("LORA", r=4, **QV, **extra))
    assert all(torch.tensor(train(adapted.model)).isfinite())
    assert adapter_digests(adapted.model) != adapted.initial_digests


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear"], ["lm_head", "all-linear"]])
def test_all_linear_is_all_but_the_output_layer(targets, model):
    adapted = apply_peft(model, conf("LORA", r=2, target_modules=targets))
    names = {name.rpartition(".lora_A")[0].rpartition(".")[2] for name in adapted.initial_digests if ".lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_all_weights_are_trained_without_an_adapter(model):
    adapted = apply_peft(model, NoPeft(peft_type="NO_PEFT"))
    assert adapted.trainable_parameters == adapted.total_parameters == sum(p.numel() for p in model.parameters())
    assert adapted.peft_config is None and "all weights" in str(adapted)


@pytest.mark.parametrize(
    ("peft_type", "kwargs", "message"),
    [
        ("LORRA", {}, r"no adapter type 'LORRA'.*Did you mean LORA"),
        ("LORA", {"rank": 4}, r"peft_kwargs\.rank: LORA has no argument 'rank'\. ?.*|no argument 'rank'"),
        ("LORA", {"lora_alhpa": 4}, r"Did you mean lora_alpha\?"),
        ("LORA", {"target_modules": ["q_prj"]}, r"no module 'q_prj'.*Did you mean q_proj"),
        ("LORA", {"target_modules": ["Wqkv", "zzz"]}, r"no module 'Wqkv'.*down_proj"),
        ("LORA", {"target_modules": r".*\.q_prj"}, r"matches no module.*whole name"),
        ("LORA", {"target_modules": "(q_proj"}, "not a valid regular expression"),
        ("LORA", {"r": 0, **QV}, "rejects the arguments of LORA: .*r.*positive"),
        ("PREFIX_TUNING", {}, "rejects the arguments of PREFIX_TUNING"),
    ],
)
def test_wrong_arguments_are_one_message(peft_type: str, kwargs: dict, message: str, model):
    with pytest.raises(ModelError, match=message):
        apply_peft(model, conf(peft_type, **kwargs))


@pytest.fixture
def adapter(model, tiny_llama_dir: Path, tmp_path: Path) -> Path:
    adapted = apply_peft(model, conf("LORA", r=4, **QV))
    train(adapted.model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    base = fingerprint.compute_fingerprint(tiny_llama_dir)
    return save_model(adapted.model, tokenizer, tmp_path / "adapter", base_fingerprint=base)


def pretrained(path: Path | str) -> PretrainedPeft:
    return PretrainedPeft(peft_type="PRETRAINED_PEFT", name_or_path=str(path))


def test_a_saved_adapter_is_trained_further(adapter: Path, tiny_llama_dir: Path):
    base = load_model(RunConfig(model=str(tiny_llama_dir)))
    adapted = apply_peft(base, pretrained(adapter))
    saved = load_file(adapter / "adapter_model.safetensors")
    assert set(adapted.initial_digests) == set(saved) and adapted.trainable_parameters == sum(
        t.numel() for t in saved.values()
    )
    train(adapted.model)
    assert all(
        now != then
        for now, then in zip(adapter_digests(adapted.model).values(), adapted.initial_digests.values(), strict=True)
    )


def test_an_adapter_of_another_base_is_refused(adapter: Path, chatml_llama_dir: Path, tmp_path: Path):
    another = load_model(RunConfig(model=str(chatml_llama_dir)))
    with pytest.raises(ModelError, match="trained on another base model"):
        apply_peft(another, pretrained(adapter))
    (adapter / fingerprint.FINGERPRINT_FILE).unlink()
    assert apply_peft(another, pretrained(adapter)).trainable_parameters > 0


@pytest.mark.parametrize("change", ["fewer", "more"])
def test_an_adapter_of_other_depth_is_refused(change: str, adapter: Path, tiny_llama_dir: Path):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if change == "fewer":
        tensors = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
        message = "does not have .*layers.1"
    else:
        tensors |= {name.replace(".layers.1.", ".layers.2."): t.clone() for name, t in tensors.items() if ".1." in name}
        message = "tensors that this model does not use: .*layers.2"
    save_file(tensors, file, metadata={"format": "pt"})
    # Adapters of other programs have no fingerprint of their own.
    (adapter / "adapter_fingerprint.json").unlink()
    with pytest.raises(ModelError, match=message):
        apply_peft(load_model(RunConfig(model=str(tiny_llama_dir))), pretrained(adapter))


def test_what_is_no_adapter_is_refused(tiny_llama_dir: Path, adapter: Path, model, tmp_path: Path):
    with pytest.raises(ModelError, match=r"peft_conf\.name_or_path: .*contains no adapter"):
        apply_peft(model, pretrained(tiny_llama_dir))
    with pytest.raises(ModelError, match="there is no folder"):
        apply_peft(model, pretrained(tmp_path / "nothing"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled adapter"):
        apply_peft(model, pretrained(adapter))


def test_a_target_that_matches_nothing_among_others_is_a_warning(
    chatml_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
    make_peft_config(model, NewPeft(peft_type="LORA", peft_kwargs={"target_modules": ["q_proj", "embed_token"]}))
    (message,) = [record.message for record in caplog.records if "no module" in record.message]
    assert "target_modules" in message
    assert "no module 'embed_token', which is ignored. Did you mean embed_tokens" in message
