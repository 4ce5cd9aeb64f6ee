"""The rehearsal on fake tensors foresees the memory that the real allocator gives out, and what makes a GPU wait."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from finetuning.algorithms import ALGORITHMS
from finetuning.cli.rehearse import step_shape
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError
from finetuning.plan.plan import make_plan
from finetuning.training.rehearsal import DEVICES, rehearse

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


CASES = {
    "full": {"peft_conf": FULL},
    "LoRA": {"peft_conf": LORA},
    "full, checkpointing": {"peft_conf": FULL, "training_args.gradient_checkpointing": True},
    "LoRA, padded": {"peft_conf": LORA, "sft_args.batching": "padded"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_that_of_the_allocator(
    train: Any, sft_values: Any, write_jsonl: Any, tmp_path: Path, model_dir: Path, write_config: Any, case: str
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
    assert cost.peak["weights"] == pytest.approx(weights, rel=0.01)
    assert kept + watch.peak == pytest.approx(cost.peak_bytes, rel=0.05)
    assert cost.operations == ()


def test_quantized_weights_are_refused(sft_values: Any, write_config: Any, model_dir: Path) -> None:
    changes = {
        "peft_conf": LORA,
        "run_conf.model": str(model_dir),
        "quant_conf": {"quantization_type": "bits-and-bytes", "load_in_4bit": True},
    }
    experiment = validate(read_document(write_config(sft_values(changes))), EXPERIMENTS["sft"]).experiment
    shape = step_shape(experiment, make_plan(experiment, ProcessTopology()))
    with pytest.raises(ConfigError, match=r"quant_conf\.quantization_type: rehearsing a quantized model"):
        rehearse(experiment, shape, DEVICES["h100"])


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
