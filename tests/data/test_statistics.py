from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuning.data.statistics import TOO_LONG, DatasetStatistics, RowCounts, SplitStatistics, raise_bad_rows
from finetuning.errors import DataError, Location, Problem


def location(line: int) -> Location:
    return Location("train.jsonl", line)


def test_lines_say_what_became_of_the_rows() -> None:
    part = SplitStatistics(RowCounts("training", limit=8))
    for _ in range(17):
        part.keep(tokens=4, trained=2)
    part.truncate(location(18), tokens=8, trained=3, tokens_cut=5, answer_cut=True)
    part.drop(location(19), TOO_LONG, "61 tokens, the limit is 8", is_invalid=False, tokens=61)
    part.drop(location(20), TOO_LONG, "70 tokens, the limit is 8", is_invalid=False, tokens=70)
    part.warn("something odd", 2)
    text = "\n".join(part.counts.lines())
    assert "training: 18 rows of 20 kept, 76 tokens, 37 trained" in text
    assert "truncated: 1 row, 5 tokens cut off; 1 answer cut" in text
    assert "dropped: 2 rows, longer than the limit; first train.jsonl:19: 61 tokens, the limit is 8" in text
    assert "note: 2 rows: something odd" in text
    assert "warning: 10.0% of the rows are longer than 8 tokens" in text


def test_reports_hold_every_row_that_was_touched(tmp_path: Path) -> None:
    part = SplitStatistics(RowCounts("training", limit=8))
    part.keep(4, 2)
    part.truncate(location(2), tokens=8, trained=3, tokens_cut=5, answer_cut=False)
    part.drop(location(3), "bad row", "ä")
    DatasetStatistics((part,)).write(tmp_path)
    (report,) = json.loads((tmp_path / "data_report.json").read_text("utf-8"))
    assert report["rows"] == 3
    assert report["dropped"] == {"bad row": 1}
    assert report["tokens_cut"] == 5
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [(item["line"], item["outcome"]) for item in rejects] == [(2, "truncated"), (3, "dropped")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data_report.json", "rejects.jsonl"]


def test_too_many_faults_stop_the_run_and_filtered_rows_do_not() -> None:
    part = SplitStatistics(RowCounts("training", limit=8))
    for line in range(1, 20):
        part.keep(4, 2)
        part.drop(location(100 + line), TOO_LONG, is_invalid=False, tokens=9)
    part.counts.check(0.05)
    part.drop(location(7), "bad row", "expected text")
    part.counts.check(0.05)
    part.drop(location(8), "bad row", "expected text")
    part.counts.check(0.05)
    part.drop(location(9), "bad row", "expected text")
    with pytest.raises(DataError) as caught:
        part.counts.check(0.05)
    assert "3 of 41 training rows (7.3%)" in str(caught.value)
    assert "train.jsonl:7: bad row: expected text" in str(caught.value)


def test_all_rows_gone_says_how_long_the_shortest_is() -> None:
    part = SplitStatistics(RowCounts("training", limit=8))
    for tokens in (70, 61, 64, 80, 90):
        part.drop(location(1), TOO_LONG, is_invalid=False, tokens=tokens)
    with pytest.raises(DataError, match=r"train\.jsonl: all 5 rows dropped: shortest is 61 tokens, max_seq_length 8"):
        part.counts.check(1.0)


def test_kinds_of_bad_rows_are_listed_ten_at_most_with_their_numbers() -> None:
    raise_bad_rows([])
    with pytest.raises(DataError) as caught:
        raise_bad_rows([Problem(f"bad {line // 2}", location(line)) for line in range(1, 30)])
    text = str(caught.value)
    assert "train.jsonl:1: bad 0\n" in text
    assert "train.jsonl:18: bad 9 (2 rows like this)" in text
    assert "bad 10" not in text
    assert "29 bad rows, the first 10 kinds shown" in text


def test_state_dicts_of_earlier_versions_are_read() -> None:
    split = SplitStatistics(RowCounts("training", limit=8))
    split.keep(4, 2)
    split.drop(location(3), "bad row", "expected text")
    split.warn("odd")
    outcome = {"place": {"file": "train.jsonl", "line": 3, "column": None, "key": None}} | {
        "what": "dropped", "reason": "bad row", "detail": "expected text", "is_fault": True,
        "tokens": 0, "tokens_cut": 0, "answer_cut": False,
    }  # fmt: skip
    counts = dict.fromkeys(("truncated", "tokens_cut", "answers_cut", "filtered"), 0)
    counts |= {"part": "training", "limit": 8, "rows": 2, "kept": 1, "tokens": 4, "trained_tokens": 2}
    counts |= {"faults": 1, "shortest_dropped": None, "dropped": {"bad row": 1}, "noticed": {"odd": 1}, "formats": {}}
    counts |= {"firsts": {"bad row": outcome}, "first_faults": [outcome]}
    assert SplitStatistics.from_state_dict({"totals": counts, "fates": [outcome]}) == split  # old name
    assert SplitStatistics.from_state_dict(json.loads(json.dumps(split.state_dict()))) == split
