from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_types import LORA_KINDS, LORA_OF_GPT2

from finetuning.errors import GuardStopped
from finetuning.export.merge.merge import MergeResult, merge_adapters


def lora(**arguments: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **arguments)


def loha() -> Any:
    from peft import LoHaConfig

    return LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def merged_by_peft(base: Path, adapters: list[Path], folder: Path) -> Path:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    model.save_pretrained(folder)
    return folder


def assert_same_bits(ours: Path, theirs: Path) -> None:
    import torch

    actual, expected = tensors(ours), tensors(theirs)
    assert set(actual) == set(expected)
    differing = [
        name
        for name in actual
        if actual[name].dtype != expected[name].dtype or not torch.equal(actual[name], expected[name])
    ]
    assert differing == []


def merge(base: Path, adapters: list[Path], out: Path, **options: Any) -> MergeResult:
    return merge_adapters(str(base), [str(adapter) for adapter in adapters], out, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LORA_KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_streaming_gives_the_bits_of_peft(
    kind: str,
    dtype: str,
    tied: bool,
    tiny_llama_dir: Path,
    chatml_llama_dir: Path,
    copy_in_dtype: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = copy_in_dtype(chatml_llama_dir if tied else tiny_llama_dir, dtype)
    adapter = make_adapter(base, lora(**LORA_KINDS[kind]), tmp_path / "adapter")
    result = merge(base, [adapter], tmp_path / "out")
    assert result.streamed
    assert result.verification is not None and result.verification.passed
    if tied and kind in ("head and embeddings", "dora embeddings"):
        # PEFT adds both deltas to the one tensor that both sides share, which is not the model that was trained.
        assert "lm_head.weight" in tensors(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    else:
        assert_same_bits(tmp_path / "out", merged_by_peft(base, [adapter], tmp_path / "peft"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_16_bit_numbers(
    dtype: str,
    tiny_llama_dir: Path,
    copy_in_dtype: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = copy_in_dtype(tiny_llama_dir, dtype)
    adapter = make_adapter(base, lora(**LORA_KINDS["plain"]), tmp_path / "adapter", dtype=dtype)
    merge(base, [adapter], tmp_path / "out")
    assert_same_bits(tmp_path / "out", merged_by_peft(base, [adapter], tmp_path / "peft"))


def test_adapters_are_merged_in_order(tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    kinds = ("plain", "dora", "modules to save")
    adapters = [
        make_adapter(tiny_llama_dir, lora(**LORA_KINDS[kind]), tmp_path / kind, seed=i) for i, kind in enumerate(kinds)
    ]
    merge(tiny_llama_dir, adapters, tmp_path / "out")
    assert_same_bits(tmp_path / "out", merged_by_peft(tiny_llama_dir, adapters, tmp_path / "peft"))


def test_shards_index_and_auxiliary_files_are_kept(
    chatml_llama_dir: Path, copy_in_dtype: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = copy_in_dtype(chatml_llama_dir, "bfloat16")
    adapter = make_adapter(base, lora(**LORA_KINDS["plain"]), tmp_path / "adapter")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    merge(base, [adapter], tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == sorted(p.name for p in base.glob("*.safetensors"))
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text())["weight_map"] == json.loads((base / index).read_text())["weight_map"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 1]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes() or name == "config.json"
    verification = json.loads((out / "merge_verification.json").read_text())
    assert verification["passed"] and verification["dtype"] == "bfloat16"
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def test_the_tokenizer_of_the_adapter_comes_first(
    tiny_llama_dir: Path, chatml_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(**LORA_KINDS["plain"]), tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_bytes((chatml_llama_dir / name).read_bytes())
    merge(tiny_llama_dir, [adapter], tmp_path / "mine", verify=False)
    merge(tiny_llama_dir, [adapter], tmp_path / "given", verify=False, tokenizer=str(tiny_llama_dir))
    source = {"mine": chatml_llama_dir, "given": tiny_llama_dir}
    for name, folder in source.items():
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "mine" / "chat_template.jinja").is_file()


@pytest.mark.parametrize("kind", LORA_OF_GPT2)
def test_gpt2_and_its_transposed_layers(
    kind: str, base_of: Callable[[str], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("gpt2")
    adapter = make_adapter(base, lora(r=4, **LORA_OF_GPT2[kind]), tmp_path / "adapter")
    assert merge(base, [adapter], tmp_path / "out").streamed
    assert_same_bits(tmp_path / "out", merged_by_peft(base, [adapter], tmp_path / "peft"))


def test_a_checkpoint_of_the_bare_model(
    base_of: Callable[[str], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(base_of("gpt2"), tmp_path / "gpt2")
    file = base / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    adapter = make_adapter(base, lora(r=4, **LORA_OF_GPT2["own biases"]), tmp_path / "adapter")
    assert merge(base, [adapter], tmp_path / "out").streamed
    assert "h.0.attn.c_attn.weight" in tensors(tmp_path / "out")


def test_a_grown_vocabulary(
    tiny_llama_dir: Path, chatml_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for base, names in (
        (tiny_llama_dir, ("model.embed_tokens", "lm_head")),
        (chatml_llama_dir, ("model.embed_tokens",)),
    ):
        adapter = make_adapter(base, lora(r=4, target_modules=["v_proj"]), tmp_path / base.name / "adapter")
        file = adapter / "adapter_model.safetensors"
        weights = load_file(base / "model.safetensors")
        grown = {n: torch.cat([weights[f"{n}.weight"], torch.ones(2, 64)]) for n in names}
        save_file(
            {**load_file(file), **{f"base_model.model.{n}.weight": t for n, t in grown.items()}}, file, {"format": "pt"}
        )
        out = tmp_path / base.name / "out"
        verification = merge(base, [adapter], out).verification
        assert verification is not None and verification.passed
        rows = len(grown["model.embed_tokens"])
        assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.get_output_embeddings().weight.shape[0] == model.get_input_embeddings().weight.shape[0] == rows


LOST = r"rounding to the base's dtype loses what the adapter changes: of [\d,]+ changed .* \([\d.]+%\) still differ"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["streamed", "by PEFT"])
def test_an_adapter_lost_to_rounding_is_refused(
    tiny_llama_dir: Path,
    copy_in_dtype: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    verify: bool,
) -> None:
    base = copy_in_dtype(tiny_llama_dir, "bfloat16")
    config = lora(**LORA_KINDS["plain"]) if kind == "streamed" else loha()
    adapter = make_adapter(base, config, tmp_path / "adapter", scale=1e-6)
    with pytest.raises(GuardStopped, match=LOST):
        merge(base, [adapter], tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists()
    logged: list[str] = []
    result = merge(base, [adapter], tmp_path / "out", verify=verify, force=True, log=logged.append)
    assert result.streamed == (kind == "streamed")
    assert any(re.search(LOST, line) for line in logged)
    if verify:
        assert result.verification.surviving_share < 0.5
        assert any("rounding to bfloat16 loses" in line for line in logged)


@pytest.mark.parametrize("kind", ["plain", "dora", "by PEFT"])
@pytest.mark.parametrize("scale", [0.05, 0.003])
def test_the_share_of_changes_that_survive_rounding_is_recorded(
    tiny_llama_dir: Path,
    copy_in_dtype: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    scale: float,
) -> None:
    base = copy_in_dtype(tiny_llama_dir, "bfloat16")
    config = loha() if kind == "by PEFT" else lora(**LORA_KINDS[kind])
    adapter = make_adapter(base, config, tmp_path / "adapter", scale=scale)
    exact = copy_in_dtype(base, "float32")
    share = merge(base, [adapter], tmp_path / "out", force=True).verification.surviving_share
    merge(exact, [adapter], tmp_path / "exact", force=True)
    before, rounded, changed = tensors(base), tensors(tmp_path / "out"), tensors(tmp_path / "exact")
    num_changed = sum(int((changed[name] != before[name].float()).sum()) for name in before)
    num_surviving = sum(int((rounded[name] != before[name]).sum()) for name in before)
    assert share == pytest.approx(num_surviving / num_changed, abs=0.01)


def test_an_adapter_that_changes_nothing_in_float32_is_not_blamed_on_rounding(
    tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(**LORA_KINDS["plain"]), tmp_path / "adapter", scale=1e-8)
    logged: list[str] = []
    merge(tiny_llama_dir, [adapter], tmp_path / "out", log=logged.append)
    assert any("the adapter changes almost nothing" in line for line in logged)
    assert not any("float32" in line for line in logged)


def test_a_float32_merge_is_not_counted(
    tiny_llama_dir: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, lora(**LORA_KINDS["plain"]), tmp_path / "adapter")
    assert merge(tiny_llama_dir, [adapter], tmp_path / "out").verification.surviving_share is None
