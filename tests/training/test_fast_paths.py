"""Optimizers and fast paths: each runs on a CPU here, or is refused there with its reason and tested on a GPU."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, MissingPackageError
from finetuning.model.hardware import Device
from finetuning.model.varlen_attention import SDPA_VARLEN
from finetuning.plan.compatibility import NEEDS_GPU
from finetuning.plan.plan import make_plan
from finetuning.training.preflight import check_device
from finetuning.training.setup import AttentionSetup, enable_padding_free

OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "lion_8bit", "ademamix_8bit", "adafactor", "sgd")
OUTPUT = "training_args.output_dir"
GPU = Device("a GPU", "cuda", None, None, ())
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU only; this machine has none")


def test_attention_that_cannot_compute_here_is_left_for_the_next_with_its_reason(chatml_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
    tried = AttentionSetup(("flash_attention_3", "flash_attention_2"), "installed")
    refusal, attention = enable_padding_free(SimpleNamespace(model=model, peft_config=None), tried, ProcessTopology())
    assert refusal is None
    assert model.config._attn_implementation == SDPA_VARLEN
    for name in tried.candidates:
        assert f"{name} was not used: " in attention.reason
    assert attention.reason.startswith("the default; ")


@pytest.mark.parametrize(("asked", "message"), [(None, "(the default; "), ("sdpa", "(as configured)")])
def test_a_run_says_which_attention_computes_and_why(
    train: Any, sft_values: Any, asked: str | None, message: str
) -> None:
    one_step = {"training_args.max_steps": 1, "run_conf.model_args.attn_implementation": asked}
    record = json.loads((train(sft_values(one_step)).output_dir / "run.json").read_text())
    assert any(note.startswith(f"attention: sdpa, row by row  {message}") for note in record["model"]["notes"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains(train: Any, sft_values: Any, name: str) -> None:
    run = train(sft_values({"training_args.optim": name, "training_args.weight_decay": 0.01}))
    assert run.losses[-1] < run.losses[0]


SCHEDULE_FREE = {
    "training_args.optim": "schedule_free_adamw",
    "training_args.lr_scheduler_type": "constant",
    "training_args.max_steps": 4,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 2,
}


def test_schedule_free_saves_the_weights_that_are_to_be_used(train: Any, sft_values: Any, read_tensors: Any) -> None:
    """Not those that gradients are computed at; the checkpoints' go on as if nothing had been saved."""
    run = train(sft_values(SCHEDULE_FREE))
    saved = read_tensors(run.final)["model.norm.weight"]
    assert torch.equal(saved, run.trainer.model.model.norm.weight)
    run.trainer.optimizer.train()
    assert not torch.equal(saved, run.trainer.model.model.norm.weight)
    again = {"run_conf.resume_from_checkpoint": str(run.output_dir / "checkpoint-2")}
    resumed = train(sft_values({**SCHEDULE_FREE, **again, "run_conf.final_checkpoint_name": "again"}))
    assert resumed.losses == run.losses
    first, second = read_tensors(run.final), read_tensors(run.output_dir / "again")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_neftune_disturbs_training_and_nothing_else(train: Any, sft_values: Any, tmp_path: Path) -> None:
    changes = {
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
        "training_args.eval_on_start": True,
        "training_args.eval_strategy": "epoch",
        "training_args.max_steps": 1,
    }
    plain, noisy = (
        train(
            sft_values({**changes, "training_args.neftune_noise_alpha": alpha, OUTPUT: str(tmp_path / str(alpha))})
        ).trainer.state.log_history
        for alpha in (None, 5.0)
    )
    assert noisy[0]["eval_loss"] == plain[0]["eval_loss"]
    assert noisy[1]["loss"] != plain[1]["loss"]


def test_compiled_it_computes_the_same(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read_tensors: Any
) -> None:
    plain = train(sft_values({OUTPUT: str(tmp_path / "plain")}))
    # The trainer sets these for accelerate.
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
    compiled = train(sft_values({"training_args.torch_compile_backend": "eager"}))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert read_tensors(compiled.final).keys() == read_tensors(plain.final).keys()


def test_layers_compiled_one_by_one_compute_the_same_under_the_same_names(
    train: Any, sft_values: Any, tmp_path: Path, read_tensors: Any
) -> None:
    saving = {"training_args.save_strategy": "steps", "training_args.save_steps": 1, "training_args.max_steps": 2}
    plain = train(sft_values({**saving, OUTPUT: str(tmp_path / "plain")}))
    layers = {**saving, "training_args.torch_compile": "layers", "training_args.torch_compile_backend": "eager"}
    compiled = train(sft_values(layers))
    assert compiled.trainer.model.model.layers[0]._compiled_call_impl is not None
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    saved, expected = read_tensors(compiled.final), read_tensors(plain.final)
    assert saved.keys() == expected.keys()
    assert all(torch.allclose(saved[name], expected[name], atol=1e-5) for name in expected)
    resuming = {"run_conf.resume_from_checkpoint": str(compiled.output_dir / "checkpoint-1")}
    resumed = train(sft_values({**layers, **resuming, "run_conf.final_checkpoint_name": "again"}))
    assert resumed.losses == compiled.losses


@pytest.mark.full
def test_inductor_compiles_layers(train: Any, sft_values: Any, tmp_path: Path) -> None:
    plain = train(sft_values({OUTPUT: str(tmp_path / "plain")}))
    compiled = train(sft_values({"training_args.torch_compile": "layers"}))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


def test_what_cannot_be_compiled_is_refused(
    sft_values: Any, grpo_values: Any, write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(device: Device | None = None, values: Any = sft_values, method: str = "sft", **args: object) -> None:
        config = write_config(values({f"training_args.{key}": value for key, value in args.items()}))
        check_device(validate(read_document(config), EXPERIMENTS[method]).experiment, device)

    check(torch_compile="layers")
    check(GPU, torch_compile="layers", gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="torch_compile: is layers, but on a CPU attention is a loop"):
        check(torch_compile="layers", gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="torch_compile: is layers, but grpo samples"):
        check(values=grpo_values, method="grpo", torch_compile="layers")
    monkeypatch.setenv("PATH", "/nowhere")
    # Libraries set these in processes that have compiled something.
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    check(torch_compile="layers", torch_compile_backend="eager")
    with pytest.raises(ConfigError, match=r"torch_compile: torch.compile needs a compiler for C\+\+, .* no g\+\+"):
        check(torch_compile="layers")
    with pytest.raises(ConfigError, match=r"torch_compile_mode: torch.compile needs a compiler for C, .*gcc or clang"):
        check(GPU, torch_compile_mode="default")


@pytest.fixture
def asking(sft_values: Any, write_config: Any) -> Any:
    def read(key: str) -> Any:
        values = sft_values({f"training_args.{key}": True})
        return validate(read_document(write_config(values)), EXPERIMENTS["sft"]).experiment

    return read


@pytest.mark.parametrize("key", NEEDS_GPU)
def test_what_needs_a_gpu_is_refused_on_a_cpu(asking: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"training_args.{key}: is true, but needs a GPU") as refused:
        check_device(asking(key))
    assert refused.value.problems[0].hint
    check_device(asking(key), GPU)


def test_the_package_of_the_kernels_is_named(asking: Any) -> None:
    if find_spec("liger_kernel") is not None:
        pytest.skip("liger_kernel is installed")
    with pytest.raises(MissingPackageError, match=r"use_liger_kernel: needs the package liger_kernel.*finetuning\[lig"):
        make_plan(asking("use_liger_kernel"), ProcessTopology())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("key", NEEDS_GPU)
def test_a_fast_path_of_the_gpu_computes_the_same(train: Any, sft_values: Any, tmp_path: Path, key: str) -> None:
    if key == "use_liger_kernel" and find_spec("liger_kernel") is None:
        pytest.skip("liger_kernel is not installed: pip install 'finetuning[liger]'")
    on = {"training_args.use_cpu": False}
    plain = train(sft_values({**on, OUTPUT: str(tmp_path / "plain")}))
    fast = train(sft_values({**on, f"training_args.{key}": True}))
    assert fast.losses == pytest.approx(plain.losses, rel=1e-3)
