"""Merging an adapter, and making it fit for vLLM: time and peak memory against PEFT, against torch, and against `cp`.

A random Llama and a random LoRA on all its linear layers; each measurement is a process of its own, the variants take
turns, medians count. `python benchmarks/merge.py --size 1.1b --rounds 2` prints two Markdown tables. PEFT's times are
of scripts that load, merge and save; `merge_adapter` flushes to disk what it writes, which `cp` and PEFT leave to the
system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "0.1b": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
VOCABULARY = 32000

MAKE = """
import sys, json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
folder, sizes = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, tie_word_embeddings=False, **sizes))
model.save_pretrained(folder + "/base", max_shard_size="1GB")
model.config._name_or_path = folder + "/base"
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data = torch.randn_like(parameter) * 0.01
model.save_pretrained(folder + "/adapter")
"""
PEFT = """
import sys
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out, safe = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload(safe_merge=safe == "safe").save_pretrained(out, max_shard_size="1GB")
"""
TORCH_CONVERSION = """
import sys
from safetensors.torch import load_file, save_file
adapter, out = sys.argv[1:]
tensors = load_file(adapter + "/adapter_model.safetensors")
save_file({name: tensor for name, tensor in tensors.items() if ".lora_" in name}, out, {"format": "pt"})
"""
LIBRARIES = "import finetuning.export.merge.merge, transformers.conversion_mapping"


@dataclass(frozen=True)
class Measurement:
    """One run of one variant."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def measure(command: Sequence[str]) -> Measurement:
    """Time and peak memory of a command, which must succeed."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{told.read().decode()[-3000:]}")
    return Measurement(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def alternate(
    variants: dict[str, Sequence[str]], rounds: int, clean: Callable[[], None]
) -> dict[str, list[Measurement]]:
    """All variants in turn, so that a busy minute of the machine meets each of them."""
    found: dict[str, list[Measurement]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, command in variants.items():
            clean()
            found[name].append(measure(command))
            print(f"round {turn + 1}: {name}: {found[name][-1].wall_s:.2f} s", file=sys.stderr)
    clean()
    return found


def table(found: dict[str, list[Measurement]], reference: str) -> str:
    """Markdown: medians, and ratios to the reference."""
    wall = {name: statistics.median(m.wall_s for m in runs) for name, runs in found.items()}
    cpu = {name: statistics.median(m.cpu_s for m in runs) for name, runs in found.items()}
    lines = [
        f"| variant | wall, s | ratio to {reference} | CPU, s | ratio | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        peak = statistics.median(m.peak_bytes for m in runs) / 1e9
        ratios = wall[name] / wall[reference], cpu[name] / max(cpu[reference], 1e-3)
        lines.append(
            f"| {name} | {wall[name]:.2f} | {ratios[0]:.2f} | {cpu[name]:.2f} | {ratios[1]:.2f} | {peak:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", help="folder for models and results (default: a temporary one)")
    options = parser.parse_args()
    work = Path(options.work or tempfile.mkdtemp(prefix="merge-benchmark-"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    base, adapter, out = work / "base", work / "adapter", work / "out"
    if not (adapter / "adapter_config.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        sizes = json.dumps({**SIZES[options.size], "vocab_size": VOCABULARY})
        subprocess.run([sys.executable, "-c", MAKE, str(work), sizes], check=True, capture_output=True)

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)

    python, scripts = sys.executable, Path(sys.executable).parent
    merges = {
        "merge_adapter --no-verify": [str(scripts / "merge_adapter"), str(base), str(adapter), str(out), "--no-verify"],
        "merge_adapter, verified": [str(scripts / "merge_adapter"), str(base), str(adapter), str(out)],
        "PEFT merge_and_unload": [python, "-c", PEFT, str(base), str(adapter), str(out), "plain"],
        "PEFT safe_merge": [python, "-c", PEFT, str(base), str(adapter), str(out), "safe"],
        "cp": ["cp", "-r", str(base), str(out)],
        "cp, flushed to disk": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)],
        "importing the libraries": [python, "-c", LIBRARIES],
    }
    found = alternate(merges, options.rounds, clean)
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
    from finetuning.model.safetensors_io import read_model_headers

    largest = max(entry.num_bytes for entry in read_model_headers(base).values())
    ours, libraries = (
        statistics.median(m.peak_bytes for m in found[name])
        for name in ("merge_adapter --no-verify", "importing the libraries")
    )
    print(f"\n## Merging a rank-16 LoRA on all linear layers into a {options.size} Llama of bfloat16\n")
    print(table(found, "PEFT safe_merge"))
    print(
        f"\nOver the libraries the streaming merge takes {(ours - libraries) / largest:.1f} times the largest tensor"
        f" ({largest / 1e6:.0f} MB).\n"
    )
    converted = work / "converted.safetensors"
    conversions = {
        "create_vllm_compatible_adapter": [
            str(scripts / "create_vllm_compatible_adapter"), str(adapter), "--output", str(out), "--base", str(base)
        ],
        "torch load and save": [python, "-c", TORCH_CONVERSION, str(adapter), str(converted)],
        "cp": ["cp", "-r", str(adapter), str(out)],
    }  # fmt: skip
    print("## Making the adapter fit for vLLM\n")
    print(table(alternate(conversions, options.rounds, clean), "torch load and save"))
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
