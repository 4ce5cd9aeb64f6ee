"""The rehearsal on fake tensors estimates the memory that the real allocator gives out, and what makes a GPU wait."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from finetuning.algorithms import ALGORITHMS
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError
from finetuning.plan.plan import Decision, make_plan
from finetuning.training.memory_plan import plan_memory, step_shape, with_rows
from finetuning.training.rehearsal import DEVICES, USABLE_MEMORY, rehearse

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 8, "target_modules": "all-linear"}}
FULL = {"peft_type": "NO_PEFT"}
LENGTH = 128


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Path:
    """Four layers of 256: weights and activations of some megabytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("rehearsal") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class AllocatedMemory(TrainerCallback):
    """The peak of what torch's allocator has given out in the second step, above the weights and the optimizer."""

    peak = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profiler.__enter__()
        elif state.global_step == 2:
            self.profiler.__exit__(None, None, None)
            events = [event for event in self.profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
            current = 0
            for event in sorted(events, key=lambda event: event.start_ns()):
                current += event.nbytes()
                self.peak = max(self.peak, current)


FOUR_BIT = {"quantization_type": "bits-and-bytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
CASES = {
    "full": {"peft_conf": FULL},
    "LoRA": {"peft_conf": LORA},
    "full, checkpointing": {"peft_conf": FULL, "training_args.gradient_checkpointing": True},
    "LoRA, selective": {"peft_conf": LORA, "training_args.gradient_checkpointing": "selective"},
    "LoRA, padded": {"peft_conf": LORA, "sft_args.batching": "padded"},
    "LoRA, 4 bit": {"peft_conf": LORA, "quant_conf": FOUR_BIT},
}
IN_FULL = {"full", "full, checkpointing", "LoRA, padded"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.full] * (case in IN_FULL)) for case in CASES])
def test_the_peak_is_that_of_the_allocator(
    train: Any,
    sft_values: Any,
    write_jsonl: Any,
    tmp_path: Path,
    model_dir: Path,
    write_config: Any,
    recwarn: pytest.WarningsRecorder,
    case: str,
) -> None:
    text = "What is two plus two? Two plus two is four. " * 20
    rows = write_jsonl(tmp_path / "long.jsonl", [{"text": text}] * 16)
    changes = {
        **CASES[case],
        "run_conf.model": str(model_dir),
        "data_conf.training_data.datasets": [{"path": str(rows)}],
        "data_conf.chat_template_name": None,
        "sft_args.max_seq_length": LENGTH,
        "sft_args.length_handling": "truncate",
        "sft_args.train_on_completions_only": False,
        "data_conf.max_lost_fraction": 1.0,
        "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4},
        "training_args.logging_steps": 100,
    }
    values = sft_values(changes)
    watch = AllocatedMemory()
    sft = ALGORITHMS["sft"]

    def build(inputs: Any) -> Any:
        return sft.build_trainer(replace(inputs, callbacks=[*inputs.callbacks, watch]))

    trainer = train(values, replace(sft, build_trainer=build)).trainer
    experiment = validate(read_document(write_config(values)), EXPERIMENTS["sft"]).experiment
    shape = step_shape(experiment, make_plan(experiment, ProcessTopology()), for_gpu=False)
    cost = rehearse(experiment, shape, DEVICES["h100"])
    exact = rehearse(experiment, shape, DEVICES["h100"], exact=True)
    assert cost.peak_bytes == pytest.approx(exact.peak_bytes, rel=0.02)
    assert cost.flops == pytest.approx(exact.flops, rel=0.01)
    kept = cost.peak["weights"] + cost.peak["optimizer"]
    weights = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
    # The factors of 4-bit weights are about a byte for 64 weights.
    assert cost.peak["weights"] == pytest.approx(weights, rel=0.05 if "quant_conf" in CASES[case] else 0.01)
    assert kept + watch.peak == pytest.approx(cost.peak_bytes, rel=0.05)
    assert cost.operations == ()
    # bitsandbytes' kernel for inference on a CPU, which has no backward pass.
    assert not [warning for warning in recwarn if "gemv_4bit" in str(warning.message)]


def test_the_peak_of_few_layers_gives_that_of_many(
    sft_values: Any, write_config: Any, model_dir: Path, tmp_path: Path
) -> None:
    """With one or two layers the logits are the peak, and with many the gradients of all layers."""
    deep = tmp_path / "deep"
    LlamaConfig.from_pretrained(model_dir, num_hidden_layers=16, vocab_size=2048).save_pretrained(deep)
    changes = {"peft_conf": FULL, "run_conf.model": str(deep), "training_args.gradient_checkpointing": True}
    changes |= {"batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4}}
    experiment = validate(read_document(write_config(sft_values(changes))), EXPERIMENTS["sft"]).experiment
    shape = step_shape(experiment, make_plan(experiment, ProcessTopology()), for_gpu=False)
    cost, exact = (rehearse(experiment, shape, DEVICES["h100"], exact=exact) for exact in (False, True))
    assert cost.peak == pytest.approx(exact.peak, rel=1e-3)
    parts = {name: sum(sizes.values()) for name, sizes in exact.peaks.items()}
    assert max(parts, key=lambda name: parts[name]) != "backward pass of the loss"


def test_the_peak_of_dpo_is_that_of_the_allocator(
    train: Any, dpo_values: Any, write_jsonl: Any, tmp_path: Path, model_dir: Path, write_config: Any
) -> None:
    text = "Two plus two is four. " * 40
    pairs = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "2+2?", "chosen": text, "rejected": text.upper()}] * 16)
    values = dpo_values(
        {
            "peft_conf": FULL,
            "run_conf.model": str(model_dir),
            "data_conf.training_data.datasets": [{"path": str(pairs)}],
            "training_args.max_length": LENGTH,
            "training_args.logging_steps": 100,
            "data_conf.max_lost_fraction": 1.0,
            "batchsize_conf": {"total_train_batch_size": 2, "max_per_device_train_batch_size": 2},
        }
    )
    watch, dpo = AllocatedMemory(), ALGORITHMS["dpo"]

    def build(inputs: Any) -> Any:
        return dpo.build_trainer(replace(inputs, callbacks=[*inputs.callbacks, watch]))

    train(values, replace(dpo, build_trainer=build))
    experiment = validate(read_document(write_config(values)), EXPERIMENTS["dpo"]).experiment
    shape = step_shape(experiment, make_plan(experiment, ProcessTopology()), for_gpu=False)
    cost = rehearse(experiment, shape, DEVICES["h100"])
    assert cost.peak["weights"] + cost.peak["optimizer"] + watch.peak == pytest.approx(cost.peak_bytes, rel=0.05)
    alone = rehearse(experiment, replace(shape, has_reference=False), DEVICES["h100"])
    assert cost.peak["weights"] == pytest.approx(2 * alone.peak["weights"], rel=0.01)


def test_the_fastest_checkpointing_that_fits_is_chosen(sft_values: Any, write_config: Any, model_dir: Path) -> None:
    batch = {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4}
    changes = {"peft_conf": LORA, "run_conf.model": str(model_dir), "batchsize_conf": batch}

    def planned(memory: float, **more: Any) -> tuple[Any, Any, dict[str, Decision]]:
        values = sft_values({**changes, "sft_args.max_seq_length": 1024, **more})
        experiment = validate(read_document(write_config(values)), EXPERIMENTS["sft"]).experiment
        device = replace(DEVICES["h100"], title="a GPU", memory=memory / USABLE_MEMORY)
        experiment, plan = plan_memory(experiment, make_plan(experiment, ProcessTopology()), device)
        return experiment, plan, {decision.name: decision for decision in plan.decisions}

    experiment, _, decisions = planned(1e12)
    assert experiment.training_args.gradient_checkpointing is False
    assert decisions["checkpointing"].value == "off"
    reason = decisions["checkpointing"].reason
    assert reason.startswith("the fastest that fits: 4 rows of 1,024 tokens need ")
    peaks = {"off": _megabytes(reason.split(" need ")[1])}
    _, plan, decisions = planned(1e6)
    assert decisions["checkpointing"].value == "full"
    assert "none fits, and the micro-batch is halved until it does" in decisions["checkpointing"].reason
    assert plan.batch.per_device == 4
    for part in decisions["checkpointing"].reason.split("; "):
        peaks[part.split()[0]] = _megabytes(part.split(" needs ")[1])
    assert peaks["full"] < peaks["selective"] < peaks["off"]

    experiment, _, decisions = planned((peaks["selective"] + peaks["off"]) / 2)
    assert experiment.training_args.gradient_checkpointing == "selective"
    assert "off needs" in decisions["checkpointing"].reason
    assert decisions["memory per device"].value.startswith("about ")
    # What the config says is kept, and its memory is estimated.
    experiment, _, decisions = planned(1e12, **{"training_args.gradient_checkpointing": True})
    assert experiment.training_args.gradient_checkpointing is True
    assert "checkpointing" not in decisions
    assert "rehearsed with checkpointing full" in decisions["memory per device"].reason


def test_an_automatic_micro_batch_begins_with_what_fits(sft_values: Any, write_config: Any, model_dir: Path) -> None:
    values = sft_values(
        {
            "peft_conf": LORA,
            "run_conf.model": str(model_dir),
            "sft_args.max_seq_length": 1024,
            "batchsize_conf": {"total_train_batch_size": 16, "max_per_device_train_batch_size": "auto"},
            "training_args.gradient_checkpointing": False,
        }
    )
    experiment = validate(read_document(write_config(values)), EXPERIMENTS["sft"]).experiment
    plan = make_plan(experiment, ProcessTopology())
    assert plan.batch.per_device == 16
    shape = step_shape(experiment, plan)
    half = rehearse(experiment, with_rows(shape, 8), DEVICES["h100"]).peak_bytes
    device = replace(DEVICES["h100"], title="a GPU", memory=1.1 * half / USABLE_MEMORY)
    _, limited = plan_memory(experiment, plan, device)
    assert (limited.batch.per_device, limited.batch.accumulation) == (8, 2)
    assert "what fits into a GPU" in limited.batch.reason


def _megabytes(text: str) -> float:
    value, unit = text.split()[:2]
    return float(value) * {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit.rstrip(";,:")]


def test_what_cannot_be_estimated_is_said(sft_values: Any, write_config: Any, model_dir: Path) -> None:
    changes = {
        "peft_conf": LORA,
        "run_conf.model": str(model_dir),
        "quant_conf": {"quantization_type": "bits-and-bytes", "load_in_8bit": True},
    }
    experiment = validate(read_document(write_config(sft_values(changes))), EXPERIMENTS["sft"]).experiment
    unchanged, plan = plan_memory(experiment, make_plan(experiment, ProcessTopology()), DEVICES["h100"])
    assert unchanged is experiment
    decisions = {decision.name: decision for decision in plan.decisions}
    assert decisions["checkpointing"].value == "off"
    assert "of quantized models, only those in 4 bit" in decisions["checkpointing"].reason
    assert "plus activations" in decisions["memory per device"].reason
    with pytest.raises(ConfigError, match=r"quant_conf\.quantization_type: of quantized models"):
        rehearse(experiment, step_shape(experiment, plan), DEVICES["h100"])


def test_the_command_prints_memory_time_and_what_fits(
    run_cli: Any, sft_values: Any, write_config: Any, model_dir: Path
) -> None:
    values = sft_values({"peft_conf": LORA, "run_conf.model": str(model_dir), "method": "sft"})
    done = run_cli(["rehearse", write_config(values), "--device", "a100", "--json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"] == "NVIDIA A100 SXM, 80 GB"
    assert result["fits"] is True
    assert result["fitting_checkpointing"] == "off"
    assert result["largest_micro_batch"] > 100
    assert 0 < result["mfu"] < 1
    assert result["data_dependent_operations"] == []
