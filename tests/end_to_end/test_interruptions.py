"""Real runs, cut by signals: what they leave, and how they go on."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ForkServer, Process

from finetuning.atomic_io import find_manifest_mismatch
from finetuning.cli.main import main

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}}


@pytest.fixture
def start(fork_server: ForkServer) -> Callable[[Path], Process]:
    """A function that starts `finetuning sft` on a config, in a process that is gone when the test is."""
    return lambda config: fork_server.start(["sft", config])


def wait_for(condition: Callable[[], bool], process: Process, pause: float = 0.005) -> None:
    assert process.wait_for(condition, pause), process.output


def logged(out: Path) -> int:
    log = out / "training_logs.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_sigterm_saves_and_the_rerun_ends_as_if_nothing_had_been(
    start: Any, train: Any, sft_values: Any, write_config: Any, read_tensors: Any, tmp_path: Path, capsys: Any
) -> None:
    changes = {"peft_conf": LORA, "training_args.max_steps": 150, "run_conf.resume_from_checkpoint": "auto"}
    config = write_config(sft_values(changes), "cut.yaml")
    out = tmp_path / "out"
    process = start(config)
    wait_for(lambda: logged(out) >= 3, process)
    assert main(["sft", str(config)]) == 1, "the directory is taken while the run lives"
    assert f"another run (process {process.pid} on " in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    errors = process.stderr
    saved = checkpoints(out)
    assert len(saved) == 1
    step = int(saved[0].rpartition("-")[2])
    assert 3 <= step < 150
    assert f"signal 15 at step {step}: {saved[0]} is saved" in errors
    assert "Traceback" not in errors
    assert not (out / "checkpoint-final").exists()
    assert '"status": "interrupted"' in (out / "run.json").read_text()
    capsys.readouterr()
    assert main(["sft", str(config)]) == 0
    assert "resumed from" in capsys.readouterr().out
    whole = train(sft_values({**changes, "training_args.output_dir": str(tmp_path / "whole")}))
    first, second = read_tensors(out / "checkpoint-final"), read_tensors(whole.final)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_sigint_saves_even_where_only_the_best_is_kept(
    start: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    changes = {
        "training_args.max_steps": 150,
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 2,
        "training_args.save_strategy": "best",
        "training_args.metric_for_best_model": "eval_loss",
        "training_args.greater_is_better": True,
        "training_args.load_best_model_at_end": True,
        "training_args.save_total_limit": 1,
    }
    out = tmp_path / "out"
    process = start(write_config(sft_values(changes)))
    wait_for(lambda: logged(out) >= 6, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    step = int(process.stderr.partition("at step ")[2].partition(":")[0])
    assert checkpoints(out) == sorted(["checkpoint-2", f"checkpoint-{step}"])


@pytest.fixture(scope="session")
def wide_llama_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Path:
    """A model whose checkpoint of 100 MB takes long enough to be caught half written."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=504,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=12,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
    directory = tmp_path_factory.mktemp("models") / "wide-llama"
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(chatml_llama_dir).save_pretrained(directory)
    return directory


def test_kill_in_the_middle_of_a_save_loses_only_that_save(
    start: Any, sft_values: Any, write_config: Any, wide_llama_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    changes = {
        "run_conf.model": str(wide_llama_dir),
        "run_conf.resume_from_checkpoint": "auto",
        "training_args.max_steps": 6,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "training_args.save_total_limit": 2,
        "batchsize_conf": {"total_train_batch_size": 1, "max_per_device_train_batch_size": 1},
    }
    config = write_config(sft_values(changes))
    out = tmp_path / "out"

    def half_written(step: int, name: str) -> Path:
        return out / f".checkpoint-{step}.partial" / f"checkpoint-{step}" / name

    for step, name in ((2, "model.safetensors"), (4, "optimizer.pt")):
        process = start(config)
        wait_for(half_written(step, name).exists, process, pause=0.0005)
        assert process.kill() == -signal.SIGKILL
        whole = [path for path in out.glob("checkpoint-*") if path.is_dir()]
        assert whole
        assert all(find_manifest_mismatch(path) is None and (path / "manifest.json").is_file() for path in whole)
    newest = max(int(name.rpartition("-")[2]) for name in checkpoints(out))
    capsys.readouterr()
    assert main(["sft", str(config)]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"resumed from +{re.escape(str(out))}/checkpoint-{newest}\n", output), output
    assert "skipped" not in output
    assert checkpoints(out) == ["checkpoint-5", "checkpoint-6", "checkpoint-final"]
    assert not list(out.glob(".*.partial"))
    losses = [line for line in (out / "training_logs.jsonl").read_text().splitlines() if '"step": 6,' in line]
    assert len(losses) == 1
