from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetuning.data.rows import Row
from finetuning.data.sources import check_source, read_rows
from finetuning.errors import DataError, Problem

GOOD = {"messages": [{"role": "user", "content": "ä"}]}


def test_jsonl_rows_keep_their_line(write_lines: Callable[..., str]) -> None:
    path = write_lines("a.jsonl", GOOD, b"", GOOD)
    rows = list(read_rows(path))
    assert [row.place.line for row in rows if isinstance(row, Row)] == [1, 3]
    assert {str(row.place.file) for row in rows if isinstance(row, Row)} == {path}


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}\r\n{"a": 2}\r\n')
    assert [row.values for row in read_rows(str(path)) if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_can_be_one_object_or_one_array(indent: int | None, tmp_path: Path) -> None:
    single, several = tmp_path / "one.json", tmp_path / "many.json"
    single.write_text(json.dumps(GOOD, indent=indent))
    several.write_text(json.dumps([GOOD, GOOD], indent=indent))
    assert [row.values for row in read_rows(str(single)) if isinstance(row, Row)] == [GOOD]
    rows = [row for row in read_rows(str(several)) if isinstance(row, Row)]
    assert [row.values for row in rows] == [GOOD, GOOD]
    assert [row.place.line for row in rows] == ([1, 1] if indent is None else [2, 10])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [{"role": "user"', "invalid JSON at column 30"),
        (b'{"messages": "a" "b"}', "invalid JSON at column 18"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte "),
        (b'{"a": "\0"}', "NUL byte at byte "),
        (b'{"a": "\\u0000"}', "NUL character"),
        (b'{"a": "\\ud83d"}', "surrogate pair"),
        (b"[1, 2]", "expected an object, got a list"),
        (b"null", "expected an object, got null"),
        (b"[" * 100000, "nested too deeply"),
    ],
)
def test_a_bad_line_names_its_place_and_leaves_the_others(
    line: bytes, message: str, write_lines: Callable[..., str]
) -> None:
    path = write_lines("train.jsonl", GOOD, GOOD, GOOD, GOOD, GOOD, line, GOOD)
    rows = list(read_rows(path))
    assert len(rows) == 7
    (problem,) = [row for row in rows if isinstance(row, Problem)]
    assert str(problem).startswith(f"{path}:6: ")
    assert message in str(problem)


def test_byte_offsets_count_from_the_start_of_the_file(write_lines: Callable[..., str]) -> None:
    path = write_lines("a.jsonl", b'{"a": 1}', b'{"a": "\xff"}')
    (problem,) = [row for row in read_rows(path) if isinstance(row, Problem)]
    assert problem.message == "invalid UTF-8 at byte 16 (0xff)"


def test_whole_surrogate_pairs_are_text(write_lines: Callable[..., str]) -> None:
    path = write_lines("a.jsonl", b'{"a": "\\ud83d\\ude42"}', rb'{"a": "a \\u0000 that is spelt out"}')
    assert [row.values["a"] for row in read_rows(path) if isinstance(row, Row)] == ["🙂", r"a \u0000 that is spelt out"]


def test_a_broken_array_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(DataError, match=r"a\.json:3: invalid JSON at column 7"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("data", [b"", b"\n\n", codecs.BOM_UTF8, b"[]"])
def test_a_file_without_rows_says_so(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.jsonl: 0 rows"):
        list(read_rows(str(path)))


def test_utf16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(DataError, match="the file is UTF-16; expected UTF-8"):
        list(read_rows(str(path)))


def test_sources_that_cannot_be_read_name_key_and_working_directory(tmp_path: Path) -> None:
    key = "data_conf.training_data.datasets[0].path"
    with pytest.raises(DataError) as missing:
        check_source(str(tmp_path / "no.jsonl"), key)
    assert str(missing.value).startswith(f"{key}: {tmp_path}/no.jsonl: no such file")
    assert os.getcwd() in str(missing.value)
    with pytest.raises(DataError, match="is a directory"):
        check_source(str(tmp_path), key)


def test_the_digest_follows_the_bytes(write_lines: Callable[..., str]) -> None:
    def digest(*rows: object) -> str:
        value = hashlib.sha256()
        list(read_rows(write_lines("a.jsonl", *rows), value))
        return value.hexdigest()

    assert digest(GOOD) == digest(GOOD)
    assert digest(GOOD) != digest(GOOD, GOOD)
