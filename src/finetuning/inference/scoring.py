"""Accuracy of answers, by their `correct_answers`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from finetuning.errors import DataError, parse_json

ScoreName = Literal["exact", "contains", "regex", "json"]


def is_exact(answer: str, correct: str) -> bool:
    """Return whether both texts are equal, ignoring leading and trailing whitespace."""
    return answer.strip() == correct.strip()


def contains(answer: str, correct: str) -> bool:
    """Return whether the answer contains the correct one, ignoring whitespace around the latter."""
    return correct.strip() in answer


def matches(answer: str, correct: str) -> bool:
    """Return whether the regular expression `correct` matches anywhere in the answer."""
    return re.search(correct, answer) is not None


def is_same_json(answer: str, correct: str) -> bool:
    """Return whether both are JSON of the same value; the order of keys, spaces and a code fence do not matter."""
    try:
        return _is_same_value(_parse_json(answer), _parse_json(correct))
    except ValueError:
        return False


def _parse_json(text: str) -> object:
    """Parse JSON, alone or as the only content of a Markdown code fence.

    Raises:
        ValueError: it is no JSON.
    """
    fenced = _FENCE.fullmatch(text.strip())
    return parse_json(fenced[1] if fenced else text)


def _is_same_value(left: object, right: object) -> bool:
    # Python's `==` takes true for 1.
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_is_same_value(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_is_same_value, left, right))
    return left == right


_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
METRICS: dict[str, Callable[[str, str], bool]] = {
    "exact": is_exact,
    "contains": contains,
    "regex": matches,
    "json": is_same_json,
}


@dataclass(frozen=True)
class ScoreCounts:
    """The number of scored answers, and how many of them are correct."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers, between 0 and 1."""
        return self.correct / self.total


class ScoredAnswer(TypedDict):
    """Whether an answer is correct, with the dataset and the id of its prompt."""

    dataset: str | None
    id: str | int
    right: bool


@dataclass(frozen=True)
class Scores:
    """Accuracy overall and per dataset; `rows` holds the scored answers in order."""

    name: str
    overall: ScoreCounts
    by_dataset: dict[str, ScoreCounts]
    unscored: int
    rows: tuple[ScoredAnswer, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the values that are written as JSON."""
        datasets = {
            name: {"correct": count.correct, "total": count.total, "accuracy": count.accuracy}
            for name, count in self.by_dataset.items()
        }
        return {
            "score": self.name,
            "correct": self.overall.correct,
            "total": self.overall.total,
            "accuracy": self.overall.accuracy,
            "unscored": self.unscored,
            "datasets": datasets,
            "rows": list(self.rows),
        }

    def table(self) -> str:
        """Return the scores as an aligned table, one line per dataset."""
        lines = list(self.by_dataset.items())
        if len(lines) > 1:
            lines.append(("all", self.overall))
        width = max(len("dataset"), *(len(name) for name, _ in lines))
        rows = [f"{'dataset':<{width}}  {self.name:>8}  {'correct':>12}"]
        for name, count in lines:
            right = f"{count.correct} of {count.total}"
            rows.append(f"{name:<{width}}  {count.accuracy:>8.1%}  {right:>12}")
        if self.unscored:
            rows.append(f"{self.unscored} answers have no correct_answers and were not scored")
        return "\n".join(rows)


def check_scorable(name: ScoreName, correct_answers: Sequence[Sequence[str]]) -> None:
    """Check that answers can be scored.

    Raises:
        DataError: no prompt has a correct answer, or one is not a valid regular expression, or not JSON.
    """
    if not any(correct_answers):
        raise DataError("nothing to score: no row has correct_answers or ends with an assistant message")
    if name == "regex":
        for pattern in {answer for answers in correct_answers for answer in answers}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(f"correct_answers: {pattern!r} is not a valid regular expression: {error}") from None
    if name == "json":
        for text in {answer for answers in correct_answers for answer in answers}:
            try:
                _parse_json(text)
            except ValueError as error:
                raise DataError(f"correct_answers: {text!r} is not JSON: {error}") from None


def score(records: Sequence[Mapping[str, Any]], name: ScoreName) -> Scores:
    """Return the accuracy of records; an `answer` is correct if it agrees with any of its `correct_answers`."""
    is_correct = METRICS[name]
    counts: dict[str, list[int]] = {}
    rows: list[ScoredAnswer] = []
    for record in records:
        if not record["correct_answers"]:
            continue
        right = any(is_correct(record["answer"], correct) for correct in record["correct_answers"])
        count = counts.setdefault(str(record["dataset"]), [0, 0])
        count[0] += right
        count[1] += 1
        rows.append({"dataset": record["dataset"], "id": record["id"], "right": right})
    by_dataset = {dataset: ScoreCounts(*count) for dataset, count in counts.items()}
    overall = ScoreCounts(sum(row["right"] for row in rows), len(rows))
    return Scores(name, overall, by_dataset, len(records) - len(rows), tuple(rows))
