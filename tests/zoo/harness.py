"""Take a tiny model of one architecture through the engine: train, resume, merge, reload, generate.

Each step is compared with plain transformers, computed row by row without padding.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.config.sections.model import RunConfig
from finetuning.errors import EXIT_INTERNAL, FinetuningError
from finetuning.model.load import load_model
from finetuning.model.padding import describe_padding_error
from zoo.architectures import RELOADED_DIFFERENTLY, make_model, tiny_config

PASSED = "pass"
RESULTS = Path(__file__).with_name("results.json")
"""What `make test-zoo` found for each architecture with the pinned versions."""
STEPS = (
    "sft full",
    "sft full padded",
    "sft LoRA",
    "sft LoRA padded",
    "resume full",
    "resume LoRA",
    "reload",
    "merge",
    "generate",
)
PROMPTS = ("What is", "The quick brown fox jumps over the lazy dog and", "Color names are red, green, blue")
CONVERSATIONS = (
    ("What is two plus two?", "Four."),
    ("Name a color, please. Any color is fine, say the first one that comes to mind.", "Red, green or blue."),
    ("Hi", "Hello, how are you? What is the capital of France?"),
    ("And now?", "The quick brown fox jumps over the lazy dog."),
)
_RELATIVE_TOLERANCE = 2e-4
_PEFT: dict[str, dict[str, Any]] = {
    "full": {"peft_type": "NO_PEFT"},
    "LoRA": {"peft_type": "LORA", "peft_kwargs": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}},
}


class Mismatch(AssertionError):
    """What the engine computed differs from plain transformers."""


class FaultOfTransformers(Exception):
    """Plain transformers differs from the engine, and is known to be wrong."""


@dataclass
class Architecture:
    """A tiny model of one architecture in a folder, and what became of each step."""

    model_type: str
    base: Path
    work: Path
    rows: Path
    """Training rows as JSONL, one batch of them."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def values(self, name: str, peft: str, **changes: Any) -> dict[str, Any]:
        """Return the config of a run of two steps over one batch of rows."""
        return {
            "data_conf": {
                "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(self.rows)}]},
                "validation_data": {"type": "NONE"},
            },
            "training_args": {
                "output_dir": str(self.work / name),
                "use_cpu": True,
                "learning_rate": 0.003,
                "max_steps": 2,
                "logging_steps": 1,
                "save_strategy": changes.pop("save_strategy", "no"),
                "save_steps": 1,
                "gradient_checkpointing": False,
            },
            "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4},
            "peft_conf": _PEFT[peft],
            "run_conf": {"model": str(self.base), "model_args": dict(self.model_args), **changes},
            "sft_args": {"max_seq_length": 256, "train_on_completions_only": True},
        }


def save_base(model_type: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tiny model of an architecture, with the tokenizer, to a folder."""
    vocabulary = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make_model(tiny_config(model_type, vocabulary))
    if model.can_generate():
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    trainer: Any
    folder: Path
    layout: str
    """How rows are batched, and why."""

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def final(self) -> Path:
        return self.folder / "checkpoint-final"


def train(values: dict[str, Any], algorithm_name: str = "sft") -> Run:
    """Run a config in this process."""
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import make_plan
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking
    from finetuning.training.reporter import RunReporter
    from finetuning.training.run import TrainingJob, run_training

    class KeepsTrainer(RunReporter):
        trainer: Any = None
        layout = ""

        def model_loaded(self, loaded: Any, *args: Any) -> Any:
            self.layout = f"{'padded' if loaded.layout.padded else 'padding-free'}: {loaded.layout.reason}"
            return super().model_loaded(loaded, *args)

        def trainer_built(self, trainer: Any, stop: Any) -> None:
            super().trainer_built(trainer, stop)
            self.trainer = trainer

    config = Path(values["training_args"]["output_dir"] + ".yaml")
    config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    algorithm = ALGORITHMS[algorithm_name]
    experiment = validate(read_document(config), algorithm.experiment).experiment
    topology = ProcessTopology()
    tracking = resolve_tracking(TrackingOptions(None, None, None), experiment.tracking, {})
    reporter = KeepsTrainer(experiment, algorithm.name, topology, tracking)
    job = TrainingJob(experiment, algorithm, make_plan(experiment, topology), topology, reporter, workers=1)
    run_training(job)
    return Run(reporter.trainer, job.output_dir, reporter.layout)


def plain_loss(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean loss over all labels, computed by plain transformers on each row alone."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor(row["labels"])
            logits = _logits(model, torch.tensor(row["input_ids"])[None])[0]
            total += float(cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100))
            count += int((labels[1:] != -100).sum())
    return total / count


def plain_batch_loss(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean loss over all labels, computed by plain transformers on one batch padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[value] * (length - len(row[name]))] for row in rows])

    labels, mask = pad("labels", -100), pad("labels", -1) != -1
    with torch.no_grad():
        logits = _logits(model, pad("input_ids", 0), attention_mask=mask.long())
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100))


def check(architecture: Architecture, steps: Sequence[str] = STEPS) -> dict[str, str]:
    """Run the steps and return the outcome of each: `pass`, `refused: …` or `failed: …`."""
    runs: dict[str, Run] = {}
    functions: dict[str, Callable[[], None]] = {
        **{f"sft {kind}": lambda kind=kind: _first_loss(architecture, kind, runs) for kind in _PEFT},
        **{
            f"sft {kind} padded": lambda kind=kind: _first_loss(architecture, kind, runs, padded=True) for kind in _PEFT
        },
        **{f"resume {kind}": lambda kind=kind: _resume(architecture, kind, runs[kind]) for kind in _PEFT},
        "reload": lambda: _reload(architecture, runs["full"]),
        "merge": lambda: _merge(architecture, runs["LoRA"]),
        "generate": lambda: _generate(architecture, runs["full"].final),
    }
    needs = {"resume full": "full", "resume LoRA": "LoRA", "reload": "full", "merge": "LoRA", "generate": "full"}
    for step in steps:
        needed = needs.get(step)
        if needed is not None and needed not in runs:
            architecture.results[step] = f"not run: sft {needed} did not finish"
            continue
        architecture.results[step] = outcome(functions[step]).replace(str(architecture.work), "WORK")
    return architecture.results


def prepare(model_type: str, work: Path, tokenizer: PreTrainedTokenizerBase) -> Architecture:
    """Write the model and the rows of one architecture."""
    rows = work / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in CONVERSATIONS
    ]
    rows.write_text("".join(json.dumps(line) + os.linesep for line in lines), encoding="utf-8")
    save_base(model_type, work / "base", tokenizer)
    return Architecture(model_type, work / "base", work, rows)


def recorded() -> dict[str, Any]:
    """Return the checked-in results."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def outcome(function: Callable[[], None]) -> str:
    try:
        function()
    except FinetuningError as error:
        kind = "failed with 203" if error.exit_code == EXIT_INTERNAL else f"refused with {error.exit_code}"
        return f"{kind}: {error.problems[0]}"
    except FaultOfTransformers as error:
        return f"differs in plain transformers: {error}"
    except Mismatch as error:
        return f"differs: {error}"
    except Exception as error:  # noqa: BLE001  # The result of the step, whatever it is.
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where is not None else ""
        text = " ".join(str(error).split())
        return f"failed: {type(error).__name__}: {text[:300]} ({place})"
    return PASSED


def _first_loss(architecture: Architecture, kind: str, runs: dict[str, Run], *, padded: bool = False) -> None:
    name = f"{kind}{'-padded' if padded else ''}"
    values = architecture.values(name, kind, save_strategy="no" if padded else "steps")
    if padded:
        values["sft_args"]["batching"] = "padded"
    run = train(values)
    if not padded:
        runs[kind] = run
        architecture.notes["rows"] = run.layout
        architecture.notes["attention"] = str(run.trainer.model.config._attn_implementation)
    rows = list(run.trainer.train_dataset)
    model = AutoModelForCausalLM.from_pretrained(architecture.base, **architecture.model_args).eval()
    error = describe_padding_error(model, "right", 0) if run.trainer.is_padded else None
    if error is not None:
        # The run has warned of it. What it computes is what plain transformers computes for the padded batch.
        architecture.notes["padding"] = error
    expected = plain_loss(model, rows) if error is None else plain_batch_loss(model, rows)
    if _is_close(run.losses[0], expected):
        return
    raise Mismatch(f"the first loss is {run.losses[0]:.6f}, plain transformers has {expected:.6f}")


def _is_close(loss: float, expected: float) -> bool:
    return abs(loss - expected) <= _RELATIVE_TOLERANCE * abs(expected)


def _resume(architecture: Architecture, kind: str, run: Run) -> None:
    values = architecture.values(f"{kind}-resumed", kind, save_strategy="steps", resume_from_checkpoint="auto")
    folder = Path(values["training_args"]["output_dir"])
    shutil.copytree(run.folder / "checkpoint-1", folder / "checkpoint-1")
    resumed = train(values)
    if resumed.losses[-1] != run.losses[-1]:
        raise Mismatch(f"the loss after resuming is {resumed.losses[-1]:.6f}, uninterrupted {run.losses[-1]:.6f}")
    compare_tensors(read_tensors(resumed.final), read_tensors(run.final))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def compare_tensors(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    if actual.keys() != expected.keys():
        raise Mismatch(f"saved tensors differ: {sorted(actual.keys() ^ expected.keys())[:4]}")
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    if different:
        raise Mismatch(f"{len(different)} of {len(expected)} tensors differ, such as {different[0]}")


def _logits(model: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    # Without a cache: some classes cannot make one from their config.
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    return model(input_ids=ids, **inputs, **options).logits.float()


def _sample(model: PreTrainedModel) -> torch.Tensor:
    # No cache: some classes have none of the usual kind.
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(9) * 37 % (vocabulary - 3) + 3
    model.eval()
    with torch.no_grad():
        return _logits(model, ids[None])[0]


def _reload(architecture: Architecture, run: Run) -> None:
    """The saved model, loaded by plain transformers, computes what the trained model in memory does."""
    expected = _sample(run.trainer.model)
    loaded = AutoModelForCausalLM.from_pretrained(run.final, **architecture.model_args)
    reason = RELOADED_DIFFERENTLY.get(architecture.model_type)
    if reason is None:
        _compare_logits(_sample(loaded), expected)
        return
    _compare_logits(_sample(load_model(RunConfig(model=str(run.final)))), expected)
    raise FaultOfTransformers(reason)


def _compare_logits(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    difference, spread = float((actual - expected).abs().max()), float(expected.std())
    if not difference <= tolerance * max(spread, 0.1):
        raise Mismatch(f"the logits differ by {difference:.2g}, their spread is {spread:.2g}")


def _merge(architecture: Architecture, run: Run) -> None:
    """The merge is verified by its own certificate, and by the logits of the trained model in memory."""
    from finetuning.export.merge.merge import merge_adapters

    merged = architecture.work / "merged"
    notes: list[str] = []
    merge_adapters(str(architecture.base), [str(run.final)], merged, log=notes.append)
    architecture.notes["merge"] = "; ".join(note for note in notes if "verifying" not in note)
    expected = _sample(run.trainer.model)
    _compare_logits(_sample(AutoModelForCausalLM.from_pretrained(merged, **architecture.model_args)), expected, 1e-3)


def _generate(architecture: Architecture, folder: Path) -> None:
    """Greedy answers in one batch are those of each prompt alone, and those of plain transformers."""
    from finetuning.config.sections.experiment import GenerationModel
    from finetuning.config.sections.model import ModelArgs, NoQuantization
    from finetuning.inference.prompts import text_prompts
    from finetuning.inference.runner import GenerationJob, ProgressCallback, generate_records

    conf = GenerationModel(model=str(folder), model_args=ModelArgs(**architecture.model_args))
    answers: dict[int, list[str]] = {}
    notes: list[str] = []
    for size in (len(PROMPTS), 1):
        job = GenerationJob(
            text_prompts(list(PROMPTS)), conf, NoQuantization(), {"max_new_tokens": 8, "do_sample": False},
            batch_size=size,
        )  # fmt: skip
        output = architecture.work / f"answers-{size}.jsonl"
        records = generate_records(job, output, ProgressCallback(on_note=notes.append))
        answers[size] = [str(record["all_text_raw"]) for record in records]
    architecture.notes["generate"] = "; ".join(dict.fromkeys(notes))
    if answers[1] != answers[len(PROMPTS)]:
        raise Mismatch(f"batched {answers[len(PROMPTS)]!r}, alone {answers[1]!r}"[:300])
    plain = plain_answers(architecture, folder)
    if answers[1] != plain:
        raise Mismatch(f"the engine {answers[1]!r}, plain transformers {plain!r}"[:300])


def plain_answers(architecture: Architecture, folder: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **architecture.model_args)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers.append(tokenizer.decode(output[0]))
    return answers
