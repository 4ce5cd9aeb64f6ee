"""Find words of `vocabulary_denylist.toml` in names, comments, strings and documents.

    python scripts/vocabulary.py [PATH ...]     every use, with the term to use instead

As a module, `private_words` serves the tests and the metrics.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DENY_LIST = Path(__file__).with_name("vocabulary_denylist.toml")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**/*.md", "configs/**/*.md")
KEPT = re.compile(r"#\s*(old name|PEFT's name|row text)\b")
OWN_TESTS = "test_vocabulary.py"
# Lower-case runs, capitalized words and acronyms: `RowFate`, `row_fate`, `HTTPRoad`.
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
CODE_IN_MARKDOWN = re.compile(r"^(`{3,}|~{3,}).*?^\1|`[^`\n]+`|\]\([^)]*\)|<!--.*?-->", re.MULTILINE | re.DOTALL)
DUNDER = re.compile(r"__\w+__")


@dataclass(frozen=True)
class Use:
    """A word where it should not be."""

    path: Path
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.word!r}; write: {self.instead}"


@dataclass(frozen=True)
class DenyList:
    words: dict[str, str]
    identifier_words: dict[str, str]
    names: dict[str, str]
    phrases: dict[str, str]

    @classmethod
    def read(cls, path: Path = DENY_LIST) -> DenyList:
        return cls(**tomllib.loads(path.read_text(encoding="utf-8")))

    @cached_property
    def _text_pattern(self) -> re.Pattern[str]:
        """Words and phrases in one pattern; a hyphen is a part of a word, and a phrase may be broken over lines."""
        phrases = (phrase.replace(" ", r"\s+") for phrase in self.phrases)
        return re.compile(rf"(?<![\w-])(?:{'|'.join([*self.words, *phrases])})(?![\w-])", re.IGNORECASE)

    def in_name(self, name: str) -> Iterator[tuple[str, str]]:
        """The denied words of an identifier, each with the term to use instead."""
        stripped = name.strip("_")
        if stripped in self.names:
            yield stripped, self.names[stripped]
        denied = self.words | self.identifier_words
        for word in WORDS.findall(name):
            if word.lower() in denied:
                yield f"{word} in {name}" if word != name else word, denied[word.lower()]

    def in_text(self, text: str) -> Iterator[tuple[int, str, str]]:
        """Line (from 0), word and the term to use instead of everything denied in a text."""
        for match in self._text_pattern.finditer(text):
            word = " ".join(match.group().lower().split())
            if (instead := self.words.get(word)) is None:
                phrases = self.phrases.items()
                instead = next(term for phrase, term in phrases if re.match(phrase.removeprefix("(?<!fine-)"), word))
            yield text.count("\n", 0, match.start()), word, instead


def defined_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module names itself; names that it only uses may be a library's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
            if not isinstance(node, ast.ClassDef):
                yield from _arguments(node)
        elif isinstance(node, ast.Lambda):
            yield from ((node.lineno, argument.arg) for argument in node.args.args)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs) and node.name:
            yield node.lineno, node.name


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    """Arguments; `other` is what Python's own documents call that of `__eq__` and its like."""
    every = function.args
    arguments = [*every.posonlyargs, *every.args, *every.kwonlyargs, *filter(None, (every.vararg, every.kwarg))]
    is_dunder = DUNDER.fullmatch(function.name)
    yield from ((item.lineno, item.arg) for item in arguments if not (is_dunder and item.arg == "other"))


def texts(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string, those inside f-strings and docstrings included, and every comment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def uses_in_module(path: Path, denied: DenyList) -> Iterator[Use]:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    kept = {number for number, line in enumerate(source.splitlines(), 1) if KEPT.search(line)}
    names = [(1, path.parent.name if path.stem == "__init__" else path.stem), *defined_names(tree)]
    uses = {(line, *pair) for line, name in names for pair in denied.in_name(name)}
    for start, text in texts(source, tree):
        uses |= {(start + offset, word, instead) for offset, word, instead in denied.in_text(text)}
    for line, word, instead in sorted(uses):
        if line not in kept:
            yield Use(path, line, word, instead)


def uses_in_document(path: Path, denied: DenyList) -> Iterator[Use]:
    """Uses in the prose of a Markdown page; code may cite old names."""
    text = path.read_text(encoding="utf-8")
    prose = CODE_IN_MARKDOWN.sub(lambda match: "\n" * match.group().count("\n") or " ", text)
    yield from (Use(path, line + 1, word, instead) for line, word, instead in denied.in_text(prose))


def uses_in_comments(path: Path, denied: DenyList) -> Iterator[Use]:
    """Uses in the comments of a YAML file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        _, mark, comment = line.partition("#")
        yield from (Use(path, number, word, instead) for _, word, instead in denied.in_text(mark and comment))


def uses_in(path: Path, denied: DenyList) -> Iterable[Use]:
    readers = {".py": uses_in_module, ".md": uses_in_document, ".yaml": uses_in_comments, ".yml": uses_in_comments}
    return readers[path.suffix](path, denied) if path.suffix in readers else ()


def private_words() -> dict[str, list[Use]]:
    """Every use in `src/` by package, and in the documents, recipes, tests, examples and scripts."""
    denied = DenyList.read()
    uses: dict[str, list[Use]] = defaultdict(list)
    package = ROOT / "src" / "finetuning"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        uses[parts[0] if len(parts) > 1 else "top-level modules"] += uses_in(path, denied)
    for path in sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)}):
        uses["documents"] += uses_in(path, denied)
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        uses["configs"] += uses_in(path, denied)
    for folder in ("tests", "examples", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != OWN_TESTS:
                uses[folder] += uses_in(path, denied)
    return dict(uses)


def main() -> int:
    parser = argparse.ArgumentParser(description="Print each use of a private word, with the term to use instead.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or folders; without any, the whole repository")
    denied = DenyList.read()
    paths = [Path(name).resolve() for name in parser.parse_args().paths]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    uses = [use for file in files for use in uses_in(file, denied)]
    if not paths:
        uses = [use for group in private_words().values() for use in group]
    print(*uses, f"{len(uses)} uses of private words", sep="\n")
    return 1 if uses else 0


if __name__ == "__main__":
    sys.exit(main())
