"""The code and the documents use the field's words: nothing of scripts/vocabulary_denylist.toml is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from vocabulary import DenyList, private_words, uses_in_document, uses_in_module

DENIED = DenyList.read()


def test_no_private_word_is_left() -> None:
    uses = {package: len(items) for package, items in private_words().items() if items}
    assert not uses, "python scripts/vocabulary.py lists them"


def words_in(source: str, tmp_path: Path, name: str = "rows.py") -> list[str]:
    path = tmp_path / name
    path.write_text(source)
    uses = uses_in_module(path, DENIED) if name.endswith(".py") else uses_in_document(path, DENIED)
    return [use.word for use in uses]


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("row_fate = 1", "fate in row_fate"),
        ("class RowFate: ...", "Fate in RowFate"),
        ("def f(told): ...", "told"),
        ("for one in rows: ...", "one"),
        ("self.found = 1", "found"),
        ("import a as sink", "sink"),
        ("message = f'{rows} are lying here'", "lying"),
        ('"""Rows\n\nand their fate."""', "fate"),
        ("a = 1  # told once", "told"),
        ("'''Nothing, when\n    there is room.'''", "nothing, when"),
    ],
)
def test_private_words_are_seen_in_names_strings_and_comments(source: str, word: str, tmp_path: Path) -> None:
    assert word in words_in(source, tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "unknown_keys = other_ranks = is_found = 1",
        "message = 'no file found: the given path is one of the known ones'",
        "class A:\n    def __eq__(self, other: object) -> bool: ...",
        "library.found()",
        "OLD_KEY = 'told'  # old name",
        "verbose = toldi = 'a fine-tuned model'",
    ],
)
def test_ordinary_english_and_old_names_are_allowed(source: str, tmp_path: Path) -> None:
    assert words_in(source, tmp_path) == []


def test_the_line_of_a_use_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.py"
    path.write_text('"""One.\n\nTwo, and its fate.\n"""\n')
    assert [use.line for use in uses_in_module(path, DENIED)] == [3]


def test_code_in_documents_may_cite_old_names(tmp_path: Path) -> None:
    text = "The key `told` was renamed.\n\n```python\nfate = 1\n```\n\n# The road\n"
    assert words_in(text, tmp_path, "page.md") == ["road"]
