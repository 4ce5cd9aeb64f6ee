"""Useful tokens per second and peak memory of one supervised run, by ours, TRL, transformers and a plain loop.

    python benchmarks/training/throughput.py [--rounds 3] [--steps 12] [--hidden 256 --layers 8 --vocabulary 8192]
        [--size 1b|8b] [--lora] [--bf16] [--device cpu|cuda] [--variants NAME ...]

On a GPU: `--size 1b --device cuda --bf16`, and `--size 8b --device cuda --bf16 --lora`.
Each variant is a process of its own and takes its turn in each round. Useful tokens are those of the rows, padding left
out; the first two steps are not counted. On a CPU seconds are CPU seconds of the process with one thread, on a GPU wall
seconds after a synchronisation. `loss` is that of the last step, so that equal batches can be held side by side.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_STEPS = 2
BATCH = 8


class Meter:
    """Counts from the end of the warm-up on."""

    def __init__(self, device: str):
        self._device = device
        self.steps = 0
        self.seconds = 0.0
        self._began = 0.0

    def now(self) -> float:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def step(self) -> None:
        """One optimizer step is done."""
        self.steps += 1
        if self.steps == WARM_STEPS:
            self._began = self.now()
        self.seconds = self.now() - self._began


def our_rows(folder: Path) -> list[dict[str, list[int]]]:
    """The rows as our engine prepares them, so that all variants train on the same tokens."""
    from transformers import AutoTokenizer

    from finetuning.config.data import Concatenation, DataConfig, NoData
    from finetuning.config.training import SFTArgs
    from finetuning.data.prepare import prepare_sft

    data = DataConfig(
        training_data=Concatenation(type="CONCATENATION", datasets=[{"path": str(folder / "train.jsonl")}]),
        validation_data=NoData(type="NONE"),
        chat_template_name="keep-original",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prepared = prepare_sft(data, SFTArgs(max_seq_length=1024, train_on_completions_only=True), tokenizer)
    return prepared.train.to_list()


def model_of(folder: Path, options: argparse.Namespace) -> Any:
    """The model, with an adapter where asked for."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(0)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(options.device)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def plain_loop(folder: Path, options: argparse.Namespace, meter: Meter, flat: bool) -> tuple[int, float]:
    """A hand-written loop, the least that a step takes: padded, or end to end; logits only where there are labels."""
    import torch

    from finetuning.data.collate import FlatteningCollator, PaddingCollator
    from finetuning.model.segments import enable_segments

    rows = our_rows(folder)
    model = model_of(folder, options)
    if flat:
        enable_segments(model, model.peft_config["default"] if options.lora else None)
    collate = FlatteningCollator() if flat else PaddingCollator(0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-5)
    tokens, loss = 0, 0.0
    model.train()
    for step in range(options.steps):
        batch = collate(rows[step * BATCH : (step + 1) * BATCH])
        batch = {name: value.to(options.device) if hasattr(value, "to") else value for name, value in batch.items()}
        targets, _ = batch.pop("shift_labels"), batch.pop("labels")
        wanted = targets.ne(-100)
        output = model(**batch, logits_to_keep=wanted, use_cache=False)
        result = torch.nn.functional.cross_entropy(output.logits.flatten(0, -2).float(), targets[wanted])
        result.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.step()
        loss = float(result)
        if step >= WARM_STEPS:
            tokens += sum(len(row["input_ids"]) for row in rows[step * BATCH : (step + 1) * BATCH])
    return tokens, loss


def with_trainer(folder: Path, options: argparse.Namespace, meter: Meter, kind: str) -> tuple[int, float]:
    """transformers' Trainer on padded rows, or our trainer on padded or flat ones, over the same order of rows."""
    import datasets
    import transformers

    from finetuning.algorithms.sft import build_trainer
    from finetuning.data.collate import FlatteningCollator, PaddingCollator
    from finetuning.model.segments import enable_segments

    rows = our_rows(folder)
    model = model_of(folder, options)
    order: list[int] = []
    sizes = [len(row["input_ids"]) for row in rows]

    class Watch(transformers.TrainerCallback):
        """Counts steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.step()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / kind),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        optim="adamw_torch",
    )
    data = datasets.Dataset.from_list(rows)
    order = list(range(options.steps * BATCH))
    if kind == "transformers Trainer, padded":
        collate = PaddingCollator(0)

        def padded(batch: list[dict[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in collate(batch).items() if name != "shift_labels"}

        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=padded, callbacks=[Watch()]
        )
    else:
        flat = kind.endswith("end to end")
        if flat:
            reason = enable_segments(model, model.peft_config["default"] if options.lora else None)
            if reason:
                raise SystemExit(reason)
        trainer = _our_trainer(build_trainer, model, arguments, data, Watch(), folder, flat)
        trainer.data_collator = FlatteningCollator() if flat else PaddingCollator(0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(sizes[index] for index in order[WARM_STEPS * BATCH :]), losses[-1]


def _our_trainer(
    build: Callable[..., Any], model: Any, arguments: Any, data: Any, watch: Any, folder: Path, flat: bool
) -> Any:
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from finetuning.algorithms.method import Layout

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return build(
        SimpleNamespace(
            model=model,
            arguments=arguments,
            data=SimpleNamespace(train=data, validation=None),
            tokenizer=SimpleNamespace(tokenizer=tokenizer, pad_shown_as=None),
            layout=Layout(not flat, "benchmark"),
            callbacks=[watch],
            end_of_turn=None,
            experiment=SimpleNamespace(
                sft_args=SimpleNamespace(max_seq_length=1024, logits_at_once="auto"), training_args=None
            ),
            peft_config=None,
            load_reference=None,
        )
    )


def with_trl(folder: Path, options: argparse.Namespace, meter: Meter) -> tuple[int, float]:
    """TRL's SFTTrainer with its defaults, on rows that it tokenises itself."""
    import transformers
    import trl
    from datasets import load_dataset

    class Watch(transformers.TrainerCallback):
        """Counts steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.step()

    trainer = trl.SFTTrainer(
        model=model_of(folder, options),
        args=trl.SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            use_cpu=options.device == "cpu",
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train"),
        callbacks=[Watch()],
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
    )
    sizes = [len(row) for row in trainer.train_dataset["input_ids"]]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(sizes[WARM_STEPS * BATCH : options.steps * BATCH]), losses[-1]


VARIANTS: dict[str, Callable[[Path, argparse.Namespace, Meter], tuple[int, float]]] = {
    "hand-written loop, end to end": lambda *given: plain_loop(*given, True),
    "hand-written loop, padded": lambda *given: plain_loop(*given, False),
    "finetuning, end to end": lambda *given: with_trainer(*given, "finetuning, end to end"),
    "finetuning, padded": lambda *given: with_trainer(*given, "finetuning, padded"),
    "transformers Trainer, padded": lambda *given: with_trainer(*given, "transformers Trainer, padded"),
    "TRL's defaults": with_trl,
}


def run_one(options: argparse.Namespace) -> None:
    """Measures one variant in this process and prints a line of JSON."""
    if options.device == "cpu":
        import torch

        torch.set_num_threads(1)
    meter = Meter(options.device)
    tokens, loss = VARIANTS[options.one](options.folder, options, meter)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.device == "cuda":
        import torch

        memory = torch.cuda.max_memory_allocated()
    print(json.dumps({"tokens_per_s": tokens / meter.seconds, "memory": memory, "loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--size", choices=("1b", "8b"), help="random weights of about so many parameters")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options)
        return
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environ = os.environ | (quiet if options.device == "cpu" else quiet | {"OMP_NUM_THREADS": "8"})
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"--{name}={getattr(options, name)}" for name in ("hidden", "layers", "vocabulary")]
        sizes += [f"--size={options.size}"] if options.size else []
        make = [sys.executable, str(Path(__file__).with_name("make_inputs.py")), folder, *sizes]
        subprocess.run([*make, f"--rows={options.steps * BATCH * 2}"], check=True, env=environ)
        for _ in range(options.rounds):
            for name in options.variants:
                command = [sys.executable, __file__, "--one", name, "--folder", folder, *sys.argv[1:]]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
                figures[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    _tell(figures)


def _tell(figures: dict[str, list[dict[str, float]]]) -> None:
    medians = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in figures.items()}
    limit = medians.get("hand-written loop, end to end")
    trl = medians.get("TRL's defaults")
    print("| variant | useful tokens/s, median | min to max | of the limit | of TRL | peak memory, GB | last loss |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in figures.items():
        values = [run["tokens_per_s"] for run in runs]
        memory = statistics.median(run["memory"] for run in runs) / 1e9
        share = f"{medians[name] / limit:.2f}" if limit else "–"
        ratio = f"{medians[name] / trl:.2f}" if trl else "–"
        spread = f"{min(values):.0f} to {max(values):.0f}"
        loss = f"{runs[-1]['loss']:.6f}"
        print(f"| {name} | {medians[name]:.0f} | {spread} | {share} | {ratio} | {memory:.2f} | {loss} |")


if __name__ == "__main__":
    main()
