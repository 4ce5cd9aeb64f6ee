"""What the user wrote, as plain values, with the place of each.

What a check has found wrong, before it is known where in the file that stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from finetuning.errors import Location, Problem

KeyPath = tuple[str | int, ...]
"""Keys and list indexes from the top of the file down to a value."""

COMMAND_LINE = "command line"


def dotted(path: KeyPath) -> str:
    """A path as people write it.

    >>> dotted(("data_conf", "datasets", 0, "path"))
    'data_conf.datasets.0.path'
    """
    return ".".join(str(part) for part in path)


@dataclass(frozen=True)
class SourceSpan:
    """Where a key or a list item begins: 1-based line and column in the file, or what else it came from."""

    line: int | None = None
    column: int | None = None
    override: str | None = None
    source: Location | None = None
    """What gave the value where no config did: a flag, or another file."""


@dataclass(frozen=True)
class ConfigDocument:
    """The values of a YAML file: mappings, lists, text, numbers, booleans and null, and where each was written."""

    values: dict[str, Any]
    marks: Mapping[KeyPath, SourceSpan] = field(default_factory=dict)
    file: str | None = None

    def mark_of(self, path: KeyPath) -> SourceSpan | None:
        """The mark of a path or, where nothing was written there, of the nearest section round it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.marks:
                return self.marks[path[:end]]
        return None

    def location_of(self, path: KeyPath) -> Location:
        """Where a key is written; the section round it when it is not there."""
        mark = self.mark_of(path)
        key = dotted(path) or None
        if mark is None:
            return Location(file=self.file, key=key)
        if mark.source is not None:
            return mark.source
        if mark.override is not None:
            return Location(file=f'{COMMAND_LINE} "{mark.override}"', key=key)
        return Location(file=self.file, line=mark.line, column=mark.column, key=key)

    def origin_of(self, path: KeyPath) -> str | None:
        """`file:line` or `command line` for a value that was written, None for one that was not."""
        if not self.has(path):
            return None
        mark = self.mark_of(path)
        if mark is not None and mark.override is not None:
            return COMMAND_LINE
        return ":".join(str(part) for part in (self.file, mark.line if mark else None) if part is not None) or "given"

    def has(self, path: KeyPath) -> bool:
        return _find(self.values, path) is not _ABSENT

    def get(self, path: KeyPath, default: Any = None) -> Any:
        """The value at a path, or the default."""
        found = _find(self.values, path)
        return default if found is _ABSENT else found

    def with_value(self, path: KeyPath, value: Any) -> ConfigDocument:
        """A copy with another value at a path whose surrounding sections exist; marks stay as they are."""
        return replace(self, values=_replaced(self.values, path, value))

    def without(self, path: KeyPath) -> ConfigDocument:
        """A copy without a key; its mark stays, so that a message can still say where it was."""
        section = {key: value for key, value in self.get(path[:-1]).items() if key != path[-1]}
        return replace(self, values=_replaced(self.values, path[:-1], section))

    def with_marks(self, marks: Mapping[KeyPath, SourceSpan]) -> ConfigDocument:
        """A copy with more marks."""
        return replace(self, marks={**self.marks, **marks})


_ABSENT = object()


def _find(values: Any, path: KeyPath) -> Any:
    for part in path:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and 0 <= part < len(values)
        ):
            values = values[part]
        else:
            return _ABSENT
    return values


def _replaced(values: Any, path: KeyPath, value: Any) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(values, list):
        copy = list(values)
        copy[head] = _replaced(copy[head], rest, value)  # type: ignore[index]
        return copy
    copy = dict(values)
    copy[head] = _replaced(copy.get(head), rest, value)
    return copy


Kind = Literal["unknown key", "missing", "type", "value", "warning"]

MAX_ISSUES = 50


@dataclass(frozen=True)
class ValidationIssue:
    """One thing that is wrong at a path of the document, and what to do about it."""

    path: KeyPath
    message: str
    hint: str | None = None
    kind: Kind = "value"
    meant: str | None = None
    """For an unknown key: the key of the same section that was probably meant."""


def to_problems(findings: Sequence[ValidationIssue], document: ConfigDocument) -> list[Problem]:
    """The findings as problems with their places, in the file's order, each once; a count stands for very many."""
    problems = {}
    for finding in findings:
        message = finding.message
        if finding.hint and message[-1] not in ".;:":
            message += "."
        problem = Problem(message, document.location_of(finding.path), finding.hint)
        problems.setdefault(str(problem), problem)
    ordered = sorted(problems.values(), key=lambda problem: (problem.place.line or 0, problem.place.column or 0))
    if len(ordered) <= MAX_ISSUES:
        return ordered
    rest = len(ordered) - MAX_ISSUES
    return [*ordered[:MAX_ISSUES], Problem(f"and {rest} more problems", document.location_of(()))]
