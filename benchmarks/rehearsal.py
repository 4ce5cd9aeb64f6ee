"""The memory that `finetuning rehearse` estimates, next to what torch's allocator gives out in a real step on the CPU.

python benchmarks/rehearsal.py [--size small|tiny] [--cases "SFT, LoRA" ...]

Prints a Markdown table. Both are of one optimizer step with the longest rows that the config allows. On a GPU,
`make gpu-check` compares the two.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0}}
FULL = {"peft_type": "NO_PEFT"}
FOUR_BIT = {"quantization_type": "bits-and-bytes", "load_in_4bit": True}
ROWS = 4
SPECIAL_TOKENS = ("<pad>", "<|im_end|>", "<|im_start|>")


@dataclass(frozen=True)
class Size:
    """The shape of a model, and the length of its rows."""

    hidden: int
    layers: int
    vocabulary: int
    length: int


SIZES = {"small": Size(512, 8, 8192, 512), "tiny": Size(128, 3, 512, 128)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT, full": ("sft", {"peft_conf": FULL}),
    "SFT, full, selective checkpointing": ("sft", {"peft_conf": FULL, "gradient_checkpointing": "selective"}),
    "SFT, full, full checkpointing": ("sft", {"peft_conf": FULL, "gradient_checkpointing": True}),
    "SFT, LoRA": ("sft", {"peft_conf": LORA}),
    "SFT, LoRA, selective checkpointing": ("sft", {"peft_conf": LORA, "gradient_checkpointing": "selective"}),
    "SFT, LoRA, full checkpointing": ("sft", {"peft_conf": LORA, "gradient_checkpointing": True}),
    "SFT, LoRA, bfloat16": ("sft", {"peft_conf": LORA, "bf16": True}),
    "SFT, LoRA, 4 bit": ("sft", {"peft_conf": LORA, "quant_conf": FOUR_BIT}),
    "DPO, full": ("dpo", {"peft_conf": FULL}),
    "DPO, LoRA": ("dpo", {"peft_conf": LORA}),
    "DPO, LoRA, 4 bit": ("dpo", {"peft_conf": LORA, "quant_conf": FOUR_BIT}),
}


def main() -> None:
    """Measure the cases one after the other, and print a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="CASE")
    options = parser.parse_args()
    logging.getLogger("finetuning").setLevel(logging.ERROR)
    size = SIZES[options.size]
    print("| | estimated, MB | measured, MB | ratio |\n|---|---|---|---|", flush=True)
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            estimated, measured = measure(Path(folder), size, *CASES[case])
        print(f"| {case} | {estimated / 1e6:.1f} | {measured / 1e6:.1f} | {estimated / measured:.3f} |", flush=True)


def measure(folder: Path, size: Size, method: str, changes: dict[str, Any]) -> tuple[float, float]:
    """Return the estimated and the measured peak in bytes."""
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import make_plan
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking
    from finetuning.training.memory_plan import step_shape
    from finetuning.training.rehearsal import DEVICES, rehearse
    from finetuning.training.reporter import RunReporter
    from finetuning.training.run import TrainingJob, run_training

    topology, algorithm = ProcessTopology(), ALGORITHMS[method]
    config = write_config(folder, size, method, changes)
    experiment = validate(read_document(config), algorithm.experiment).experiment
    plan = make_plan(experiment, topology)
    watch = allocated_memory()
    tracking = resolve_tracking(TrackingOptions(None, None, None), experiment.tracking, {})
    reporter = RunReporter(experiment, method, topology, tracking)
    run_training(TrainingJob(experiment, algorithm, plan, topology, reporter, 1, [watch]))
    cost = rehearse(experiment, step_shape(experiment, plan, for_gpu=False), DEVICES["h100"])
    return cost.peak_bytes, watch.resident + watch.peak


def allocated_memory() -> Any:
    """Return a callback that measures the second step: what is resident before, and the peak above that."""
    import torch
    from transformers import TrainerCallback

    class AllocatedMemory(TrainerCallback):
        resident = peak = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.resident = resident_bytes()
                activities = [torch.profiler.ProfilerActivity.CPU]
                self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
                self.profiler.__enter__()
            elif state.global_step == 2:
                self.profiler.__exit__(None, None, None)
                kineto: Any = self.profiler.profiler
                events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
                current = 0
                for event in sorted(events, key=lambda event: event.start_ns()):
                    current += event.nbytes()
                    self.peak = max(self.peak, current)

    return AllocatedMemory()


def resident_bytes() -> int:
    """Return the bytes of all tensors between two steps: weights, buffers, optimizer states, a reference model."""
    import gc

    import torch

    gc.collect()
    storages = [
        tensor.untyped_storage()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def write_config(folder: Path, size: Size, method: str, changes: dict[str, Any]) -> Path:
    """Write a model, rows that are longer than the limit, and the config; return the path of the config."""
    import yaml

    write_model(folder / "model", size)
    words = "four words in a row " * (size.length // 8)
    row = {"text": words} if method == "sft" else {"prompt": "Say it.", "chosen": words, "rejected": words.upper()}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * (4 * ROWS), encoding="utf-8")
    args = {key: value for key, value in changes.items() if key in ("gradient_checkpointing", "bf16")}
    values: dict[str, Any] = {
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(folder / "rows.jsonl")}]},
            "validation_data": {"type": "NONE"},
            "max_lost_fraction": 1.0,
            "cache": "off",
        },
        "training_args": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "max_steps": 3,
            "logging_steps": 100,
            "save_strategy": "no",
            **args,
        },
        "batchsize_conf": {"total_train_batch_size": ROWS, "max_per_device_train_batch_size": ROWS},
        "peft_conf": changes["peft_conf"],
        "run_conf": {"model": str(folder / "model"), "memory_check": False},
    }
    if "quant_conf" in changes:
        values["quant_conf"] = changes["quant_conf"]
    if method == "sft":
        values["sft_args"] = {"max_seq_length": size.length, "length_handling": "truncate"}
    else:
        values["training_args"]["max_length"] = size.length
        values["data_conf"]["chat_template_name"] = "chat-ml"
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return config


def write_model(folder: Path, size: Size) -> None:
    """Write a Llama model with random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=["<|im_start|>"]
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * size.length,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
