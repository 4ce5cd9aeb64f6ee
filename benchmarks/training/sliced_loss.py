"""Peak memory and time of a step's forward and backward pass, with all logits at once and slice by slice.

    python benchmarks/training/sliced_loss.py [--labels 2304] [--vocabulary 128256] [--hidden 256] [--at-once 256 512]
        [--rounds 3] [--bf16] [--device cpu|cuda]

A random Llama of two layers with a tied head, every token with a label. Each variant is a process of its own and takes
its turn in each round. Memory is what the passes add to the model, gradients among it: on a CPU the growth of the
process's peak, on a GPU that of the allocator. Seconds are CPU seconds of one thread, on a GPU wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

WIDTH = 256


def run_one(options: argparse.Namespace) -> None:
    """Measures one variant in this process and prints a line of JSON."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from finetuning.algorithms.sft import chunk_sizes
    from finetuning.trainer.chunked_cross_entropy import ChunkedCrossEntropy

    on_gpu = options.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    set_seed(0)
    shape = {"hidden_size": options.hidden, "intermediate_size": 2 * options.hidden, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=options.vocabulary, **shape, **heads)
    model = LlamaForCausalLM(config).to(options.device, torch.bfloat16 if options.bf16 else torch.float32).train()
    ids = torch.randint(options.vocabulary, (options.labels // WIDTH, WIDTH), device=options.device)
    wanted = torch.ones_like(ids, dtype=torch.bool)
    inputs = {"input_ids": ids, "logits_to_keep": wanted, "use_cache": False}
    targets = ids.roll(-1, 1)[wanted]
    at_once = int(options.one) if options.one.isdecimal() else options.one
    most, per_chunk = chunk_sizes(at_once, options.vocabulary)
    slices = ChunkedCrossEntropy(model, per_chunk, None)

    def step() -> Any:
        sliced = slices(model, inputs, targets) if len(targets) > most else None
        if sliced is None:
            total = cross_entropy(model(**inputs).logits.flatten(0, -2).float(), targets, reduction="sum")
        else:
            total = sliced[1]
        (total / len(targets)).backward()
        model.zero_grad()
        return total.item() / len(targets)

    def memory() -> int:
        return (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )

    before = memory()
    loss = step()
    peak = memory() - before
    clock = time.perf_counter if on_gpu else time.process_time
    began = clock()
    loss = step()
    print(json.dumps({"seconds": clock() - began, "memory": peak, "loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=2304, help=f"tokens, in rows of {WIDTH}")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--at-once", nargs="+", default=["all", "auto", "256"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options)
        return
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in options.at_once}
    for _ in range(options.rounds):
        for name in options.at_once:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
            figures[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    print("| logits_at_once | memory over the model, GB | seconds, median | loss |")
    print("|---|---|---|---|")
    for name, runs in figures.items():
        memory, seconds = (statistics.median(run[field] for run in runs) for field in ("memory", "seconds"))
        print(f"| {name} | {memory / 1e9:.2f} | {seconds:.2f} | {runs[-1]['loss']:.6f} |")


if __name__ == "__main__":
    main()
