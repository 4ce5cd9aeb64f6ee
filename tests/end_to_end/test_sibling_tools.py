"""merge_adapter, create_vllm_compatible_adapter and replace_tokens as a user runs them: as processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ForkServer

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def adapter(chatml_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of random weights for `chatml_llama_dir`, with its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapters") / "colors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(chatml_llama_dir), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(chatml_llama_dir).save_pretrained(folder)
    return folder


def generated(model: Any, tokenizer: Any) -> list[int]:
    prompt = tokenizer("What is the capital of France?", return_tensors="pt")
    return model.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()


def test_a_merged_model_answers_as_base_and_adapter(
    chatml_llama_dir: Path, adapter: Path, run_cli: Run, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    done = run_cli([chatml_llama_dir, adapter, out, "--device_map", "cpu"], program="merge_adapter")
    assert done.returncode == 0, done.stderr
    assert f"merged model: {out}" in done.stdout and "verified: max logit difference" in done.stdout
    assert json.loads((out / "merge_verification.json").read_text())["passed"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chatml_llama_dir), adapter)
    assert generated(AutoModelForCausalLM.from_pretrained(out), tokenizer) == generated(apart, tokenizer)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{base}", "{base}", "{out}"], "adapter_config.json"),
        (["{base}", "/nowhere/adapter", "{out}"], "/nowhere/adapter"),
        (["{adapter}", "{adapter}", "{out}"], "contains an adapter, not a base model"),
        (["{base}", "{adapter}", "{adapter}"], "exists and is not empty"),
        (["{base}", "{adapter}", "{out}", "--device_map", "{not json"], "--device_map: not valid JSON"),
        (["{base}", "{adapter}", "{out}", "--tokenizer", "/nowhere/t"], "/nowhere/t"),
    ],
)
def test_a_merge_that_is_impossible_is_reported_in_one_line(
    arguments: list[str], text: str, chatml_llama_dir: Path, adapter: Path, run_cli: Run, tmp_path: Path
) -> None:
    places = {"{base}": chatml_llama_dir, "{adapter}": adapter, "{out}": tmp_path / "out"}
    done = run_cli([places.get(argument, argument) for argument in arguments], program="merge_adapter")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and text in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_merge_leaves_no_folder_that_looks_whole(
    sent: signal.Signals, chatml_llama_dir: Path, adapter: Path, fork_server: ForkServer, run_cli: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = fork_server.start([chatml_llama_dir, adapter, out], program="merge_adapter")
    assert process.wait_for(lambda: any(tmp_path.iterdir()), pause=0.001), process.output
    process.send_signal(sent)
    assert process.wait() == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert not out.exists()
    if sent == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    done = run_cli([chatml_llama_dir, adapter, out, "--no-verify"], program="merge_adapter")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_vllm_conversion(chatml_llama_dir: Path, adapter: Path, run_cli: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "colors")
    done = run_cli([folder], program="create_vllm_compatible_adapter")
    assert done.returncode == 0, done.stderr
    assert f"already compatible with vLLM: {folder}" in done.stdout
    assert f"serve it: vllm serve {chatml_llama_dir} --enable-lora --max-lora-rank 8" in done.stdout
    (tmp_path / "run.yaml").write_text("peft_conf: {peft_type: NO_PEFT}\n")
    arguments = [folder, "--training-config", tmp_path / "run.yaml"]
    assert "unchanged" in run_cli(arguments, program="create_vllm_compatible_adapter").stdout
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    (folder / "adapter_fingerprint.json").unlink(missing_ok=True)
    done = run_cli([folder, "--output", tmp_path / "out"], program="create_vllm_compatible_adapter")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "vLLM does not support DoRA" in done.stderr and "Merge it instead: merge_adapter" in done.stderr
    done = run_cli([chatml_llama_dir], program="create_vllm_compatible_adapter")
    assert done.returncode == 1 and "contains a whole model, not an adapter" in done.stderr


def test_tokens_are_replaced(chatml_llama_dir: Path, run_cli: Run, tmp_path: Path) -> None:
    arguments = [chatml_llama_dir, tmp_path / "out", "--from", "<|im_start|>", "<|im_end|>", "--to", "<|s|>", "<|e|>"]
    done = run_cli(arguments, program="replace_tokens")
    assert done.returncode == 0, done.stderr
    assert "<|im_end|> -> <|e|> (id 2)" in done.stdout
    done = run_cli(
        [chatml_llama_dir, tmp_path / "x", "--from", "<|im_strt|>", "--to", "<|s|>"], program="replace_tokens"
    )
    assert done.returncode == 1 and "Did you mean '<|im_start|>'?" in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize("program", ["merge_adapter", "create_vllm_compatible_adapter", "replace_tokens"])
def test_help_needs_nothing_heavy(program: str) -> None:
    code = (
        f"import sys; from finetuning.cli.{program} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'yaml', 'pydantic', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {program}")
