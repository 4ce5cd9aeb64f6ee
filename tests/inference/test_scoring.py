"""Right and wrong answers."""

from __future__ import annotations

from typing import Any

import pytest

from finetuning.errors import DataError
from finetuning.inference.scoring import METRICS, check_scorable, score


def record(answer: str, *correct: str, dataset: str = "sums", identity: int = 0) -> dict[str, Any]:
    return {"dataset": dataset, "id": identity, "answer": answer, "correct_answers": list(correct)}


@pytest.mark.parametrize(
    ("name", "answer", "correct", "right"),
    [
        ("exact", " 4\n", "4", True),
        ("exact", "4.", "4", False),
        ("contains", "It is four.", "four", True),
        ("contains", "It is five.", "four", False),
        ("regex", "it is 42 meters", r"\b4\d\b", True),
        ("regex", "it is 142 meters", r"\b4\d\b", False),
        ("json", '{"b": [1, {"c": null}], "a": 1.0}', '{"a": 1, "b": [1, {"c": null}]}', True),
        ("json", '```json\n{"a": 1}\n```\n', '{"a": 1}', True),
        ("json", '{"a": true}', '{"a": 1}', False),
        ("json", '{"a": 1, "b": 2}', '{"a": 1}', False),
        ("json", '{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ("json", 'The answer is {"a": 1}', '{"a": 1}', False),
    ],
)
def test_one_answer(name: str, answer: str, correct: str, right: bool) -> None:
    assert METRICS[name](answer, correct) is right


def test_any_correct_answer_counts_and_each_dataset_has_its_share() -> None:
    records = [
        record("4", "four", "4", identity=1),
        record("5", "four", "4", identity=2),
        record("x", "x", dataset="letters", identity=3),
        record("nothing to go by", dataset="letters", identity=4),
    ]
    scores = score(records, "exact")
    assert (scores.overall.correct, scores.overall.total, scores.unscored) == (2, 3, 1)
    assert scores.by_dataset["sums"].accuracy == 0.5
    assert [row["right"] for row in scores.rows] == [True, False, True]
    assert scores.as_dict()["datasets"]["letters"] == {"correct": 1, "total": 1, "accuracy": 1.0}
    table = scores.table().splitlines()
    assert [line.split()[0] for line in table] == ["dataset", "sums", "letters", "all", "1"]
    assert "50.0%" in table[1] and "2 of 3" in table[3]


def test_nothing_to_score_by_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to score"):
        check_scorable("exact", [(), ()])
    check_scorable("exact", [(), ("a",)])


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(DataError, match=r"'\(' is not a valid regular expression"):
        check_scorable("regex", [("fine",), ("(",)])
    check_scorable("contains", [("(",)])


def test_a_correct_answer_that_is_no_json_is_named() -> None:
    with pytest.raises(DataError, match=r"'\{' is not JSON"):
        check_scorable("json", [("{}",), ("{",)])
