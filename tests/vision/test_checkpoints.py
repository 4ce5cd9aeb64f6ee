"""A vision-language checkpoint is loaded as the class that it names, and keeps all tensors and files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from finetuning.config.sections.model import NewPeft, RunConfig
from finetuning.errors import GuardStopped, ModelError
from finetuning.export.merge.merge import merge_adapters
from finetuning.model import save
from finetuning.model.load import load_model, loading_arguments
from finetuning.model.peft.adapters import make_peft_config
from finetuning.model.vision import PROCESSOR_FILES, module_parts, outside_of
from vision.families import FAMILIES

ORDINARY = ("qwen2_5_vl", "llava")
"""Families of ordinary runs; the others are marked `full`."""
EACH = [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
TEXT_ROWS = [
    {"messages": [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]}
    for number in range(4)
]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_seen(name: str) -> bool:
    """Whether a tensor belongs to the language model."""
    return not any(part in name for part in ("vision", "visual", "project", "connector", "image_newline"))


@pytest.mark.parametrize("name", EACH)
def test_training_on_text_keeps_every_tensor_and_every_file(
    name: str, vision_values: Any, train: Any, family_dir: Any, tmp_path: Path
) -> None:
    base = family_dir(name)
    run = train(vision_values(name, TEXT_ROWS))
    before, after = tensors(base), tensors(run.final)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if not is_seen(key))
    assert any(not torch.equal(after[key], before[key]) for key in before if is_seen(key))
    kept = [file for file in PROCESSOR_FILES if (base / file).is_file()]
    assert len(kept) > 1
    assert [(run.final / file).read_bytes() for file in kept] == [(base / file).read_bytes() for file in kept]
    config = json.loads((run.final / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == json.loads((base / "config.json").read_text(encoding="utf-8"))["architectures"]

    adapter = train(
        vision_values(name, TEXT_ROWS, {"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "a")})
    )
    trained = load_file(adapter.final / "adapter_model.safetensors")
    assert trained
    assert all(map(is_seen, trained))
    merge_adapters(str(base), [str(adapter.final)], tmp_path / "merged")
    merged = tensors(tmp_path / "merged")
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[key], before[key]) for key in before if not is_seen(key))
    assert all((tmp_path / "merged" / file).is_file() for file in kept)


def test_a_processor_that_is_not_the_base_models_is_not_published(
    family_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family_dir("llava")
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    save.save_model(model, tokenizer, tmp_path / "whole")
    write = save.write_companion_files

    def write_and_tamper(tokenizer: Any, folder: Path, **options: Any) -> None:
        write(tokenizer, folder, **options)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))

    monkeypatch.setattr(save, "write_companion_files", write_and_tamper)
    with pytest.raises(GuardStopped, match=r"preprocessor_config\.json is not the base model's"):
        save.save_model(model, tokenizer, tmp_path / "tampered")
    assert not (tmp_path / "tampered").exists()


@pytest.mark.parametrize("name", EACH)
def test_each_parameter_belongs_to_one_part_and_adapters_go_where_they_are_asked_to(name: str, family_dir: Any) -> None:
    model = load_model(RunConfig(model=str(family_dir(name))))
    assert type(model) is type(AutoModelForImageTextToText.from_pretrained(family_dir(name)))
    parts = module_parts(model)
    assert {parts[key] for key, _ in model.named_parameters()} == {"language_model", "projector", "vision_tower"}
    assert all((parts[key] == "language_model") == is_seen(key) for key, _ in model.named_parameters())
    all_linear = NewPeft(peft_type="LORA", peft_kwargs={"r": 2, "target_modules": "all-linear"})
    everywhere = make_peft_config(model, all_linear, parts=["language_model", "projector", "vision_tower"])
    assert outside_of(model, ["language_model", "projector", "vision_tower"]) is None
    language = make_peft_config(model, all_linear)
    adapted = {parts[key] for key, _ in matched(model, language)}
    assert adapted == {"language_model"}
    assert {parts[key] for key, _ in matched(model, everywhere)} >= {"language_model", "vision_tower"}


def test_layers_next_to_an_image_encoder_are_the_language_model() -> None:
    from transformers import GitConfig, GitForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = GitForCausalLM(GitConfig(**sizes, vocab_size=9, vision_config={**sizes, "image_size": 32}))
    parts = module_parts(model)
    assert parts["git.encoder.layer.0.attention.self.query"] == parts["output"] == "language_model"
    assert parts["git.visual_projection.visual_projection.0"] == "projector"
    outside = outside_of(model, ["language_model"])
    assert outside is not None and re.fullmatch(outside, "git.image_encoder.vision_model.encoder.layers.0.mlp.fc1")
    assert not re.fullmatch(outside, "git.encoder.layer.0.output.dense")


def matched(model: Any, config: Any) -> list[tuple[str, Any]]:
    """The linear layers that PEFT adapts."""
    from peft import get_peft_model

    adapted = get_peft_model(model, config).get_base_model()
    layers = [(name, module) for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    parts = [(name, module) for name, module in layers if name]
    adapted.peft_config = {}
    model_copy = [(name, module.base_layer) for name, module in parts]
    for name, base in model_copy:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, base)
    return parts


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("BertForMaskedLM", "a masked language model"),
        ("LlamaForSequenceClassification", "a classifier"),
        ("LlamaForTokenClassification", "a classifier"),
        ("Qwen2AudioForConditionalGeneration", "a model that takes sound"),
    ],
)
def test_other_classes_are_refused_by_name(
    chatml_llama_dir: Path, tmp_path: Path, architecture: str, what: str
) -> None:
    folder = shutil.copytree(chatml_llama_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"{what}.* \({architecture}\), which the engine does not train"):
        loading_arguments(RunConfig(model=str(folder)))


def test_an_encoder_decoder_is_refused(chatml_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import T5Config

    folder = shutil.copytree(chatml_llama_dir, tmp_path / "model")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(T5ForConditionalGeneration\)"):
        loading_arguments(RunConfig(model=str(folder)))


def test_training_the_projector_moves_it_and_nothing_else(
    vision_values: Any, train: Any, family_dir: Any, picture_rows: list[dict[str, Any]]
) -> None:
    run = train(vision_values("llava", picture_rows, {"run_conf.train_parts": ["projector"]}))
    before, after = tensors(family_dir("llava")), tensors(run.final)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert moved
    assert all("multi_modal_projector" in key for key in moved)
