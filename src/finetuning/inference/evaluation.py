"""Evaluate models on held-out rows: the share of correct answers of each, with confidence intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist

from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import NoQuantization, Quantized
from finetuning.inference.output import write_atomically
from finetuning.inference.prompts import GenerationPrompt
from finetuning.inference.runner import GenerationJob, ProgressCallback, generate_records
from finetuning.inference.scoring import ScoreName, score

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    label: str
    conf: GenerationModel
    quant_conf: NoQuantization | Quantized = field(default_factory=NoQuantization)


@dataclass(frozen=True)
class MetricValue:
    """The value of one metric for one model."""

    task: str
    metric: str
    model: str
    value: float
    low: float
    """Lower end of the 95 % confidence interval."""
    high: float
    rows: int
    is_share: bool = True
    """Whether the value is a share between 0 and 1."""


@dataclass(frozen=True)
class MetricDifference:
    """How one model differs from another in the same metric on the same rows."""

    task: str
    metric: str
    before: str
    after: str
    value: float
    low: float
    """Lower end of the 95 % confidence interval."""
    high: float
    better: int | None = None
    """Rows that only the second model answers correctly; None where single rows are not known."""
    worse: int | None = None
    is_share: bool = True


@dataclass(frozen=True)
class Evaluation:
    """The results of models on the same rows."""

    name: str
    """Of the file that holds it."""
    source: str
    """The rows or tasks."""
    models: Mapping[str, str]
    """Label and folder, or hub id, of each model."""
    results: tuple[MetricValue, ...]
    differences: tuple[MetricDifference, ...] = ()
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write it as JSON to `folder`, and return the file."""
        path = folder / f"{self.name}.json"
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, lambda stream: stream.write(text))
        return path

    def table(self) -> str:
        """Return the results as an aligned table, with a line for each difference."""
        header = ("task", "metric", "model", "value", "95 % interval", "rows")
        rows = [
            (item.task, item.metric, item.model, _format_value(item.value, item), _interval(item), f"{item.rows:,}")
            for item in self.results
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" if column < 3 else f"{cell:>{width}}" for column, (cell, width) in numbered)
            for numbered in (list(enumerate(zip(row, widths, strict=True))) for row in (header, *rows))
        ]
        return "\n".join([*lines, *map(_difference_line, self.differences), *self.notes])


def _format_value(value: float, item: MetricValue) -> str:
    return f"{value:.1%}" if item.is_share else f"{value:.4g}"


def _interval(item: MetricValue) -> str:
    return f"{_format_value(item.low, item)} to {_format_value(item.high, item)}"


def _difference_line(item: MetricDifference) -> str:
    counted = "" if item.better is None else f"; {item.better} rows better, {item.worse} worse"
    is_clear = item.low > 0 or item.high < 0
    factor, digits, unit = (100, ".1f", " points") if item.is_share else (1, ".4g", "")
    value, low, high = (f"{factor * number:+{digits}}" for number in (item.value, item.low, item.high))
    return f"{item.task}, {item.metric}: {item.after} - {item.before} = {value}{unit} ({low} to {high}{counted})" + (
        "" if is_clear else ": no clear difference on so few rows"
    )


def wilson_interval(correct: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the score interval of a proportion, which holds for few rows and for shares near 0 and 1 as well.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927), 209-212.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)


def paired_interval(better: int, worse: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of the difference of two proportions that were measured on the same rows.

    Wald's interval after half a row is added to each cell of the table of both outcomes. Source: A. Agresti and Y. Min,
    "Simple improved confidence intervals for comparing matched proportions", Statistics in Medicine 24 (2005), 729-740.

    Args:
        better: rows that only the second model answers correctly.
        worse: rows that only the first model answers correctly.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rows = total + 2
    gained, lost = better + 0.5, worse + 0.5
    difference = (gained - lost) / rows
    half = z * math.sqrt(gained + lost - (gained - lost) ** 2 / rows) / rows
    return max(-1.0, difference - half), min(1.0, difference + half)


def evaluate_answers(
    candidates: Sequence[Candidate],
    prompts: Sequence[GenerationPrompt],
    metric: ScoreName,
    gen_params: Mapping[str, object],
    *,
    name: str,
    source: str,
    folder: Path,
    seed: int = 42,
    progress: Callable[[Candidate], ProgressCallback] = lambda candidate: ProgressCallback(),
) -> Evaluation:
    """Have each model answer the prompts, and compare the answers with the correct ones.

    The answers of each are written to `folder`, in a file NAME.LABEL.jsonl. All models are shown the same texts if they
    have the same tokenizer.

    Args:
        prompts: at least one has correct answers.
        source: where the prompts come from.
        progress: called with each model before it is loaded.

    Raises:
        ModelError: a model cannot be loaded.
        Interrupted: SIGINT or SIGTERM was received; the next call with the same arguments continues.
    """
    right: dict[str, list[bool]] = {}
    unscored = 0
    for candidate in candidates:
        job = GenerationJob(prompts, candidate.conf, candidate.quant_conf, gen_params, seed)
        records = generate_records(job, folder / f"{name}.{candidate.label}.jsonl", progress(candidate))
        scores = score(records, metric)
        right[candidate.label] = [row["right"] for row in scores.rows]
        unscored = scores.unscored
    task = Path(source).name
    results = [
        MetricValue(task, metric, label, sum(rows) / len(rows), *wilson_interval(sum(rows), len(rows)), len(rows))
        for label, rows in right.items()
    ]
    first, *later = right
    differences = [_compare(task, metric, first, label, right) for label in later]
    notes = [f"{unscored} rows have no correct answers and were not scored"] if unscored else []
    models = {candidate.label: candidate.conf.adapter or candidate.conf.model for candidate in candidates}
    return Evaluation(name, source, models, tuple(results), tuple(differences), tuple(notes))


def _compare(task: str, metric: str, before: str, after: str, right: Mapping[str, Sequence[bool]]) -> MetricDifference:
    pairs = list(zip(right[before], right[after], strict=True))
    better, worse = pairs.count((False, True)), pairs.count((True, False))
    return MetricDifference(
        task,
        metric,
        before,
        after,
        (better - worse) / len(pairs),
        *paired_interval(better, worse, len(pairs)),
        better,
        worse,
    )


def normal_interval(value: float, error: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of a mean with a known standard error."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return value - z * error, value + z * error


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Return the values by the names that a tracker shows them under."""
    return {f"evaluation/{item.task}/{item.metric}/{item.model}": item.value for item in evaluation.results}
