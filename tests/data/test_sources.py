from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.config.sections.data import DatasetSource
from finetuning.data.formats import FORMATS
from finetuning.data.samples import Row
from finetuning.data.sources import FileShard, HubShard, check_source, find_shards, read_rows
from finetuning.data.sources.json_reader import read_array
from finetuning.errors import DataError, MissingPackageError, Problem

GOOD = {"messages": [{"role": "user", "content": "ä"}]}


def test_jsonl_rows_keep_their_line(write_lines: Callable[..., str]) -> None:
    path = write_lines("a.jsonl", GOOD, b"", GOOD)
    rows = list(read_rows(path))
    assert [row.location.line for row in rows if isinstance(row, Row)] == [1, 3]
    assert {str(row.location.file) for row in rows if isinstance(row, Row)} == {path}


def test_byte_order_mark_and_crlf_are_not_part_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}\r\n{"a": 2}\r\n')
    assert [row.values for row in read_rows(str(path)) if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_file_can_be_one_object_or_one_array(indent: int | None, tmp_path: Path) -> None:
    single, several = tmp_path / "one.json", tmp_path / "many.json"
    single.write_text(json.dumps(GOOD, indent=indent))
    several.write_text(json.dumps([GOOD, GOOD], indent=indent))
    assert [row.values for row in read_rows(str(single)) if isinstance(row, Row)] == [GOOD]
    rows = [row for row in read_rows(str(several)) if isinstance(row, Row)]
    assert [row.values for row in rows] == [GOOD, GOOD]
    assert [row.location.line for row in rows] == ([1, 1] if indent is None else [2, 10])


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
def test_bad_line_is_reported_and_others_are_read(line: bytes, message: str, write_lines: Callable[..., str]) -> None:
    path = write_lines("train.jsonl", GOOD, GOOD, GOOD, GOOD, GOOD, line, GOOD)
    rows = list(read_rows(path))
    assert len(rows) == 7
    (problem,) = [row for row in rows if isinstance(row, Problem)]
    assert str(problem).startswith(f"{path}:6: ")
    assert message in str(problem)


def test_too_deeply_nested_first_line_is_a_bad_line(write_lines: Callable[..., str]) -> None:
    deep, good = read_rows(write_lines("a.jsonl", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, GOOD))
    assert str(deep).endswith("a.jsonl:1: invalid JSON: nested too deeply")
    assert good.values == GOOD


def test_byte_offsets_count_from_the_start_of_the_file(write_lines: Callable[..., str]) -> None:
    path = write_lines("a.jsonl", b'{"a": 1}', b'{"a": "\xff"}')
    (problem,) = [row for row in read_rows(path) if isinstance(row, Problem)]
    assert problem.message == "invalid UTF-8 at byte 16 (0xff)"


def test_surrogate_pairs_are_valid_text(write_lines: Callable[..., str]) -> None:
    path = write_lines("a.jsonl", b'{"a": "\\ud83d\\ude42"}', rb'{"a": "a \\u0000 that is spelt out"}')
    assert [row.values["a"] for row in read_rows(path) if isinstance(row, Row)] == ["🙂", r"a \u0000 that is spelt out"]


BROKEN_ARRAYS = (
    (b'[\n{"a": 1},\n{"a": }\n]', "3: invalid JSON at column 7: Expecting value"),
    (b'[{"a": 1},\n {"a": 2} {"a": 3}]', "2: invalid JSON at column 11: Expecting ',' delimiter"),
    (b'[{"a": 1},\n{"a": "x', "2: invalid JSON at column 7: Unterminated string"),
    (b'[{"a": 1},\n{"a": 2}', "2: invalid JSON at column 9: Expecting"),
    (b'[{"a": 1}]\n[{"a": 2}]', "2: unexpected data after the array"),
    (b'[{"a": 1},\n\n{"a": "\xff"}]', r"3: invalid UTF-8 at byte 19 \(0xff\)"),
    (b'[{"a": 1},\n{"a": "\0"}]', "2: NUL byte at byte 18"),
    (b"[" * 100000, "1: invalid JSON: nested too deeply"),
)


@pytest.mark.parametrize("ahead", [1, 7, 1 << 20])
@pytest.mark.parametrize(("data", "message"), BROKEN_ARRAYS)
def test_invalid_array_reports_line_and_column(data: bytes, message: str, ahead: int) -> None:
    with pytest.raises(DataError, match=rf"a\.json:{message}"):
        list(read_array("a.json", io.BytesIO(data), 0, ahead))


@pytest.mark.parametrize("indent", [None, 1])
def test_array_does_not_depend_on_read_ahead(indent: int | None) -> None:
    draw = Random(5)
    values = ["ä", "🙂", 'a\\"b', 12.5, -1e-9, True, None, "x" * 50]
    rows = [{"a": draw.choice(values), "b": [draw.choice(values), {"c": draw.choice(values)}]} for _ in range(60)]
    text = json.dumps(rows, indent=indent, ensure_ascii=draw.random() < 0.5)
    starts = [number for number, line in enumerate(text.split("\n"), 1) if line == " {"]
    for ahead in (1, 2, 3, 5, 64, 1 << 20):
        read = list(read_array("a.json", io.BytesIO(text.encode()), 0, ahead))
        assert [(value, json.loads(local)) for value, local, _ in read] == [(row, row) for row in rows]
        assert [line for *_, line in read] == (starts or [1] * 60)


def test_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": "x" * 1000}] * 20_000), encoding="utf-8")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(str(path))) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


@pytest.mark.parametrize("data", [b"", b"\n\n", codecs.BOM_UTF8, b"[]"])
def test_file_without_rows_is_an_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.jsonl: 0 rows"):
        list(read_rows(str(path)))


def test_utf16_is_reported_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(DataError, match="the file is UTF-16; expected UTF-8"):
        list(read_rows(str(path)))


def test_unreadable_sources_report_key_and_working_directory(tmp_path: Path) -> None:
    key = "data_conf.training_data.datasets[0].path"
    with pytest.raises(DataError) as missing:
        check_source(str(tmp_path / "no.jsonl"), key)
    assert str(missing.value).startswith(f"{key}: {tmp_path}/no.jsonl: no such file")
    assert os.getcwd() in str(missing.value)
    with pytest.raises(DataError, match="is a directory"):
        check_source(str(tmp_path), key)


def test_digest_depends_on_the_bytes(write_lines: Callable[..., str]) -> None:
    def digest(*rows: object) -> str:
        value = hashlib.sha256()
        FileShard(write_lines("a.jsonl", *rows)).update_digest(value)
        return value.hexdigest()

    assert digest(GOOD) == digest(GOOD)
    assert digest(GOOD) != digest(GOOD, GOOD)


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@pytest.mark.parametrize("ending", OPENERS)
def test_compressed_files_are_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    with OPENERS[ending](path, "wb") as stream:
        stream.write(b'{"a": 1}\n\n{"a": 2}\n{\n')
    assert [(str(row.location), getattr(row, "values", None)) for row in read_rows(str(path))] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:3", {"a": 2}),
        (f"{path}:4", None),
    ]


@pytest.mark.parametrize("ending", OPENERS)
def test_damaged_compressed_file_is_an_error(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    with OPENERS[ending](path, "wb") as stream:
        stream.write(b"".join(b'{"a": %d}\n' % number for number in range(10000)))
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"nothing of the kind", whole[:40] + b"\0\0\0\0\0\0" + whole[46:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"a.jsonl{ending}: the compressed file is damaged"):
            list(read_rows(str(path)))


def test_zstandard_is_read_or_the_missing_package_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x20\x09\x49\x00\x00" + b'{"a": 1}\n')
    if importlib.util.find_spec("zstandard") is None:
        with pytest.raises(MissingPackageError, match="pip install zstandard"):
            list(read_rows(str(path)))
    else:
        assert [row.values for row in read_rows(str(path)) if isinstance(row, Row)] == [{"a": 1}]


def test_columnar_rows_have_numbers_and_no_nulls(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = [GOOD, {"messages": [call], "id": "b"}, {"messages": [{"role": "user", "content": "c"}]}]
    table = datasets.Dataset.from_list(rows).data.table
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        result = list(read_rows(str(tmp_path / name)))
        assert [row.values for row in result if isinstance(row, Row)] == table_rows(table)
        assert [row.location.line for row in result] == [1, 2, 3]


def table_rows(table: pa.Table) -> list[dict[str, object]]:
    """The rows of a table as JSON, without nulls."""
    return json.loads(
        json.dumps(table.to_pylist()), object_hook=lambda item: {k: v for k, v in item.items() if v is not None}
    )


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_invalid_parquet_and_arrow_files_are_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"a": 1}\n' * 9)
    with pytest.raises(DataError, match=rf"{name}: not an? (Parquet|Arrow) file, or damaged"):
        list(read_rows(str(path)))


def test_csv_rows_have_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 300_000
    path.write_bytes(
        codecs.BOM_UTF8 + f'input,output\r\n"two\r\nlines",ä\r\n\r\n{long},b\nonly one\n"c ""d""",\n'.encode()
    )
    result = list(read_rows(str(path)))
    assert [(row.location.line, row.values) for row in result if isinstance(row, Row)] == [
        (2, {"input": "two\r\nlines", "output": "ä"}),
        (5, {"input": long, "output": "b"}),
        (7, {"input": 'c "d"', "output": ""}),
    ]
    (problem,) = [row for row in result if isinstance(row, Problem)]
    assert str(problem) == f"{path}:6: 1 fields, but the header has 2"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,a\n1,2\n", "a.csv:1: duplicate columns in the header: a"),
        (b'a\n"x', "a.csv:2: invalid CSV"),
        (b"a\n1\n\xff\n", "a.csv:3: invalid UTF-8"),
        (b"a,b\n", "a.csv: 0 rows"),
    ],
)
def test_invalid_csv_reports_the_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(read_rows(str(path)))


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_of_csv_is_named(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt{separator}completion\na{separator}b\n")
    with pytest.raises(DataError, match=r"a\.csv:1: the columns seem to be separated by .* Save it with commas"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("indent", [None, 2])
def test_objects_one_after_the_other_are_read(indent: int | None, tmp_path: Path) -> None:
    rows = [GOOD, {"a": {"b": [1, {"c": "}{"}]}}, GOOD]
    path = tmp_path / "a.json"
    path.write_text("\n".join(json.dumps(row, indent=indent) for row in rows))
    result = [row for row in read_rows(str(path)) if isinstance(row, Row)]
    assert [row.values for row in result] == rows
    assert [row.location.line for row in result] == ([1, 2, 3] if indent is None else [1, 9, 19])


def test_an_error_after_the_first_of_several_objects_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD, indent=2) + '\n{\n  "a": 1,,\n}\n')
    with pytest.raises(DataError, match=r"a\.json:10: invalid JSON at column 10"):
        list(read_rows(str(path)))


def test_the_elements_of_a_line_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 2, {"a": 3},\n{"a": 4}, {"a":\n5}, 6]')
    places = [str(row.location).removeprefix(f"{path}:") for row in read_rows(str(path))]
    assert places == ["1 (element 1)", "1 (element 2)", "1 (element 3)", "2", "2 (element 5)", "3 (element 6)"]
    rows = list(read_rows(str(path)))
    assert str(rows[1]) == f"{path}:1 (element 2): expected an object, got a number"
    assert str(FORMATS["text"].parse(rows[2])).startswith(f"{path}:1 (element 3): expected text")


COMPRESS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("name", COMPRESS)
def test_a_compressed_file_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(COMPRESS[name](json.dumps(GOOD).encode()))
    assert [row.values for row in read_rows(str(path)) if isinstance(row, Row)] == [GOOD]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_values_that_datasets_wrote_as_json_are_parsed_at_any_depth(name: str, tmp_path: Path) -> None:
    json_type = pa.json_()
    call = pa.struct([("name", pa.string()), ("arguments", json_type)])
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    storage = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))),
        ]
    )
    arguments = {"days": 2, "city": None, "tags": ["a", {"b": 1}]}
    messages = [
        {"role": "user", "content": "Hi", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": json.dumps(arguments)}]},
    ]
    typed = pa.array([messages], type=pa.list_(storage)).cast(pa.list_(message))
    whole = pa.ExtensionArray.from_storage(json_type, pa.array([json.dumps(messages[:1])]))
    table = pa.table({"messages": typed, "other": whole, "text": ['{"a": 1}']})
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    (row,) = [row for row in read_rows(str(path)) if isinstance(row, Row)]
    assert row.values["messages"][1]["tool_calls"] == [{"name": "f", "arguments": arguments}]
    assert row.values["other"] == messages[:1]
    assert row.values["text"] == '{"a": 1}', "a column of texts stays as it is"


@pytest.mark.parametrize(
    ("unit", "rows"),
    [
        ("line", [(1, "first line"), (2, "  second"), (5, "third")]),
        ("paragraph", [(1, "first line\n  second"), (5, "third")]),
        ("document", [(1, "first line\n  second\n\n \nthird")]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_text_files_are_split_into_units(unit: str, rows: list[tuple[int, str]], name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("first line\n  second\n\n \nthird\n")
    result = [row for row in read_rows(str(path), text_unit=unit) if isinstance(row, Row)]
    assert [(row.location.line, row.values["text"]) for row in result] == rows


def source(path: str | list[str], **more: object) -> DatasetSource:
    return DatasetSource.model_validate({"path": path, **more})


def names(path: str | list[str], folder: Path, **more: object) -> list[str]:
    return [os.path.relpath(shard.name, folder) for shard in find_shards(source(path, **more), "datasets[0]")]


def make_files(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('{"a": 1}\n')


def test_path_can_be_a_file_list_glob_or_folder(tmp_path: Path) -> None:
    make_files(tmp_path, "b.jsonl", "a.jsonl", "c/d.json", "c/e.csv", "README.md", ".hidden/x.json", "state.json")
    assert names(str(tmp_path / "b.jsonl"), tmp_path) == ["b.jsonl"]
    assert names([f"{tmp_path}/b.jsonl", f"{tmp_path}/c/*"], tmp_path) == ["b.jsonl", "c/d.json", "c/e.csv"]
    assert names(f"{tmp_path}/**/*.json*", tmp_path) == ["a.jsonl", "b.jsonl", "c/d.json", "state.json"]
    assert names(str(tmp_path), tmp_path) == ["a.jsonl", "b.jsonl", "c/d.json", "c/e.csv"]
    make_files(tmp_path, "docs/a.md", "docs/b.txt")
    assert names(f"{tmp_path}/docs", tmp_path) == ["docs/a.md", "docs/b.txt"]


def test_folder_with_several_splits_requires_split(tmp_path: Path) -> None:
    make_files(tmp_path, "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test.jsonl")
    with pytest.raises(DataError, match=r"has several splits \(test, train\); select one with `split`"):
        names(str(tmp_path), tmp_path)
    assert names(str(tmp_path), tmp_path, split="test") == ["data/test.jsonl"]
    assert len(names(str(tmp_path), tmp_path, split="train")) == 2
    with pytest.raises(DataError, match="no file of the split dev; found test, train"):
        names(str(tmp_path), tmp_path, split="dev")


def test_all_missing_paths_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        names([f"{tmp_path}/a.jsonl", f"{tmp_path}/*.csv", f"{tmp_path}/empty"], tmp_path)
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"datasets[0].path[{index}]" for index in range(3)]
    assert ["no such file" in lines[0], "no file matches" in lines[1], "no data file" in lines[2]] == [True] * 3


def test_saved_dataset_is_read_as_a_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_list([GOOD, GOOD]).save_to_disk(tmp_path / "saved")
    (shard,) = find_shards(source(str(tmp_path / "saved")), "datasets[0]")
    assert [row.values for row in shard.rows() if isinstance(row, Row)] == [GOOD, GOOD]


def test_unreachable_hub_dataset_is_an_error() -> None:
    (shard,) = find_shards(source("nobody/no-such-dataset", subset="en", split="test"), "datasets[0]")
    assert shard == HubShard("nobody/no-such-dataset", "test", "en")
    with pytest.raises(DataError, match="nobody/no-such-dataset: no such file or folder") as caught:
        list(shard.rows())
    assert "Hugging Face Hub" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_dataset_is_read_by_split(tmp_path: Path) -> None:
    make_files(tmp_path, "hub/train.jsonl", "hub/test.jsonl")
    shard = HubShard(str(tmp_path / "hub"), "test")
    (row,) = shard.rows()
    assert isinstance(row, Row)
    assert (row.values, str(row.location)) == ({"a": 1}, f"{tmp_path}/hub/test:1")
    fed = hashlib.sha256()
    shard.update_digest(fed)
    assert fed.digest() != hashlib.sha256().digest()
    streamed = HubShard(str(tmp_path / "hub"), "test", streaming=True)
    assert [item.values for item in streamed.rows()] == [{"a": 1}]
    streamed.update_digest(again := hashlib.sha256())
    assert again.hexdigest() != fed.hexdigest()
    with pytest.raises(DataError, match="hub/dev cannot be read: "):
        list(HubShard(str(tmp_path / "hub"), "dev", streaming=True).rows())
    with pytest.raises(DataError, match='hub/dev cannot be read: Unknown split "dev"'):
        list(HubShard(str(tmp_path / "hub"), "dev").rows())
