"""Evaluate models on tasks of lm-evaluation-harness, by its command line.

The program runs in a process of its own, so that it may be installed in another environment. Its arguments and its
results are those of lm_eval 0.4.13.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning.config.pretrained_config import read_pretrained_config
from finetuning.config.sections.model import NoQuantization
from finetuning.data.samples import JsonObject
from finetuning.errors import ConfigError, Location, MissingPackageError, ModelError, read_json_object, reading
from finetuning.inference.evaluation import (
    Candidate,
    Evaluation,
    MetricDifference,
    MetricValue,
    normal_interval,
    wilson_interval,
)
from finetuning.inference.load import ADAPTER_CONFIG, has_chat_template

_NO_SHARES = ("perplexity", "bits_per_byte", "bleu", "chrf", "ter", "rouge")
"""Metrics, or parts of their names, whose values are no shares between 0 and 1."""
_PROPORTIONS = ("acc", "acc_norm", "exact_match")
"""Metrics whose value is the share of right rows."""


@dataclass(frozen=True)
class HarnessOptions:
    """What to evaluate on, and with which program."""

    program: str
    tasks: tuple[str, ...]
    include_path: Path | None = None
    """Folder with YAML files of further tasks."""
    limit: int | None = None
    batch_size: str = "8"
    seed: int = 42


@dataclass(frozen=True)
class _Measured:
    """The value of a metric, and its standard error; None if that is unknown."""

    value: float
    error: float | None
    rows: int


def evaluate_tasks(
    candidates: Sequence[Candidate],
    options: HarnessOptions,
    *,
    name: str,
    folder: Path,
    on_note: Callable[[str], None] = lambda note: None,
) -> Evaluation:
    """Evaluate each model on the tasks. The output of each process is written to a file in `folder`.

    Raises:
        ConfigError: a task is not known, or no task is named.
        MissingPackageError: lm_eval is not installed.
        ModelError: it fails, or evaluates this adapter wrongly.
    """
    program = shutil.which(options.program)
    if program is None:
        raise MissingPackageError(
            f"{options.program} is not installed",
            hint="pip install 'finetuning[eval]', or name the program in another environment with --lm-eval.",
        )
    if not options.tasks:
        raise ConfigError("names no task", location=Location(key="--tasks"))
    if options.include_path is not None and not options.include_path.is_dir():
        raise ConfigError("there is no such folder", location=Location(key=f"--include-path {options.include_path}"))
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[tuple[str, str], _Measured]] = {}
    for candidate in candidates:
        _check_adapter(candidate)
        if not isinstance(candidate.quant_conf, NoQuantization):
            on_note(f"{candidate.label}: lm_eval loads the base model without the quantization of training")
        log = folder / f"{name}.{candidate.label}.log"
        on_note(f"{candidate.label}: lm_eval writes its output to {log}")
        measured[candidate.label] = _run(program, candidate, options, log)
    first, *later = measured
    results = tuple(_results(measured))
    return Evaluation(
        name,
        ", ".join(options.tasks),
        {candidate.label: candidate.conf.adapter or candidate.conf.model for candidate in candidates},
        results,
        tuple(item for label in later for item in _differences(first, label, results)),
    )


def _check_adapter(candidate: Candidate) -> None:
    """Raise ModelError for an adapter that lm_eval loads wrongly.

    It ties the weights of the embeddings again after PEFT has added trained token rows to them, which replaces the
    trained rows.
    """
    if candidate.conf.adapter is None:
        return
    file = Path(candidate.conf.adapter).expanduser() / ADAPTER_CONFIG
    with reading(f"cannot read {file}"):
        has_rows = bool(read_json_object(file).get("trainable_token_indices"))
    config = read_pretrained_config(candidate.conf.model) or {}
    if has_rows and config.get("tie_word_embeddings", True):
        raise ModelError(
            f"{candidate.conf.adapter} has trained token rows, which lm_eval loses on a model with tied embeddings",
            hint="Merge it with merge_adapter, and evaluate the merged model.",
        )


def command_for(candidate: Candidate, options: HarnessOptions, output: Path) -> list[str]:
    """Return the arguments of lm_eval for a model, with the tokenizer and the chat template of training."""
    conf = candidate.conf
    arguments: dict[str, object] = {"pretrained": conf.model}
    if conf.adapter is not None:
        arguments["peft"] = conf.adapter
    tokenizer = conf.tokenizer or conf.adapter
    if tokenizer is not None and any((Path(tokenizer) / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        arguments["tokenizer"] = tokenizer
    if conf.model_args.dtype != "auto":
        arguments["dtype"] = conf.model_args.dtype
    if conf.model_args.trust_remote_code:
        arguments["trust_remote_code"] = True
    if conf.model_args.revision != "main" and not Path(conf.model).is_dir():
        arguments["revision"] = conf.model_args.revision
    words = ["run", "--model", "hf", "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    words += ["--tasks", ",".join(options.tasks), "--batch_size", options.batch_size, "--seed", str(options.seed)]
    words += ["--include_path", str(options.include_path)] if options.include_path is not None else []
    words += ["--limit", str(options.limit)] if options.limit is not None else []
    words += ["--apply_chat_template"] if has_chat_template(conf) else []
    return [*words, "--output_path", str(output)]


def _run(program: str, candidate: Candidate, options: HarnessOptions, log: Path) -> dict[tuple[str, str], _Measured]:
    """Return the values by task and metric."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [program, *command_for(candidate, options, Path(scratch))]
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=False)
        files = sorted(Path(scratch).rglob("results_*.json"))
        if done.returncode != 0 or not files:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            raise ModelError(
                f"lm_eval ended with exit code {done.returncode}: {lines[-1] if lines else 'no output'}",
                location=Location(file=str(log)),
            )
        with reading(f"the results of lm_eval cannot be read: {files[-1].name}"):
            return dict(_measured(read_json_object(files[-1])))


def _measured(values: JsonObject) -> Iterator[tuple[tuple[str, str], _Measured]]:
    """Yield the values of each task, without those of groups of tasks."""
    for task, metrics in values["results"].items():
        rows = int((values.get("n-samples") or {}).get(task, {}).get("effective", 0))
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield (task, name), _Measured(float(value), error if isinstance(error, int | float) else None, rows)


def _results(measured: Mapping[str, Mapping[tuple[str, str], _Measured]]) -> Iterator[MetricValue]:
    keys = dict.fromkeys(key for values in measured.values() for key in values)
    for task, metric in keys:
        for label, values in measured.items():
            if (item := values.get((task, metric))) is not None:
                low, high = _interval(metric, item)
                yield MetricValue(task, metric, label, item.value, low, high, item.rows, is_share_metric(metric))


def _interval(metric: str, item: _Measured) -> tuple[float, float]:
    """Return the interval of a value: Wilson's where rows are right or wrong, for which lm_eval's standard error is 0
    if all rows are; the value itself at both ends if nothing is known about its error."""
    correct = round(item.value * item.rows)
    if metric.partition(" ")[0] in _PROPORTIONS and item.rows and math.isclose(correct, item.value * item.rows):
        return wilson_interval(correct, item.rows)
    if item.error is None:
        return item.value, item.value
    low, high = normal_interval(item.value, item.error)
    return (max(low, 0.0), min(high, 1.0)) if is_share_metric(metric) else (low, high)


def _differences(before: str, after: str, results: Sequence[MetricValue]) -> Iterator[MetricDifference]:
    """Yield the differences of two models, as if they had answered different rows, so the intervals are wide.

    The intervals of both values are combined by their squares. Source: R. G. Newcombe, "Interval estimation for the
    difference between independent proportions", Statistics in Medicine 17 (1998), 873-890, method 10.
    """
    first = {(item.task, item.metric): item for item in results if item.model == before}
    for new in (item for item in results if item.model == after):
        old = first.get((new.task, new.metric))
        if old is None:
            continue
        value = new.value - old.value
        low = value - math.hypot(new.value - new.low, old.high - old.value)
        high = value + math.hypot(new.high - new.value, old.value - old.low)
        yield MetricDifference(new.task, new.metric, before, after, value, low, high, is_share=new.is_share)


def is_share_metric(metric: str) -> bool:
    """Return whether the values of a metric are shares between 0 and 1."""
    return not any(part in metric for part in _NO_SHARES)
