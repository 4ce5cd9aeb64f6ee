from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.atomic_io import write_manifest
from finetuning.errors import ModelError, StorageError
from finetuning.export.safetensors_writer import write_tensor_file
from finetuning.export.vllm.convert import (
    ORIGINAL,
    ORIGINAL_CONFIG,
    NotServableError,
    extra_layers_reason,
    make_vllm_compatible,
)
from finetuning.model.peft.adapter_files import is_servable

MakeAdapter = Callable[..., Path]


def lora(**arguments: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **arguments})


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def add_tensors(folder: Path, extra: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), **extra}, file, {"format": "pt"})


def base_tensors(base: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(base / "model.safetensors")


def logits(base: Path, adapter: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        return model(torch.arange(20).unsqueeze(0)).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_plain_adapter_is_compatible_already(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(r=24), tmp_path / "adapter")
    before = files(adapter)
    result = make_vllm_compatible(adapter)
    assert not result.changed
    after = files(adapter)
    serving = json.loads(after.pop("serving.json"))
    assert after == before
    words = shlex.split(serving["command"])
    assert words[:3] == ["vllm", "serve", str(tiny_llama_dir)]
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[words.index("--lora-modules") + 1] == f"adapter={adapter.absolute()}"


SERVED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def served_words(folder: Path) -> list[str]:
    return shlex.split(json.loads((folder / "serving.json").read_text())["command"])


def test_the_command_names_what_vllm_would_read_from_the_base(
    chatml_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(chatml_llama_dir, lora(), tmp_path / "adapter")
    for name in SERVED_FILES:
        shutil.copyfile(chatml_llama_dir / name, adapter / name)
    make_vllm_compatible(adapter)
    flags = {"--tokenizer", "--generation-config", "--chat-template"}
    assert not flags & set(served_words(adapter))
    generation = json.loads((adapter / "generation_config.json").read_text())
    (adapter / "generation_config.json").write_text(json.dumps(generation | {"transformers_version": "0"}))
    make_vllm_compatible(adapter)
    assert not flags & set(served_words(adapter))

    (adapter / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [0, 2]}))
    make_vllm_compatible(adapter)
    words = served_words(adapter)
    assert words[words.index("--generation-config") + 1] == str(adapter) and "--tokenizer" not in words

    tokenizer = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|endoftext|>"}))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    make_vllm_compatible(adapter)
    words = served_words(adapter)
    assert words[words.index("--tokenizer") + 1] == str(adapter)
    assert words[words.index("--chat-template") + 1] == f"{adapter}/chat_template.jinja"


def test_a_base_that_is_not_here_is_said(
    chatml_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(chatml_llama_dir, lora(), tmp_path / "adapter")
    for name in SERVED_FILES:
        shutil.copyfile(chatml_llama_dir / name, adapter / name)
    for named in ("/gone/base", "some/base"):
        (adapter / "adapter_config.json").write_text(
            json.dumps(read_config(adapter) | {"base_model_name_or_path": named})
        )
        (note,) = make_vllm_compatible(adapter).notes
        assert note.startswith(f"the base model {named} was not found on this machine")
        words = served_words(adapter)
        assert words[2] == named and {"--tokenizer", "--generation-config", "--chat-template"} <= set(words)
    # The same id in the hub's cache is a base to compare with.
    snapshot = tmp_path / "hub" / "models--some--base" / "snapshots" / "1"
    shutil.copytree(chatml_llama_dir, snapshot)
    (tmp_path / "hub" / "models--some--base" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--base" / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert make_vllm_compatible(adapter).notes == ()
    assert served_words(adapter)[2] == "some/base" and "--tokenizer" not in served_words(adapter)


def test_copies_of_the_base_are_dropped(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    import torch

    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    base = base_tensors(tiny_llama_dir)
    add_tensors(
        adapter,
        {
            "base_model.model.model.embed_tokens.weight": base["model.embed_tokens.weight"],
            "base_model.model.lm_head.weight": base["lm_head.weight"],
        },
    )
    config = read_config(adapter) | {"modules_to_save": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before, whole = logits(tiny_llama_dir, adapter), files(adapter)
    result = make_vllm_compatible(adapter)
    assert result.changed and len(result.dropped) == 2
    assert read_config(adapter)["modules_to_save"] is None
    assert (adapter / ORIGINAL).read_bytes() == whole["adapter_model.safetensors"]
    assert torch.equal(logits(tiny_llama_dir, adapter), before)
    assert not make_vllm_compatible(adapter).changed


def test_a_copy_leaves_the_original_alone(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    import torch

    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    add_tensors(adapter, {"base_model.model.lm_head.weight": base_tensors(tiny_llama_dir)["lm_head.weight"]})
    (adapter / "tokenizer_config.json").write_text("{}")
    before = files(adapter)
    make_vllm_compatible(adapter, output=tmp_path / "out")
    assert files(adapter) == before
    assert {"adapter_model.safetensors", "serving.json", "tokenizer_config.json"} <= set(files(tmp_path / "out"))
    assert str(tmp_path / "out") in json.loads((tmp_path / "out" / "serving.json").read_text())["command"]
    assert torch.equal(logits(tiny_llama_dir, adapter), logits(tiny_llama_dir, tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is not a LoRA tensor and differs"),
        ({"trainable_token_indices": [3, 5]}, "trainable_tokens_delta is not a LoRA tensor and differs"),
        ({"lora_bias": True, "target_modules": ["o_proj"]}, "a bias in LoRA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"r": 600, "target_modules": ["q_proj"]}, "vLLM's maximum is 512"),
    ],
)
def test_what_would_be_lost_is_refused(
    arguments: dict[str, Any], reason: str, tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(**arguments), tmp_path / "adapter")
    before = files(adapter)
    with pytest.raises(ModelError, match=reason) as caught:
        make_vllm_compatible(adapter)
    assert "Merge it instead: merge_adapter" in str(caught.value)
    assert files(adapter) == before


@pytest.mark.parametrize(
    ("architecture", "targets", "reason"),
    [
        ("LlamaForCausalLM", ["q_proj", "embed_tokens", "lm_head"], ""),
        ("MistralForCausalLM", ["q_proj"], ""),
        (
            "MistralForCausalLM",
            ["q_proj", "lm_head"],
            "lm_head is adapted, and vLLM .* does not serve that for Mistral",
        ),
        ("Qwen2ForCausalLM", ["q_proj", "embed_tokens"], "embed_tokens is adapted"),
        ("CohereForCausalLM", ["q_proj", "embed_tokens"], ""),
        ("CohereForCausalLM", ["q_proj", "lm_head"], "lm_head is adapted"),
        ("GPTJForCausalLM", ["q_proj"], "serves no LoRA on GPTJForCausalLM"),
    ],
)
def test_lora_on_embeddings_is_served_by_architecture(
    architecture: str, targets: list[str], reason: str, tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tiny_llama_dir, lora(target_modules=targets), tmp_path / "adapter")
    # As a run saves it: without the whole embeddings, which PEFT adds.
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".lora_" in name}, file)
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    assert is_servable(adapter, base) is not bool(reason)
    if reason:
        with pytest.raises(NotServableError, match=reason):
            make_vllm_compatible(adapter, base_name=str(base))
    else:
        assert not make_vllm_compatible(adapter, base_name=str(base)).changed


def test_different_factors_need_a_recent_vllm_and_the_largest_rank(
    tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(r=32, rank_pattern={"q_proj": 2, "v_proj": 4}), tmp_path / "adapter")
    result = make_vllm_compatible(adapter)
    assert not result.changed and "vLLM 0.32 serves them" in result.notes[0]
    # vLLM compares the unused r of the config with its maximum as well.
    assert "--max-lora-rank 32" in result.command


def test_another_type_is_refused(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    adapter = make_adapter(tiny_llama_dir, config, tmp_path / "adapter")
    with pytest.raises(ModelError, match="vLLM serves only LoRA, and this is IA3"):
        make_vllm_compatible(adapter)


def test_untrained_tokens_are_dropped(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(trainable_token_indices=[3, 5]), tmp_path / "adapter")
    rows = base_tensors(tiny_llama_dir)["model.embed_tokens.weight"][[3, 5]].contiguous()
    add_tensors(adapter, {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows})
    assert make_vllm_compatible(adapter).changed
    assert read_config(adapter)["trainable_token_indices"] is None


def test_patterns_with_one_factor_become_one_rank(
    tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    config = lora(r=4, lora_alpha=8, rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 16})
    adapter = make_adapter(tiny_llama_dir, config, tmp_path / "adapter")
    make_vllm_compatible(adapter, output=tmp_path / "out")
    converted = read_config(tmp_path / "out")
    assert (converted["r"], converted["lora_alpha"], converted["rank_pattern"]) == (8, 16, {})


def test_names_of_a_compiled_model_are_fixed(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    expected = logits(tiny_llama_dir, adapter)
    file = adapter / "adapter_model.safetensors"
    renamed = {
        name.replace("base_model.model.", "base_model.model._orig_mod."): t for name, t in load_file(file).items()
    }
    save_file(renamed, file, {"format": "pt"})
    assert make_vllm_compatible(adapter).changed
    assert torch.equal(logits(tiny_llama_dir, adapter), expected)


def test_the_original_is_never_overwritten(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    add_tensors(adapter, {"base_model.model.lm_head.weight": base_tensors(tiny_llama_dir)["lm_head.weight"]})
    (adapter / ORIGINAL).write_bytes(b"precious")
    before = files(adapter)
    with pytest.raises(StorageError, match="only copy"):
        make_vllm_compatible(adapter)
    assert files(adapter) == before


def test_without_the_base_nothing_is_dropped(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    add_tensors(adapter, {"base_model.model.lm_head.weight": base_tensors(tiny_llama_dir)["lm_head.weight"]})
    config = read_config(adapter) | {"base_model_name_or_path": "someone/elsewhere"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="without the base it cannot be compared"):
        make_vllm_compatible(adapter)
    assert make_vllm_compatible(adapter, base_name=str(tiny_llama_dir)).changed


def test_new_embeddings_hold_the_last_rows(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    base = base_tensors(tiny_llama_dir)
    grown = {
        f"base_model.model.{name}": torch.cat([base[name], torch.randn(3, 64)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    add_tensors(adapter, grown)
    with pytest.raises(ModelError, match="differs from the base"):
        make_vllm_compatible(adapter)
    make_vllm_compatible(adapter, output=tmp_path / "out", new_embeddings=True)
    rows = load_file(tmp_path / "out" / "new_embeddings.safetensors")
    assert torch.equal(rows["input_embeddings"], grown["base_model.model.model.embed_tokens.weight"][-3:])
    assert torch.equal(rows["output_embeddings"], grown["base_model.model.lm_head.weight"][-3:])
    assert all("lora_" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))


GROWN = ("model.embed_tokens.weight", "lm_head.weight")


def with_new_tokens(base: Path, adapter: Path, count: int = 3) -> dict[str, Any]:
    """Add embeddings with `count` new rows to an adapter, and return them by their names in the base."""
    import torch

    tensors = base_tensors(base)
    grown = {name: torch.cat([tensors[name], torch.randn(count, 64)]) for name in GROWN}
    add_tensors(adapter, {f"base_model.model.{name}": tensor for name, tensor in grown.items()})
    config = read_config(adapter) | {"modules_to_save": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return grown


@pytest.mark.parametrize("arguments", [{}, {"r": 256, "target_modules": "all-linear"}])
def test_new_embeddings_are_the_same_in_place_as_in_a_copy(
    arguments: dict[str, Any], tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """In the larger adapter the old offsets of the new rows lie within the new file."""
    import torch
    from safetensors.torch import load_file

    adapter = make_adapter(tiny_llama_dir, lora(**arguments), tmp_path / "adapter")
    grown = with_new_tokens(tiny_llama_dir, adapter)
    before = files(adapter)
    make_vllm_compatible(adapter, output=tmp_path / "copy", new_embeddings=True)
    make_vllm_compatible(adapter, new_embeddings=True)
    rows = load_file(adapter / "new_embeddings.safetensors")
    assert torch.equal(rows["input_embeddings"], grown[GROWN[0]][-3:])
    assert torch.equal(rows["output_embeddings"], grown[GROWN[1]][-3:])
    in_place, copied = files(adapter), files(tmp_path / "copy")
    assert in_place.pop(ORIGINAL) == before["adapter_model.safetensors"]
    assert in_place.pop(ORIGINAL_CONFIG) == before["adapter_config.json"]
    del in_place["serving.json"], copied["serving.json"]
    assert in_place == copied
    assert not make_vllm_compatible(adapter, new_embeddings=True).changed
    assert {**files(adapter), "serving.json": b""} == {
        **in_place,
        ORIGINAL: before["adapter_model.safetensors"],
        ORIGINAL_CONFIG: before["adapter_config.json"],
        "serving.json": b"",
    }


def extended_base(base: Path, folder: Path, count: int = 3) -> tuple[Path, list[int]]:
    """Save a base with rows for new tokens, and return its folder and the ids of the rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    size = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size + count, mean_resizing=False)
    model.save_pretrained(folder)
    return folder, list(range(size, size + count))


@pytest.mark.parametrize("in_place", [False, True])
def test_trained_rows_of_an_extended_base_become_new_embeddings_of_the_base(
    in_place: bool, tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    base, ids = extended_base(tiny_llama_dir, tmp_path / "extended")
    rows = {"embed_tokens": ids, "lm_head": ids}
    adapter = make_adapter(base, lora(trainable_token_indices=rows), tmp_path / "adapter")
    trained = load_file(adapter / "adapter_model.safetensors")
    expected = logits(base, adapter)
    out = None if in_place else tmp_path / "out"
    result = make_vllm_compatible(adapter, base_name=str(tiny_llama_dir), output=out, new_embeddings=True)
    written = load_file(result.folder / "new_embeddings.safetensors")
    name = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    assert torch.equal(written["input_embeddings"], trained[name.format("model.embed_tokens")])
    assert torch.equal(written["output_embeddings"], trained[name.format("lm_head")])
    config = read_config(result.folder)
    assert (config["trainable_token_indices"], config["base_model_name_or_path"]) == (None, str(tiny_llama_dir))
    # Tokens of the base are predicted as before.
    assert torch.equal(logits(tiny_llama_dir, result.folder), expected[..., : ids[0]])
    assert any("read by vLLM before November 2025" in note for note in result.notes)


@pytest.mark.parametrize("tokens", [[3, 5], None])
def test_rows_that_the_base_has_are_no_new_embeddings(
    tokens: list[int] | None, tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Rows of old tokens, and rows of an adapter whose base was not named without them."""
    base, ids = extended_base(tiny_llama_dir, tmp_path / "extended")
    adapter = make_adapter(base, lora(trainable_token_indices=tokens or ids), tmp_path / "adapter")
    before = files(adapter)
    with pytest.raises(NotServableError, match="has rows of tokens that the base has rows for"):
        make_vllm_compatible(adapter, base_name=str(tiny_llama_dir) if tokens else None, new_embeddings=True)
    assert files(adapter) == before


@pytest.mark.parametrize("damaged", ["adapter_model.safetensors", "new_embeddings.safetensors"])
def test_nothing_is_replaced_by_a_file_that_reads_back_differently(
    damaged: str, tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    with_new_tokens(tiny_llama_dir, adapter)
    before = files(adapter)

    def write_and_damage(file: Path, *args: Any) -> None:
        write_tensor_file(file, *args)
        if file.name == damaged:
            with file.open("r+b") as stream:
                stream.seek(-1, 2)
                stream.write(b"\x5a")

    monkeypatch.setattr("finetuning.export.vllm.convert.write_tensor_file", write_and_damage)
    with pytest.raises(StorageError, match=f"{damaged} was read back with different content"):
        make_vllm_compatible(adapter, new_embeddings=True)
    assert files(adapter) == before
    with pytest.raises(StorageError, match="read back"):
        make_vllm_compatible(adapter, output=tmp_path / "copy", new_embeddings=True)
    assert not (tmp_path / "copy").exists()


def test_nothing_is_replaced_when_the_serving_command_cannot_be_written(
    tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    with_new_tokens(tiny_llama_dir, adapter)
    (adapter / "added_tokens_info.json").write_text('{"num_new_tokens": 3, "new_embedding_size": 515}')
    config = read_config(adapter) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before = files(adapter)
    with pytest.raises(ModelError, match="does not name the base model"):
        make_vllm_compatible(adapter, new_embeddings=True)
    assert files(adapter) == before


def test_a_copy_has_no_manifest_of_the_original(
    tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    write_manifest(adapter)
    make_vllm_compatible(adapter, output=tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_new_embeddings_are_refused_where_the_base_has_them(
    tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    name = "model.embed_tokens.weight"
    add_tensors(adapter, {f"base_model.model.{name}": base_tensors(tiny_llama_dir)[name] + 1})
    (adapter / "added_tokens_info.json").write_text('{"num_new_tokens": 3, "new_embedding_size": 512}')
    with pytest.raises(ModelError, match="the base already has rows for the 3 new tokens"):
        make_vllm_compatible(adapter, output=tmp_path / "out", new_embeddings=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        ("peft_conf: {peft_type: NO_PEFT}", "trained the whole model"),
        ("peft_conf: {peft_type: LORA, peft_kwargs: {modules_to_save: [lm_head]}}", "modules_to_save trained lm_head"),
        ("peft_conf: {peft_type: LORA, peft_kwargs: {r: 4}}", None),
    ],
)
def test_the_training_config_decides(
    yaml: str, reason: str | None, tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(yaml)
    reason_found = extra_layers_reason(str(tmp_path / "config.yaml"), adapter)
    assert (reason in reason_found) if reason else reason_found is None


def test_a_resized_vocabulary_is_detected(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    content = json.loads((tiny_llama_dir / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 9999, "content": "<new>"})
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.yaml").write_text("peft_conf: {peft_type: LORA}")
    assert "vocabulary has more tokens" in extra_layers_reason(str(tmp_path / "config.yaml"), adapter)


def test_no_torch_is_imported(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    import subprocess

    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    code = (
        "import sys; from finetuning.cli.create_vllm_compatible_adapter import main;"
        " code = main([sys.argv[1]]); heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules);"
        " sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(adapter)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_truncated_file_is_reported(tiny_llama_dir: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        make_vllm_compatible(adapter)
    shutil.rmtree(adapter)
    with pytest.raises(ModelError, match="there is no folder"):
        make_vllm_compatible(adapter)
