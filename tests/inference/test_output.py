"""Files that appear whole, and the file that keeps finished answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from finetuning.errors import ConfigError, StorageError
from finetuning.inference.output import FORMATS, RecordJournal, check_output, write_atomically, write_records

RECORDS: list[dict[str, Any]] = [
    {"id": 1, "answer": "two\nlines \n", "params": {"eos": [1, 2], "top_p": None}},
    {"id": "ä", "answer": "- 'quoted': \"text\" \t # no comment", "params": {"eos": [1, 2], "top_p": 0.5}},
    {"id": 3, "answer": "", "params": {}},
]


@pytest.mark.parametrize("name", ["out.yaml", "out.yml", "out.json", "out.jsonl", "OUT.YAML"])
def test_records_come_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_records(path, RECORDS)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        assert [json.loads(line) for line in text.splitlines()] == RECORDS
    else:
        assert (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)) == RECORDS
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_yaml_holds_no_anchors_and_an_empty_list_is_a_list(tmp_path: Path) -> None:
    shared = {"a": 1}
    write_records(tmp_path / "out.yaml", [{"x": shared}, {"x": shared, "y": shared}])
    assert "&" not in (tmp_path / "out.yaml").read_text()
    write_records(tmp_path / "none.yaml", [])
    assert yaml.safe_load((tmp_path / "none.yaml").read_text()) == []


@given(st.lists(st.text(), min_size=1, max_size=4))
@example(["ends with lines\n\n", "after it"])
@example(["\n", " \n a", "\x85", "\u2028b\n", "# no comment\n", "\ufffd\n\t"])
def test_any_text_survives_yaml(texts: list[str]) -> None:
    stream = io.StringIO()
    records = [{"answer": text, "id": number} for number, text in enumerate(texts)]
    FORMATS[".yaml"](records, stream)
    assert yaml.safe_load(stream.getvalue()) == records


def test_a_file_that_fails_while_it_is_written_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("before")
    with pytest.raises(TypeError):
        write_atomically(path, lambda stream: stream.write(1))  # type: ignore[arg-type]
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.yaml, \.yml, \.json, \.jsonl"):
        check_output(tmp_path / "out.txt")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        check_output(tmp_path / "folder.json")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot create"):
        check_output(tmp_path / "file" / "out.json")
    check_output(tmp_path / "new" / "out.json")
    assert (tmp_path / "new").is_dir()


def test_a_journal_of_the_same_job_is_continued(tmp_path: Path) -> None:
    output = tmp_path / "out.yaml"
    first = RecordJournal(output, "job")
    first.add({2: [{"id": 2}], 0: [{"id": 0}]})
    first.close(remove=False)
    # A kill in the middle of a line.
    with open(first.path, "a", encoding="utf-8") as stream:
        stream.write('{"prompt": 1, "rec')
    second = RecordJournal(output, "job")
    assert second.missing([0, 1, 2]) == [1]
    second.add({1: [{"id": 1}, {"id": 1}]})
    assert [record["id"] for record in second.in_order()] == [0, 1, 1, 2]
    second.close(remove=False)
    third = RecordJournal(output, "job")
    assert third.missing(range(3)) == []
    third.close(remove=True)
    assert not third.path.exists()


@pytest.mark.parametrize(
    "damaged",
    [b"\xff\xfe", b"[]", b"3", b'{"prompt": 1}', b'{"prompt": 1, "records": 3}', b'{"prompt": [], "records": []}',
     b'{"prompt": 1, "records": ["text"]}'],
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 2])
def test_a_damaged_line_of_a_journal_ends_what_is_continued(tmp_path: Path, damaged: bytes, number: int) -> None:
    first = RecordJournal(tmp_path / "out.yaml", "job")
    for index in range(3):
        first.add({index: [RECORDS[index]]})
    first.close(remove=False)
    lines = first.path.read_bytes().splitlines()
    lines[number] = damaged
    first.path.write_bytes(b"\n".join(lines))
    second = RecordJournal(tmp_path / "out.yaml", "job")
    assert second.records == ({0: [RECORDS[0]]} if number else {})
    second.close(remove=True)


def test_a_journal_of_another_job_is_discarded(tmp_path: Path) -> None:
    first = RecordJournal(tmp_path / "out.yaml", "job")
    first.add({0: [{"id": 0}]})
    first.close(remove=False)
    second = RecordJournal(tmp_path / "out.yaml", "other job")
    assert second.missing([0]) == [0]
    second.close(remove=True)
