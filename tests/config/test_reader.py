from __future__ import annotations

import functools
import os
import threading
import time
from pathlib import Path

import pytest

from finetuning.config.yaml.document import ConfigDocument
from finetuning.config.yaml.reader import parse_document, read_document, read_scalar
from finetuning.errors import ConfigError


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_document(text, "config.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("5.", 5.0), ("1_000", 1000),
        ("1_000.5", 1000.5), ("010", 10), ("+7", 7), ("-0", 0), ("0x1F", 31), ("0o17", 15), ("0b101", 5),
        ("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("Off", "Off"), ("1:30", "1:30"), ("2024-05-01", "2024-05-01"),
        ("1.2.3", "1.2.3"), ("1__0", "1__0"), ("_1", "_1"), ("e5", "e5"), (".", "."), ("0xzz", "0xzz"),
        ("0b12", "0b12"), ("nan", "nan"), ("=", "="), ("9" * 101, "9" * 101),
    ],
)  # fmt: skip
def test_words_mean_what_people_mean(word: str, value: object) -> None:
    read = read_scalar(word)
    assert read == value
    assert type(read) is type(value)


def test_infinite_and_not_a_number() -> None:
    assert read_scalar("-.inf") == float("-inf")
    assert read_scalar(".nan") != read_scalar(".nan")


def test_values_and_places() -> None:
    document = parse_document("a: {b: [1, x]}\nc:\n  - d: '5'\n", "config.yaml")
    assert document.values == {"a": {"b": [1, "x"]}, "c": [{"d": "5"}]}
    assert str(document.location_of(("c", 0, "d"))) == "config.yaml:3:5: c.0.d"
    assert str(document.location_of(("a", "b", 1))) == "config.yaml:1:12: a.b.1"
    assert str(document.location_of(("a", "missing"))) == "config.yaml:1:1: a.missing"
    assert document.origin_of(("a", "b")) == "config.yaml:1"
    assert document.origin_of(("a", "missing")) is None


def test_explicit_plain_tags() -> None:
    assert parse_document("a: !!str 1\nb: !!float 1\nc: !!int '7'\nd: ! 5\n").values == {
        "a": "1", "b": 1.0, "c": 7, "d": "5",
    }  # fmt: skip
    assert "does not fit its tag !!int" in error_of("a: !!int x")


def test_aliases_and_merge_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc:\n  <<: [*a, {z: 4}]\n"
    document = parse_document(text, "config.yaml")
    assert document.values["b"] == {"y": 3, "x": 1}
    assert document.values["c"] == {"x": 1, "y": 2, "z": 4}
    assert str(document.location_of(("b", "x"))) == "config.yaml:1:8: b.x"
    assert '"<<" takes a section' in error_of("a: {<<: 3}")
    assert parse_document("a: {'<<': 3}").values == {"a": {"<<": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 'config.yaml:3:1: "a" is written twice, at line 1 and at line 3'),
        ("a:\n  1: x\n  0x1: y\n", 'config.yaml:3:3: "1" is written twice, at line 2 and at line 3'),
        ("- a\n- b\n", "config.yaml:1: expected sections (keys and values), found a list"),
        ("just text", "config.yaml:1: expected sections (keys and values), found a single value"),
        ("a: 1\n---\nb: 2\n", "config.yaml:2:1: one document expected, the second starts at line 2"),
        ("a: !!python/object:os.system x", "config.yaml:1:4: the tag"),
        ("a: !mine x", 'the tag "!mine" is not allowed'),
        ("a: &x [*x]", 'config.yaml:1:8: recursive alias "*x"'),
        ("a: *x", 'config.yaml:1:4: undefined alias "*x"'),
        ("? [1]\n: 2", "config.yaml:1:3: a key must be text or a whole number"),
        ("true: 2", "a key must be text"),
        ("a: \x07", "config.yaml:1:4: the character U+0007 is not allowed"),
        ("a: 1\nb: \x00", "config.yaml:2:4: the character U+0000 is not allowed"),
    ],
)
def test_refusals_name_the_place(text: str, message: str) -> None:
    assert message in error_of(text)


def test_syntax_errors_show_the_line_with_a_caret() -> None:
    assert error_of("a:\n\tb: 1\n") == "config.yaml:2:1: a tab cannot indent YAML; use spaces\n     b: 1\n    ^"
    lines = error_of("x: 1\na: {b: 1\nc: d\n").splitlines()
    assert lines[0].startswith("config.yaml:3:2: did not find expected ',' or '}'")
    assert "begins at line 2" in lines[0]
    assert lines[1:] == ["    c: d", "     ^"]


@pytest.mark.parametrize(
    "text",
    [
        "token: 'hf_abcdef\n",
        "run: {hub_token: hf_abcdef, x: [\n",
        '"api_key": hf_abcdef: x',
        "u: http://hf_abcdef@h: x",
    ],
)
def test_syntax_errors_do_not_show_secrets(text: str) -> None:
    assert "hf_abcdef" not in error_of(text)


def test_limits() -> None:
    assert "more than 32 levels" in error_of("a: " + "[" * 100_000)
    assert "more than 32 levels" in error_of("a: " + "{b: " * 400)
    assert "more than 10,000 values" in error_of("a: [" + "1," * 20_000 + "]")
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in ("ab", "bc", "cd", "de")
    )
    assert "more than 10,000 values, aliases included" in error_of(bomb)
    deep = "a: &a [[[[[[[[1]]]]]]]]\n" + "".join(
        f"{name}: &{name} [[[[[[[[*{before}]]]]]]]]\n" for before, name in ("ab", "bc", "cd")
    )
    assert "more than 32 levels" in error_of(deep)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    Path("large.yaml").write_text("a: 1\n" * 300_000)
    Path("latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    expected = {
        "none.yaml": "none.yaml: no such file",
        "folder.yaml": "folder.yaml: is a directory, not a YAML file",
        "large.yaml": "large.yaml: is larger than 1,000,000 bytes: this is not a config",
        "latin.yaml": "latin.yaml:2:7: byte 0xe9 at offset 11 is not UTF-8. Save the file as UTF-8.",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigError) as caught:
            read_document(name)
        assert str(caught.value) == message


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("\ufeffa: é\r\nb: 2\r\n".encode())
    assert read_document(path).values == {"a": "é", "b": 2}


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "\ufeff"])
def test_an_empty_file_is_an_empty_document(text: str) -> None:
    assert parse_document(text, "config.yaml") == ConfigDocument({}, {}, "config.yaml")


def test_a_pipe_that_nobody_writes_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from finetuning import distributed

    monkeypatch.setattr(distributed, "announce_wait", functools.partial(distributed.announce_wait, after_s=0.02))
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)

    def write_once_it_is_named() -> None:
        while "to be written: it is a pipe" not in caplog.text:
            time.sleep(0.005)
        pipe.write_text("a: 1")

    writer = threading.Thread(target=write_once_it_is_named)
    writer.start()
    assert "a" in read_document(pipe).values
    writer.join()
