"""How many answers are right, by their `correct_answers`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetuning.errors import DataError

ScoreName = Literal["exact", "contains", "regex"]


def is_exact(answer: str, correct: str) -> bool:
    """True when both are the same text, but for white space around them."""
    return answer.strip() == correct.strip()


def contains(answer: str, correct: str) -> bool:
    """True when the right answer, without white space around it, is somewhere in the given one."""
    return correct.strip() in answer


def matches(answer: str, correct: str) -> bool:
    """True when the regular expression `correct` is found in the answer."""
    return re.search(correct, answer) is not None


SCORES: dict[str, Callable[[str, str], bool]] = {"exact": is_exact, "contains": contains, "regex": matches}


@dataclass(frozen=True)
class ScoreCounts:
    """Answers that were scored, and those of them that are right."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, between 0 and 1."""
        return self.correct / self.total


@dataclass(frozen=True)
class Scores:
    """The result of a scoring; `rows` holds dataset, id and whether the answer is right, in order."""

    name: str
    overall: ScoreCounts
    by_dataset: dict[str, ScoreCounts]
    unscored: int
    rows: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """What is written as JSON."""
        datasets = {
            name: {"correct": tally.correct, "total": tally.total, "accuracy": tally.accuracy}
            for name, tally in self.by_dataset.items()
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
        """The scores as aligned text, one line a dataset."""
        lines = [(name, tally) for name, tally in self.by_dataset.items()]
        if len(lines) > 1:
            lines.append(("all", self.overall))
        width = max(len("dataset"), *(len(name) for name, _ in lines))
        rows = [f"{'dataset':<{width}}  {self.name:>8}  {'right':>12}"]
        for name, tally in lines:
            right = f"{tally.correct} of {tally.total}"
            rows.append(f"{name:<{width}}  {tally.accuracy:>8.1%}  {right:>12}")
        if self.unscored:
            rows.append(f"{self.unscored} answers have no correct_answers and were not scored")
        return "\n".join(rows)


def check_scorable(name: ScoreName, correct_answers: Sequence[Sequence[str]]) -> None:
    """Nothing, when a scoring has something to go by.

    Raises:
        DataError: no prompt has a correct answer, or one is no regular expression.
    """
    if not any(correct_answers):
        raise DataError("there is nothing to score by: no row has correct_answers, or messages that end with an answer")
    if name == "regex":
        for pattern in {answer for answers in correct_answers for answer in answers}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(f"correct_answers: {pattern!r} is no regular expression: {error}") from None


def score(records: Sequence[Mapping[str, Any]], name: ScoreName) -> Scores:
    """The share of records whose `answer` agrees with any of its `correct_answers`."""
    is_right = SCORES[name]
    counts: dict[str, list[int]] = {}
    rows: list[dict[str, Any]] = []
    for record in records:
        if not record["correct_answers"]:
            continue
        right = any(is_right(record["answer"], correct) for correct in record["correct_answers"])
        count = counts.setdefault(str(record["dataset"]), [0, 0])
        count[0] += right
        count[1] += 1
        rows.append({"dataset": record["dataset"], "id": record["id"], "right": right})
    by_dataset = {dataset: ScoreCounts(*count) for dataset, count in counts.items()}
    overall = ScoreCounts(sum(row["right"] for row in rows), len(rows))
    return Scores(name, overall, by_dataset, len(records) - len(rows), tuple(rows))
