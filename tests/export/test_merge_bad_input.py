from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuning.atomic_io import staging_path
from finetuning.cli.merge_adapter import main
from finetuning.errors import ConfigError, FinetuningError, GuardStopped, ModelError, StorageError
from finetuning.export.merge.merge import merge_adapters
from finetuning.export.merge.verification import VERIFICATION_FILE
from finetuning.export.safetensors_writer import check_free_space
from finetuning.model import fingerprint

MakeAdapter = Callable[..., Path]


def lora(**arguments: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **arguments})


def llama(folder: Path, **changes: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).save_pretrained(folder)
    return folder


def refused(kind: type[FinetuningError], text: str, base: Path, adapter: Path, out: Path, **options: Any) -> None:
    """Checks that a merge is refused with that text, and that nothing is left of it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind, match=text) as caught:
        merge_adapters(str(base), [str(adapter)], out, **options)
    assert len(caught.value.problems) == 1
    assert sorted(out.parent.iterdir()) == before


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    return make_adapter(base, lora(), tmp_path / "adapter")


def test_a_base_of_other_names(adapter: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    another = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2)).save_pretrained(another)
    refused(ModelError, "which the base does not have.* Is this the base model", another, adapter, tmp_path / "out")


def test_a_base_of_other_shapes(adapter: Path, tmp_path: Path) -> None:
    another = llama(tmp_path / "other", hidden_size=64)
    refused(
        ModelError,
        r"has shape \[64, 64\] in the base and \[32, 32\] in the adapter",
        another,
        adapter,
        tmp_path / "out",
    )


def test_a_base_of_the_same_shapes_is_known_by_its_fingerprint(adapter: Path, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fingerprint.write_fingerprint(fingerprint.compute_fingerprint(base), adapter)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    refused(ModelError, "trained on another base.*the weights differ", tmp_path / "other", adapter, tmp_path / "out")
    logged: list[str] = []
    merge_adapters(str(tmp_path / "other"), [str(adapter)], tmp_path / "out", force=True, log=logged.append)
    assert "another base" in logged[0]
    assert "another base" in json.loads((tmp_path / "out" / VERIFICATION_FILE).read_text())["base_fingerprint"]
    merge_adapters(str(base), [str(adapter)], tmp_path / "right")
    assert (
        "recorded at training" in json.loads((tmp_path / "right" / VERIFICATION_FILE).read_text())["base_fingerprint"]
    )


@pytest.mark.parametrize("layers", [1, 4])
def test_a_base_with_fewer_or_more_layers(layers: int, adapter: Path, tmp_path: Path) -> None:
    another = llama(tmp_path / "other", num_hidden_layers=layers)
    text = "does not have" if layers == 1 else "leaves out model.layers.2.self_attn.q_proj.weight"
    refused(ModelError, text, another, adapter, tmp_path / "out")


def test_half_of_a_pair(adapter: Path, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, file, {"format": "pt"})
    refused(ModelError, "lora_A without its counterpart", base, adapter, tmp_path / "out")


def test_a_rank_that_contradicts_the_config(adapter: Path, base: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    refused(ModelError, "does not fit rank 16", base, adapter, tmp_path / "out")


def test_a_missing_shard(
    tiny_llama_dir: Path, copy_in_dtype: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    whole = copy_in_dtype(tiny_llama_dir, "float32")
    adapter = make_adapter(whole, lora(), tmp_path / "adapter")
    broken = shutil.copytree(whole, tmp_path / "broken")
    next(iter(sorted(broken.glob("model-00002*")))).unlink()
    refused(ModelError, "incomplete.*model-00002-of", broken, adapter, tmp_path / "out")


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("keep", [0.5, 0.0001])
def test_a_cut_off_file(which: str, keep: float, base: Path, adapter: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors" if which == "base" else adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    refused(ModelError, "truncated|not a valid safetensors file", base, adapter, tmp_path / "out")


def test_values_that_are_not_finite(adapter: Path, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    refused(ModelError, "not finite after the merge", base, adapter, tmp_path / "out")


def test_an_output_that_is_not_empty(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(StorageError, "not empty", base, adapter, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_the_same_merge_again(adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that is retried after its merge ends well. What is there otherwise is never overwritten."""
    out, moved = tmp_path / "out", tmp_path / "moved-adapter"
    assert main([str(base), str(adapter), str(out)]) == 0
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    shutil.copytree(adapter, moved)
    for arguments in ([str(base), str(adapter)], [str(base), str(moved)], [str(base), str(moved), "--no-verify"]):
        capsys.readouterr()
        assert main([*arguments, str(out)]) == 0
        assert f"{out} holds this merge already, complete and unchanged" in capsys.readouterr().out
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()} == before


@pytest.mark.parametrize("change", ["adapter", "base", "weights of the merge", "a file of the merge", "not verified"])
def test_another_merge_is_not_the_same(change: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_adapters(str(base), [str(adapter)], out, verify=change != "not verified")
    files = {
        "adapter": adapter / "adapter_config.json",
        "base": base / "config.json",
        "weights of the merge": out / "model.safetensors",
        "a file of the merge": out / "config.json",
    }
    if change in files:
        content = bytearray(files[change].read_bytes())
        content[-2:] = content[-2:] + b" " if files[change].suffix == ".json" else bytes([content[-2] ^ 1, content[-1]])
        files[change].write_bytes(content)
    (adapter / "adapter_fingerprint.json").unlink(missing_ok=True)
    refused(StorageError, "not empty", base, adapter, out)


def test_a_pickled_adapter(adapter: Path, base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    expected = tmp_path / "expected"
    merge_adapters(str(base), [str(adapter)], expected)
    file.unlink()
    refused(ModelError, "is a pickle file.*--allow-pickle", base, adapter, tmp_path / "out")
    merge_adapters(str(base), [str(adapter)], tmp_path / "out", allow_pickle=True)
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(theirs[name], value) for name, value in load_file(expected / "model.safetensors").items())


def test_a_pickled_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    refused(ModelError, "is a pickle file.*--allow-pickle", base, adapter, tmp_path / "out")


def test_a_tokenizer_larger_than_the_embeddings(
    adapter: Path, base: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    refused(
        ModelError,
        "only 96 embedding rows",
        base,
        adapter,
        tmp_path / "out",
        tokenizer=str(tiny_llama_dir),
        verify=False,
    )


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("float32", "trained on this base, or skip the check"),
        ("bfloat16", "trained on this base, merge into a float32 base, or skip the check"),
    ],
)
def test_a_merge_that_is_not_the_trained_model_is_not_published(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, dtype: str, hint: str
) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    adapter = make_adapter(base, lora(), tmp_path / "adapter")

    def damage(line: str) -> None:
        if line.startswith("verifying"):
            from safetensors.torch import load_file, save_file

            file = staging_path(tmp_path / "out") / "model.safetensors"
            weights = load_file(file)
            weights["model.layers.1.self_attn.v_proj.weight"] *= 1.01 if dtype == "float32" else -1
            save_file(weights, file, {"format": "pt"})

    refused(GuardStopped, f"differs from the trained model.*{hint}", base, adapter, tmp_path / "out", log=damage)


@pytest.mark.parametrize("device_map", ["nonsense", {"": "nonsense:0"}])
def test_a_device_that_is_not_here(device_map: Any, adapter: Path, base: Path, tmp_path: Path) -> None:
    text = "--device_map: cannot use 'nonsense"
    refused(ConfigError, text, base, adapter, tmp_path / "out", device_map=device_map)


def test_an_adapter_that_names_another_base_gets_a_note(adapter: Path, base: Path, tmp_path: Path) -> None:
    def logged(folder: Path) -> list[str]:
        lines: list[str] = []
        merge_adapters(str(folder), [str(adapter)], tmp_path / f"{folder.name}-out", verify=False, log=lines.append)
        return lines

    assert logged(base) == []
    another = base.rename(tmp_path / "other")
    assert logged(another) == [
        f"note: the adapter names {base} as its base and has no fingerprint of it: whether {another} has the same"
        " weights is unknown; only names and shapes are checked"
    ]
    fingerprint.write_fingerprint(fingerprint.compute_fingerprint(another), adapter)
    shutil.rmtree(tmp_path / "other-out")
    assert logged(another) == []


def test_disk_space_is_checked_first(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    check_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(StorageError, match=r"GB free, .* GB are needed"):
        check_free_space(tmp_path / "not" / "there", disk.f_blocks * disk.f_frsize + 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk(adapter: Path, base: Path, small_disk: Path) -> None:
    with pytest.raises(StorageError, match="GB free"):
        merge_adapters(str(base), [str(adapter)], small_disk / "out")
    assert list(small_disk.iterdir()) == []
