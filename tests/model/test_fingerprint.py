"""A base model is recognized, and another one is distinguished from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import NoQuantization
from finetuning.errors import ModelError
from finetuning.export.merge.merge import merge_adapters
from finetuning.export.vllm.convert import make_vllm_compatible
from finetuning.inference.load import load_generator
from finetuning.model.fingerprint import (
    ADAPTER_FINGERPRINT_FILE,
    FINGERPRINT_FILE,
    check_adapter_fingerprint,
    compute_fingerprint,
    describe_difference,
    read_fingerprint,
    write_adapter_fingerprint,
    write_fingerprint,
)
from finetuning.model.save import save_model


@pytest.fixture
def copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


def test_a_copy_under_another_name_is_the_same(tiny_llama_dir: Path, copy: Path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "use_cache": False}))
    assert describe_difference(compute_fingerprint(tiny_llama_dir), compute_fingerprint(copy)) is None


def test_shards_make_no_difference(tiny_llama_dir: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert describe_difference(compute_fingerprint(tiny_llama_dir), compute_fingerprint(tmp_path)) is None


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_other_weights_of_the_same_shape_are_distinguished(name: str, tiny_llama_dir: Path, copy: Path):
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name] * 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert (
        describe_difference(compute_fingerprint(tiny_llama_dir), compute_fingerprint(copy))
        == "the shapes agree but the weights differ"
    )


def test_other_shapes_and_settings_are_named(tiny_llama_dir: Path, chatml_llama_dir: Path, copy: Path):
    original = compute_fingerprint(tiny_llama_dir)
    assert "tensors" in describe_difference(original, compute_fingerprint(chatml_llama_dir))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert "config.json differs" in describe_difference(original, compute_fingerprint(copy))
    weights = {name: t.to(torch.bfloat16) for name, t in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "dtypes" in describe_difference(original, compute_fingerprint(copy))


def test_it_is_written_and_read_again(tiny_llama_dir: Path, tmp_path: Path):
    assert read_fingerprint(tmp_path) is None
    original = compute_fingerprint(tiny_llama_dir)
    write_fingerprint(original, tmp_path)
    assert read_fingerprint(tmp_path) == original
    (tmp_path / FINGERPRINT_FILE).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_fingerprint(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        compute_fingerprint(tmp_path)


@pytest.mark.parametrize("position", [0, 7, 50_000, -1])
@pytest.mark.parametrize("hashed_bytes", [2**28, 0], ids=["every byte", "samples and sums"])
def test_one_changed_value_of_a_tensor_is_seen(
    tiny_llama_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, hashed_bytes: int, position: int
):
    monkeypatch.setattr("finetuning.model.fingerprint._MAX_HASHED_BYTES", hashed_bytes)
    original = compute_fingerprint(tiny_llama_dir)
    assert describe_difference(original, compute_fingerprint(copy)) is None
    weights = load_file(copy / "model.safetensors")
    # The largest tensor: most of its bytes are outside of the samples.
    name = max(weights, key=lambda key: weights[key].numel())
    values = weights[name].view(-1)
    values[position % len(values)] = torch.nextafter(values[position % len(values)], torch.tensor(10.0))
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert describe_difference(original, compute_fingerprint(copy)) == "the shapes agree but the weights differ"


def test_a_fingerprint_of_an_earlier_version_is_compared_by_its_samples(tiny_llama_dir: Path, copy: Path):
    recorded = replace(compute_fingerprint(tiny_llama_dir), content="")
    assert describe_difference(recorded, compute_fingerprint(copy)) is None
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] *= 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert describe_difference(recorded, compute_fingerprint(copy)) == "the shapes agree but the weights differ"


@pytest.fixture
def adapter(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir), LoraConfig(r=4, init_lora_weights=False)
    )
    return save_model(model, AutoTokenizer.from_pretrained(tiny_llama_dir), tmp_path / "adapter")


def change_one_value(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] += 1e-3
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def remove_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def change_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))


ADAPTER_FAULTS = {
    change_one_value: r"adapter_model.safetensors is not what was saved: .*lora_A.*differ.*delete adapter_fingerprint",
    remove_a_tensor: r"adapter_model.safetensors is not what was saved: .*lora_A",
    change_alpha: r"adapter_config.json is not what was saved",
    lambda folder: (folder / ADAPTER_FINGERPRINT_FILE).write_text("{"): r"adapter_fingerprint.json cannot be read",
    lambda folder: (folder / ADAPTER_FINGERPRINT_FILE).write_text('{"config": "", "tensors": 3}'): r"cannot be read",
}


def merge(adapter: Path, base: Path, out: Path) -> None:
    merge_adapters(str(base), [str(adapter)], out, verify=False)


def convert(adapter: Path, base: Path, out: Path) -> None:
    make_vllm_compatible(adapter, base_name=str(base), output=out)


def load(adapter: Path, base: Path, out: Path) -> None:
    load_generator(GenerationModel(model=str(base), adapter=str(adapter)), NoQuantization())


@pytest.mark.parametrize("use", [merge, convert, load])
@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_an_adapter_that_changed_after_it_was_saved_is_refused(
    adapter: Path, tiny_llama_dir: Path, tmp_path: Path, use: Callable[..., None], fault: Callable[[Path], object]
):
    fault(adapter)
    with pytest.raises(ModelError, match=ADAPTER_FAULTS[fault]):
        use(adapter, tiny_llama_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", [merge, convert, load])
def test_an_adapter_without_a_fingerprint_or_with_another_base_path_is_used(
    adapter: Path, tiny_llama_dir: Path, tmp_path: Path, use: Callable[..., None]
):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    use(adapter, tiny_llama_dir, tmp_path / "out")
    (adapter / ADAPTER_FINGERPRINT_FILE).unlink()
    change_one_value(adapter)
    use(adapter, tiny_llama_dir, tmp_path / "without")


@pytest.mark.parametrize("use", [merge, convert, load])
def test_a_fingerprint_that_is_gone_is_said(
    adapter: Path, tiny_llama_dir: Path, tmp_path: Path, use: Callable[..., None], caplog: pytest.LogCaptureFixture
):
    write_fingerprint(compute_fingerprint(tiny_llama_dir), adapter)
    (adapter / ADAPTER_FINGERPRINT_FILE).unlink()
    use(adapter, tiny_llama_dir, tmp_path / "out")
    assert f"{ADAPTER_FINGERPRINT_FILE} is missing: the adapter was not compared with what was saved" in caplog.text


def test_a_converted_adapter_has_a_fingerprint_of_its_own(adapter: Path, tiny_llama_dir: Path, tmp_path: Path):
    # A copy of the base's head is dropped by the conversion.
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = load_file(tiny_llama_dir / "model.safetensors")["lm_head.weight"]
    tensors["base_model.model.lm_head.weight"] = head.clone()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    write_adapter_fingerprint(adapter)
    convert(adapter, tiny_llama_dir, tmp_path / "out")
    assert check_adapter_fingerprint(tmp_path / "out")
    assert (adapter / ADAPTER_FINGERPRINT_FILE).read_text() != (tmp_path / "out" / ADAPTER_FINGERPRINT_FILE).read_text()
    assert make_vllm_compatible(adapter, base_name=str(tiny_llama_dir)).changed
    assert check_adapter_fingerprint(adapter)
