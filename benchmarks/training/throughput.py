"""Useful tokens per second and peak memory of one supervised run, by ours, TRL, transformers, unsloth, a plain loop.

    python benchmarks/training/throughput.py [--rounds 3] [--steps 12] [--batch 8] [--accumulation 1]
        [--hidden 256 --layers 8 --vocabulary 8192] [--size 1b|8b] [--lora] [--bf16] [--device cpu|cuda]
        [--peer-python PATH] [--variants NAME ...]

On a GPU: `--size 1b --device cuda --bf16`, and `--size 8b --device cuda --bf16 --lora`. `--peer-python` is an
interpreter that has unsloth; without it unsloth's variants are left out.
Each variant is a process of its own and takes its turn in each round. Useful tokens are those of the rows, padding left
out; the first two steps are not counted. `bf16` in a variant's name is autocast, `--bf16` is weights in bfloat16. On a
CPU seconds are CPU seconds of the process with one thread, on a GPU wall seconds after a synchronization. `loss` is
that of the last step, so that equal batches can be held side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from engines import plain_loop, with_trainer, with_trl, write_rows
from measuring import Bench, Meter
from unsloth_engine import with_unsloth

LIMIT = "hand-written loop, end to end"
TRL = "TRL's defaults"
VARIANTS: dict[str, Callable[[Bench], tuple[int, float]]] = {
    LIMIT: lambda bench: plain_loop(bench, True),
    "hand-written loop, end to end, bf16": lambda bench: plain_loop(bench, True, autocast=True),
    "hand-written loop, padded": lambda bench: plain_loop(bench, False),
    "finetuning, end to end": lambda bench: with_trainer(bench, "finetuning, end to end"),
    "finetuning, end to end, bf16": lambda bench: with_trainer(bench, "finetuning, end to end", autocast=True),
    "finetuning, padded": lambda bench: with_trainer(bench, "finetuning, padded"),
    "transformers Trainer, padded": lambda bench: with_trainer(bench, "transformers Trainer, padded"),
    TRL: with_trl,
    "unsloth's defaults": lambda bench: with_unsloth(bench, True),
    "unsloth, float32": lambda bench: with_unsloth(bench, True, bf16=False),
    "unsloth, float32, no checkpointing": lambda bench: with_unsloth(bench, False, bf16=False),
    "unsloth, bf16, no checkpointing": lambda bench: with_unsloth(bench, False, bf16=True),
    "unsloth, bf16, no checkpointing, compiled": lambda bench: with_unsloth(bench, False, True, bf16=True),
}


def run_one(options: argparse.Namespace) -> None:
    """Measures one variant in this process and prints a line of JSON."""
    import torch

    if options.device == "cpu":
        torch.set_num_threads(1)
    meter = Meter(options.device)
    tokens, loss = VARIANTS[options.one](Bench(options.folder, options, meter))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    print(json.dumps({"tokens_per_s": tokens / meter.seconds, "memory": memory, "loss": loss}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--size", choices=("1b", "8b"), help="random weights of about so many parameters")
    parser.add_argument("--lora", action="store_true", help="an adapter of rank 16 on all linear layers")
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peer-python", help="interpreter that has unsloth")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = _parser().parse_args()
    if options.one:
        run_one(options)
        return
    has_peer = options.peer_python is not None
    chosen = options.variants or [name for name in VARIANTS if has_peer or not name.startswith("unsloth")]
    if not has_peer and any(name.startswith("unsloth") for name in chosen):
        raise SystemExit("unsloth's variants need --peer-python")
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environ = os.environ | (quiet if options.device == "cpu" else quiet | {"OMP_NUM_THREADS": "8"})
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"--{name}={getattr(options, name)}" for name in ("hidden", "layers", "vocabulary")]
        sizes += [f"--size={options.size}"] if options.size else []
        make = [sys.executable, str(Path(__file__).with_name("make_inputs.py")), folder, *sizes]
        bench = Bench(Path(folder), options, Meter(options.device))
        subprocess.run([*make, f"--rows={options.steps * bench.rows_a_step * 2}"], check=True, env=environ)
        write_rows(bench)
        for _ in range(options.rounds):
            for name in chosen:
                interpreter = options.peer_python if name.startswith("unsloth") else sys.executable
                command = [interpreter, __file__, "--one", name, "--folder", folder, *sys.argv[1:]]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
                figures[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(name, figures[name][-1], file=sys.stderr, flush=True)
    _tell(figures)


def _tell(figures: dict[str, list[dict[str, float]]]) -> None:
    medians = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in figures.items()}
    print("| variant | useful tokens/s, median | min to max | of the limit | of TRL | peak memory, GB | last loss |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in figures.items():
        values = [run["tokens_per_s"] for run in runs]
        memory = statistics.median(run["memory"] for run in runs) / 1e9
        of = [f"{medians[name] / medians[base]:.2f}" if base in medians else "–" for base in (LIMIT, TRL)]
        spread = f"{min(values):.0f} to {max(values):.0f}"
        loss = f"{runs[-1]['loss']:.6f}"
        print(f"| {name} | {medians[name]:.0f} | {spread} | {of[0]} | {of[1]} | {memory:.2f} | {loss} |", flush=True)


if __name__ == "__main__":
    main()
