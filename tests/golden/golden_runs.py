"""The runs behind `losses.json`: their configs, how they are made, and what is kept of them.

Each case is one run of `finetuning METHOD config.yaml` in a process of its own. Kept are all logged values that are not
times, and a digest of the saved weights. Only the command and files with stable names are used, so that a refactor of
the engine leaves this file alone.

Regenerate the values with `make golden` after an intended change of numerics.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from golden.golden_inputs import write_inputs
from safetensors.torch import load_file

RunProgram = Callable[[Sequence[str], Path], "subprocess.CompletedProcess[str]"]

VALUES = Path(__file__).with_name("losses.json")
STEPS = 4
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")

# One thread, and no instructions beyond what every x86-64 CPU has: the order of additions is the same everywhere.
PORTABLE_ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
ISOLATED = {
    "CUDA_VISIBLE_DEVICES": "",
    "FINETUNING_CACHE": "off",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "USE_HUB_KERNELS": "0",
}
DROPPED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MLFLOW_TRACKING_URI", "CHECKPOINTS_PATH")

FULL = {"peft_type": "NO_PEFT"}
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
DROPOUT = {"peft_type": "LORA", "peft_kwargs": {**LORA["peft_kwargs"], "lora_dropout": 0.2}}
NEW_TOKENS = {
    "run_conf.model": "base-model",
    "data_conf.special_tokens": ["<|im_start|>", "<|im_end|>", *(f"<|tool{number}|>" for number in range(8))],
}
MIX = {
    "type": "PRECOMPUTE_WEIGHTED_MIX",
    "datasets": [
        {"path": "chat.jsonl", "sampling_weight": 3.0},
        {"path": "chat-validation.jsonl", "sampling_weight": 1.0},
    ],
}

SFT_CASES: dict[str, dict[str, Any]] = {
    "sft-full": {},
    "sft-lora": {"peft_conf": LORA},
    "sft-lora-dropout": {"peft_conf": DROPOUT},
    "sft-lora-plus": {"peft_conf": LORA, "overrides.loraplus_lr_ratio": 16.0},
    "sft-padded": {"sft_args.batching": "padded"},
    "sft-padding-free": {"sft_args.batching": "padding-free"},
    "sft-packed": {"sft_args.packing": True},
    "sft-accumulation": {"batchsize_conf.max_per_device_train_batch_size": 2, "peft_conf": DROPOUT},
    "sft-streaming": {"data_conf.streaming": True, "data_conf.shuffle_buffer": 16},
    "sft-streaming-packed": {"data_conf.streaming": True, "data_conf.shuffle_buffer": 16, "sft_args.packing": True},
    "sft-mixed-truncated": {
        "data_conf.training_data": MIX,
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.1},
        "data_conf.max_lost_fraction": 1.0,
        "sft_args.length_handling": "truncate",
        "sft_args.max_seq_length": 64,
        "sft_args.train_on_completions_only": False,
    },
    "sft-sliced-logits": {"sft_args.logits_at_once": 16},
    "sft-new-tokens-full": NEW_TOKENS,
    "sft-new-tokens-lora": {**NEW_TOKENS, "peft_conf": LORA},
}
PREFERENCE_CASES: dict[str, dict[str, Any]] = {
    "dpo-full": {},
    "dpo-lora": {"peft_conf": LORA},
    "dpo-on-adapter": {"peft_conf": {"peft_type": "PRETRAINED_PEFT", "name_or_path": "adapter"}},
    "dpo-mixed-losses": {"training_args.loss_type": ["sigmoid", "sft"], "training_args.loss_weights": [1.0, 0.5]},
    "kto-full": {},
    "kto-lora": {"peft_conf": LORA},
    "reward-full": {},
    "reward-lora": {"peft_conf": {**LORA, "task_type": "SEQ_CLS"}},
    # The second iteration moves the probability ratios away from 1, and so the loss away from 0.
    "grpo-full": {"training_args.num_iterations": 2},
    "grpo-lora-beta": {"peft_conf": LORA, "training_args.beta": 0.1},
    "orpo-full": {},
    "orpo-lora": {"peft_conf": LORA},
    "cpo-full": {},
    "cpo-simpo-lora": {"peft_conf": LORA, "training_args.loss_type": "simpo", "training_args.cpo_alpha": 0.0},
}
CASES = {**SFT_CASES, **PREFERENCE_CASES}

OF_A_METHOD: dict[str, dict[str, Any]] = {
    "sft": {"sft_args.max_seq_length": 192, "sft_args.train_on_completions_only": True},
    "grpo": {
        "data_conf.validation_data": {"type": "NONE"},
        "training_args.eval_strategy": "no",
        "training_args.num_generations": 4,
        "training_args.max_completion_length": 12,
        "grpo_args.rewards": [{"type": "function", "path": "own_rewards.py:vowels"}],
    },
}
ROWS = {"sft": "chat", "kto": "rated", "grpo": "prompts"}


def config_of(case: str) -> dict[str, Any]:
    """Return the config of a case. Its paths are relative to the folder of `write_inputs`."""
    method = case.split("-")[0]
    rows = ROWS.get(method, "preferences")
    values: dict[str, Any] = {
        "method": method,
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": f"{rows}.jsonl"}]},
            "validation_data": {"type": "CONCATENATION", "datasets": [{"path": f"{rows}-validation.jsonl"}]},
            "chat_template_name": "chat-ml",
        },
        "training_args": {
            "output_dir": f"out-{case}",
            "use_cpu": True,
            "learning_rate": 0.01,
            "weight_decay": 0.01,
            "max_steps": STEPS,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": STEPS,
        },
        "batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 4},
        "peft_conf": FULL,
        "run_conf": {"model": "chat-model", "final_checkpoint_name": "final-model"},
    }
    for path, value in {**OF_A_METHOD.get(method, {}), **CASES[case]}.items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return values


def child_environment() -> dict[str, str]:
    """Return the environment of a run."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    return {**kept, **ISOLATED, **PORTABLE_ARITHMETIC}


def is_time(name: str) -> bool:
    """Return whether a logged value depends on the clock."""
    return any(part in name for part in ("time", "per_second", "memory"))


def digest(folder: Path) -> str:
    """Return the SHA-256 of all tensors in a folder: names, dtypes, shapes and bytes, in the order of names."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert tensors, f"{folder} has no tensors"
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        result.update(tensor.contiguous().numpy().tobytes())
    return result.hexdigest()


def start_program(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `finetuning` in a folder, in an interpreter of its own."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("finetuning")), *arguments],
        cwd=folder,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_case(case: str, inputs: Path, run_program: RunProgram = start_program) -> dict[str, Any]:
    """Run a case in the folder of `write_inputs` and return its log and the digest of its weights.

    Args:
        case: the name of the case
        inputs: the folder
        run_program: runs `finetuning` with arguments in a folder, in a process whose environment was that of
            `child_environment` when torch was imported
    """
    config = inputs / f"{case}.yaml"
    config.write_text(yaml.safe_dump(config_of(case), sort_keys=False), encoding="utf-8")
    done = run_program([case.split("-")[0], config.name], inputs)
    printed = done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 0, f"{case} ended with code {done.returncode}:\n{printed}"
    output = inputs / f"out-{case}"
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text(encoding="utf-8"))
    log = [{name: entry[name] for name in sorted(entry) if not is_time(name)} for entry in state["log_history"]]
    return {"log": log, "weights": digest(output / "final-model")}


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return a line for each value of a case that is not the expected one."""
    lines = [] if len(actual["log"]) == len(expected["log"]) else ["the number of log entries"]
    for here, golden in zip(actual["log"], expected["log"], strict=False):
        for name in sorted(here.keys() | golden.keys()):
            if here.get(name) != golden.get(name):
                lines.append(f"step {golden.get('step')}, {name}: {here.get(name)}, expected {golden.get(name)}")
    return lines + ["the saved weights"] * (actual["weights"] != expected["weights"])


def made_with() -> dict[str, str]:
    """Return what the values depend on in addition to this repository."""
    libc = " ".join(platform.libc_ver())
    return {**{name: version(name).split("+")[0] for name in LIBRARIES}, "machine": platform.machine(), "libc": libc}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all cases and write the golden values.")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        write_inputs(Path(folder))
        results = list(pool.map(lambda case: run_case(case, Path(folder)), CASES))
    values = {"made_with": made_with(), "cases": dict(zip(CASES, results, strict=True))}
    VALUES.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {VALUES}: {len(CASES)} cases")


if __name__ == "__main__":
    main()
