"""Verifying a checkpoint against the weights in memory: its time beside that of the save.

A random Llama of bfloat16 or float32, or a LoRA on it, with a tokenizer of 128,000 tokens, saved by the trainer as a
checkpoint with the states of AdamW. `python benchmarks/saving.py --size 0.4b --rounds 5` prints a Markdown table of
medians. A save ends when all files are on disk (fsync). The first save of a run also loads the tokenizer and compares
it; later ones compare the digest of its files.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from finetuning.trainer.mixin import TrainerMixin

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "0.1b": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "0.4b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 22, "num_attention_heads": 16},
}
NUM_TOKENS = {size: 2_000 if size == "tiny" else 128_000 for size in SIZES}


class SavingTrainer(TrainerMixin, Trainer):
    """A trainer that measures how long the comparison of each save takes."""

    verification_s = 0.0
    verification_cpu_s = 0.0

    def _compare_with_saved(self, *args: Any) -> list[str]:
        return self._measured(super()._compare_with_saved, *args)

    def _check_written(self, *args: Any) -> None:
        self._measured(super()._check_written, *args)

    def _measured(self, function: Callable[..., Any], *args: Any) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        result = function(*args)
        self.verification_s += time.perf_counter() - start
        self.verification_cpu_s += time.process_time() - cpu_start
        return result


def make_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for left in list(vocabulary):
        for right in alphabet:
            if len(vocabulary) < num_tokens - 1 and left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    for left in [token for token in vocabulary if len(token) == 2]:
        if len(vocabulary) >= num_tokens - 1:
            break
        vocabulary[left + "e"] = len(vocabulary)
        merges.append((left, "e"))
    vocabulary["</s>"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def make_trainer(size: str, dtype: torch.dtype, folder: Path, *, is_lora: bool) -> SavingTrainer:
    tokenizer = make_tokenizer(NUM_TOKENS[size])
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES[size]))
    torch.set_default_dtype(torch.float32)
    if is_lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_total_limit=1)
    trainer = SavingTrainer(model=model, args=arguments, processing_class=tokenizer)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.full_like(weight, 1e-3)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    # A checkpoint holds the losses since the last log, which the training loop begins with.
    trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.0), 0
    return trainer


@dataclass(frozen=True)
class Save:
    """Seconds of a save, and of its verification."""

    wall_s: float
    verification_s: float
    cpu_s: float
    verification_cpu_s: float


def measure(trainer: SavingTrainer, rounds: int) -> list[Save]:
    saves: list[Save] = []
    for step in range(1, rounds + 2):
        trainer.state.global_step = step
        trainer.verification_s = trainer.verification_cpu_s = 0.0
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer._save_checkpoint(trainer.model, None)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        saves.append(Save(wall_s, trainer.verification_s, cpu_s, trainer.verification_cpu_s))
    return saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.4b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    print(
        "| model | checkpoint, GB | save, s | verification, s | share | of CPU time | first save, s | verification, s |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for name, dtype, is_lora in (
        ("all weights, float32", torch.float32, False),
        ("all weights, bfloat16", torch.bfloat16, False),
        ("LoRA, r = 16, bfloat16", torch.bfloat16, True),
    ):
        folder = Path(tempfile.mkdtemp(prefix="saving-benchmark-", dir=options.work))
        try:
            first, *later = measure(make_trainer(options.size, dtype, folder, is_lora=is_lora), options.rounds)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
        finally:
            shutil.rmtree(folder)
        wall, verified, cpu, verified_cpu = (
            statistics.median(getattr(save, field.name) for save in later) for field in fields(Save)
        )
        print(
            f"| {name} | {size:.2f} | {wall:.2f} | {verified:.3f} | {verified / wall:.1%} | {verified_cpu / cpu:.1%}"
            f" | {first.wall_s:.2f} | {first.verification_s:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
