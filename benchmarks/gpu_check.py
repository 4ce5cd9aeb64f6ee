"""Check the engine on a GPU: correctness first, then speed and memory, each part with its own time limit.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--tiny] [--parts NAME ...] [--out gpu-check.json]

A part is a process of its own: one that fails or hangs costs nothing but itself. Its last line is a JSON object, which
goes into the result file under the part's name, with its seconds and exit code. `--tiny` uses models that a CPU
trains in seconds; with `--device cpu` everything but the kernels of a GPU runs anywhere. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "training"))

TOTAL_S = 480
_CPU_PATIENCE = 6


@dataclass(frozen=True)
class Size:
    """A Llama of random weights, and its rows."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tokens: int
    """Of a micro-batch."""
    row: int
    """Tokens of the longest row."""


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, 512, 512, 128),
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, 16_384, 4096),
    "8b": Size(4096, 14_336, 32, 32, 8, 128_256, 16_384, 4096),
}


@dataclass(frozen=True)
class Options:
    """What a part is given."""

    device: str
    tiny: bool
    folder: Path

    def size(self, name: str) -> Size:
        return SIZES["tiny" if self.tiny else name]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def versions(options: Options) -> dict[str, Any]:
    """Versions, the device, and what a large matrix product reaches."""
    import torch

    found = {name: _version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "triton")}
    size = 1024 if options.tiny else 8192
    a = torch.randn(size, size, device=options.device, dtype=torch.bfloat16)
    seconds = _timed(options, lambda: a @ a, 3 if options.tiny else 20)
    name = torch.cuda.get_device_name() if options.on_gpu else "cpu"
    return {"packages": found, "device": name, "matmul_tflops": 2 * size**3 / seconds / 1e12}


def attention(options: Options) -> dict[str, Any]:
    """Row loop and torch's varlen kernel over packs of random lengths, against sdpa in float64."""
    import torch

    from finetuning.model.gpu_attention import torch_varlen_attention
    from finetuning.model.varlen_attention import varlen_attention

    size, dtype = options.size("8b"), torch.bfloat16
    width = size.hidden // size.heads
    random.seed(0)
    result: dict[str, Any] = {}
    for pack in range(3):
        lengths = _random_lengths(size)
        cu = torch.tensor([0, *_cumulative(lengths)], dtype=torch.int32, device=options.device)
        shape = (1, size.heads, sum(lengths), width)
        query = torch.randn(shape, device=options.device, dtype=dtype)
        key, value = (
            torch.randn((1, size.key_value_heads, sum(lengths), width), device=options.device, dtype=dtype)
            for _ in range(2)
        )
        exact, _ = varlen_attention(
            torch.nn.Module(), *(t.double() for t in (query, key, value)), None, cu_seq_lens_q=cu, row_lengths=lengths
        )
        calls = {"row loop": varlen_attention, **({"torch varlen": torch_varlen_attention} if options.on_gpu else {})}
        for name, call in calls.items():
            states = (torch.nn.Module(), query, key, value, None)
            run = partial(call, *states, cu_seq_lens_q=cu, max_length_q=max(lengths), row_lengths=lengths)
            error = float((run()[0].double() - exact).abs().max())
            entry = result.setdefault(name, {"max_error": 0.0, "ms": []})
            entry["max_error"] = max(entry["max_error"], error)
            entry["ms"].append(1e3 * _timed(options, run, 3))
            if error > 0.03:
                raise SystemExit(f"{name}: pack {pack} differs by {error}")
    return result


def loss(options: Options) -> dict[str, Any]:
    """The fused loss in chunks against all logits in float64, and the memory that it saves."""
    import torch

    from finetuning.trainer.chunked_cross_entropy import FusedLinearCrossEntropy

    size = options.size("8b")
    labels = 64 if options.tiny else 2048
    torch.manual_seed(0)
    hidden = torch.randn(labels, size.hidden, device=options.device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(size.vocabulary, size.hidden, device=options.device) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(size.vocabulary, (labels,), device=options.device)
    total: Any = FusedLinearCrossEntropy.apply(hidden, weight, None, targets, 16 if options.tiny else 1024)
    total.backward()
    double = hidden.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(double @ weight.detach().double().t(), targets, reduction="sum")
    exact.backward()
    assert hidden.grad is not None
    assert double.grad is not None
    relative = float((hidden.grad.double() - double.grad).norm() / double.grad.norm())
    difference = abs(float(total.detach()) - float(exact.detach())) / float(exact.detach())
    if relative > 0.02 or difference > 1e-3:
        raise SystemExit(f"the fused loss differs: {difference:.1e}, its gradient {relative:.1e}")
    return {"loss_error": difference, "gradient_error": relative}


def waits(options: Options) -> dict[str, Any]:
    """Steps of supervised fine-tuning in which torch raises an error if anything waits for the device."""
    import torch
    from transformers import TrainerCallback

    class Strict(TrainerCallback):
        """From the second step on; logging and the end may read."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if options.on_gpu and state.global_step >= 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if options.on_gpu:
                torch.cuda.set_sync_debug_mode("default")

    done = _train(options, "1b", {"peft_conf": LORA}, callbacks=[Strict()])
    return {"steps": done["steps"]}


LORA = {
    "peft_type": "LORA",
    "peft_kwargs": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
}
FULL = {"peft_type": "NO_PEFT"}


def lora_8b(options: Options) -> dict[str, Any]:
    """LoRA as in the recipe, and without checkpointing: tokens per second, MFU, peak memory against the rehearsal."""
    variants = {
        "recipe": {"training_args.gradient_checkpointing": True},
        "no checkpointing": {},
        "dropout 0.05": {
            "training_args.gradient_checkpointing": True,
            "peft_conf": {**LORA, "peft_kwargs": {**LORA["peft_kwargs"], "lora_dropout": 0.05}},
        },
    }
    return {
        name: _train(options, "8b", {"peft_conf": LORA, **changes}, name=name) for name, changes in variants.items()
    }


def full_1b(options: Options) -> dict[str, Any]:
    """Full fine-tuning."""
    return _train(options, "1b", {"peft_conf": FULL})


def out_of_memory(options: Options) -> dict[str, Any]:
    """Memory that runs out in the middle of a run: the step is repeated in smaller micro-batches."""
    if not options.on_gpu:
        return {"skipped": "needs a GPU"}
    import torch

    torch.cuda.set_per_process_memory_fraction(0.12)
    changes = {
        "peft_conf": LORA,
        "batchsize_conf": {"total_train_batch_size": 16, "max_per_device_train_batch_size": 16},
    }
    return _train(options, "1b", changes)


def qlora(options: Options) -> dict[str, Any]:
    """LoRA on 4-bit weights."""
    four_bits = {"quantization_type": "bits-and-bytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return _train(options, "1b", {"peft_conf": LORA, "quant_conf": four_bits})


def resume(options: Options) -> dict[str, Any]:
    """Save, resume and generate: a resumed run ends as one that was not interrupted."""
    import torch

    saving = {"peft_conf": LORA, "training_args.save_strategy": "steps", "training_args.save_steps": 3}
    whole = _train(options, "1b", saving, name="whole")
    checkpoint = options.folder / "whole" / "checkpoint-3"
    again = {**saving, "run_conf.resume_from_checkpoint": str(checkpoint)}
    resumed = _train(options, "1b", again, name="resumed")
    difference = abs(whole["losses"][-1] - resumed["losses"][-1])
    if difference > 1e-2:
        raise SystemExit(f"the resumed run ends at another loss: {difference}")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.folder / "whole" / "checkpoint-final").to(options.device)
    ids = torch.arange(5, 15, device=options.device)[None]
    output = model.generate(ids, max_new_tokens=8, do_sample=False)
    return {"difference": difference, "generated": output.shape[1] - 10}


def peers(options: Options) -> dict[str, Any]:
    """TRL's defaults, and ours, on the same rows; with unsloth if `UNSLOTH_PYTHON` names an interpreter that has it."""
    script = Path(__file__).parent / "training" / "throughput.py"
    command = [sys.executable, str(script), "--device", options.device, "--lora", "--steps", "6", "--rounds", "1"]
    command += (
        ["--hidden", "64", "--layers", "2", "--vocabulary", "512"] if options.tiny else ["--size", "1b", "--bf16"]
    )
    names = ["hand-written loop, end to end", "finetuning, end to end", "TRL's defaults"]
    peer = os.environ.get("UNSLOTH_PYTHON")
    if peer:
        command += ["--peer-python", peer]
        names.append("unsloth's defaults")
    done = subprocess.run([*command, "--variants", *names], capture_output=True, text=True, check=True)
    return {"table": done.stdout.splitlines()}


@dataclass(frozen=True)
class Part:
    """A part of the check, its limit, and whether the others are meaningless without it."""

    run: Callable[[Options], dict[str, Any]]
    seconds: int


PARTS = {
    "versions": Part(versions, 40),
    "attention": Part(attention, 60),
    "loss": Part(loss, 40),
    "waits": Part(waits, 60),
    "lora_8b": Part(lora_8b, 150),
    "full_1b": Part(full_1b, 60),
    "out_of_memory": Part(out_of_memory, 60),
    "qlora": Part(qlora, 60),
    "resume": Part(resume, 80),
    "peers": Part(peers, 90),
}


def _train(
    options: Options, size_name: str, changes: dict[str, Any], *, name: str = "run", callbacks: Any = ()
) -> dict[str, Any]:
    """Train six steps, and return losses, speed after the second step, and peak memory beside the rehearsal's."""
    import torch

    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import make_plan
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking
    from finetuning.training.device_settings import with_gpu_defaults
    from finetuning.training.reporter import RunReporter
    from finetuning.training.run import TrainingJob, run_training

    topology, algorithm = ProcessTopology(), ALGORITHMS["sft"]
    config = _write_config(
        options, options.size(size_name), {**changes, "training_args.output_dir": str(options.folder / name)}
    )
    experiment, _ = with_gpu_defaults(validate(read_document(config), algorithm.experiment).experiment, topology)
    plan = make_plan(experiment, topology)
    watch = _watch(options)

    class KeepsTrainer(RunReporter):
        """Keeps the trainer, for its log."""

        trainer: Any = None

        def trainer_built(self, trainer: Any, stop: Any) -> None:
            super().trainer_built(trainer, stop)
            self.trainer = trainer

    tracking = resolve_tracking(TrackingOptions(None, None, None), experiment.tracking, {})
    reporter = KeepsTrainer(experiment, "sft", topology, tracking)
    if options.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run_training(TrainingJob(experiment, algorithm, plan, topology, reporter, 1, [watch, *callbacks]))
    losses = [entry["loss"] for entry in reporter.trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"losses are not finite: {losses}")
    result = {
        "losses": losses,
        "steps": reporter.trainer.state.global_step,
        "seconds_per_step": watch.seconds / max(watch.steps, 1),
        "tokens_per_second": watch.tokens(reporter.trainer) / max(watch.seconds, 1e-9),
        "oom_retries": list(reporter.trainer.oom_retries),
    }
    return result | _memory(options, experiment, plan, watch, result)


def _memory(options: Options, experiment: Any, plan: Any, watch: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Return the peak and the rehearsed peak, and the MFU by the rehearsed FLOPs."""
    import torch

    from finetuning.errors import ConfigError
    from finetuning.training.memory_plan import rehearse_run
    from finetuning.training.rehearsal import DEVICES

    device = DEVICES["h200" if options.on_gpu else "h100"]
    try:
        rehearsed = rehearse_run(experiment, plan, device)
    except ConfigError as error:
        return {"rehearsal": str(error)}
    flops = rehearsed.flops_per_step
    found = {"rehearsed_gib": sum(rehearsed.peak_bytes.values()) / 2**30, "rehearsed_seconds": rehearsed.step_seconds}
    if options.on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["mfu"] = flops / result["seconds_per_step"] / device.half
    return found


def _watch(options: Options) -> Any:
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Times the steps after the second."""

        def __init__(self) -> None:
            self.steps, self.seconds, self._began, self._seen = 0, 0.0, 0.0, 0

        def _now(self) -> float:
            if options.on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

        def tokens(self, trainer: Any) -> float:
            return trainer.tokens_seen * self.steps / max(trainer.state.global_step, 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self._began = self._now()
            elif state.global_step == state.max_steps:
                self.seconds, self.steps = self._now() - self._began, state.global_step - 2

    return Watch()


def _write_config(options: Options, size: Size, changes: dict[str, Any]) -> Path:
    """Write a model of random weights, rows and a config; each once per folder."""
    import yaml

    model = options.folder / f"model-{size.hidden}"
    if not model.exists():
        _write_model(model, size)
    rows = options.folder / "rows.jsonl"
    if not rows.exists():
        random.seed(0)
        words = ["red", "green", "blue", "yellow", "one", "two", "three", "four"]
        text = [" ".join(random.choices(words, k=max(length // 2, 4))) for length in _random_lengths(size, 64)]
        rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in text), encoding="utf-8")
    values: dict[str, Any] = {
        "method": "sft",
        "data_conf": {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(rows)}]},
            "validation_data": {"type": "NONE"},
        },
        "training_args": {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-4},
        "batchsize_conf": {
            "total_train_batch_size": size.tokens // size.row,
            "max_per_device_train_batch_size": size.tokens // size.row,
        },
        "peft_conf": FULL,
        "run_conf": {"model": str(model)},
        "sft_args": {"max_seq_length": size.row, "packing": True},
    }
    if not options.on_gpu:
        values["training_args"]["use_cpu"] = True
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    config = options.folder / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return config


def _write_model(folder: Path, size: Size) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=size.row
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.row,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.set_default_dtype(torch.bfloat16 if size.hidden > 64 else torch.float32)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def _random_lengths(size: Size, rows: int | None = None) -> list[int]:
    lengths: list[int] = []
    while (len(lengths) < rows) if rows else (sum(lengths) < size.tokens):
        lengths.append(random.randint(size.row // 16, size.row - 8))
    return lengths


def _cumulative(lengths: list[int]) -> list[int]:
    total, result = 0, []
    for length in lengths:
        total += length
        result.append(total)
    return result


def _timed(options: Options, call: Callable[[], Any], repeats: int) -> float:
    import torch

    call()
    if options.on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if options.on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run_part(name: str, options: Options, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, and return what it found, or how it failed."""
    arguments = ["--device", options.device, "--one", name, "--folder", str(options.folder)]
    command = [sys.executable, __file__, *arguments, *(["--tiny"] if options.tiny else [])]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1", "FINETUNING_CACHE": "off"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=os.environ | quiet, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "timed out", "seconds": round(time.perf_counter() - start, 1)}
    entry: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    if done.returncode:
        return entry | {"status": "failed", "error": done.stderr.strip().splitlines()[-5:]}
    return entry | {"status": "passed", "result": json.loads(done.stdout.strip().splitlines()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--one", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        options = Options(arguments.device, arguments.tiny, arguments.folder)
        print(json.dumps(PARTS[arguments.one].run(options)))
        return 0
    results: dict[str, Any] = {}
    # The limits are those of a GPU.
    patience = 1 if arguments.device == "cuda" else _CPU_PATIENCE
    end = time.perf_counter() + TOTAL_S * patience
    with tempfile.TemporaryDirectory() as folder:
        options = Options(arguments.device, arguments.tiny, Path(folder))
        for name in arguments.parts:
            remaining = end - time.perf_counter()
            if remaining < 5:
                results[name] = {"status": "not started: no time left"}
                continue
            part = Path(folder) / name
            part.mkdir()
            results[name] = run_part(
                name, Options(options.device, options.tiny, part), min(PARTS[name].seconds * patience, remaining)
            )
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {results[name]['status']} in {results[name]['seconds']} s", flush=True)
    failed = [name for name, entry in results.items() if entry["status"] != "passed"]
    print(f"{len(results) - len(failed)} of {len(results)} passed{': not ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
