"""The values of a config file with the position of each, and the issues found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal, TypeAlias

from finetuning.errors import Location, Problem

YamlValue: TypeAlias = "str | int | float | bool | list[YamlValue] | dict[str | int, YamlValue] | None"
"""A plain value of a YAML file."""
YamlSection: TypeAlias = "dict[str | int, YamlValue]"

KeyPath = tuple[str | int, ...]
"""Keys and list indexes from the top of the file down to a value."""

COMMAND_LINE = "command line"


def dotted(path: KeyPath) -> str:
    """Return a path in dotted notation.

    >>> dotted(("data_conf", "datasets", 0, "path"))
    'data_conf.datasets.0.path'
    """
    return ".".join(str(part) for part in path)


@dataclass(frozen=True)
class SourceSpan:
    """Where a key or a list item comes from: 1-based line and column in the file, or a command-line override."""

    line: int | None = None
    column: int | None = None
    override: str | None = None
    source: Location | None = None
    """Origin of a value that no config file sets: a command-line flag, or another file."""


@dataclass(frozen=True)
class ConfigDocument:
    """The plain values of a YAML file (mappings, lists, text, numbers, booleans and null) and the position of each
    key."""

    values: YamlSection
    marks: Mapping[KeyPath, SourceSpan] = field(default_factory=dict[KeyPath, SourceSpan])
    file: str | None = None
    defaults: frozenset[KeyPath] = frozenset()
    """Paths whose values are the defaults of another engine: its user has not written them."""

    def mark_of(self, path: KeyPath) -> SourceSpan | None:
        """Return the span of a path, or of the nearest enclosing section if the path has none."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.marks:
                return self.marks[path[:end]]
        return None

    def location_of(self, path: KeyPath) -> Location:
        """Return the location of a key, or of the enclosing section if the key is absent."""
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
        """Return `file:line` or `command line` for a value that is set, None for one that is not."""
        if not self.has(path):
            return None
        mark = self.mark_of(path)
        if mark is not None and mark.override is not None:
            return COMMAND_LINE
        return ":".join(str(part) for part in (self.file, mark.line if mark else None) if part is not None) or "given"

    def has(self, path: KeyPath) -> bool:
        return _find(self.values, path) is not Absent.ABSENT

    def get(self, path: KeyPath, default: YamlValue = None) -> YamlValue:
        """Return the value at a path, or the default."""
        value = _find(self.values, path)
        return default if value is Absent.ABSENT else value

    def with_value(self, path: KeyPath, value: YamlValue) -> ConfigDocument:
        """Return a copy with a different value at a path whose enclosing section exists. Spans do not change."""
        return replace(self, values=_with_value(self.values, path, value))

    def without(self, path: KeyPath) -> ConfigDocument:
        """Return a copy without a key. Its span is kept, so that messages can still refer to it."""
        section = self.get(path[:-1])
        kept = {key: value for key, value in section.items() if key != path[-1]} if isinstance(section, dict) else {}
        return replace(self, values=kept if len(path) == 1 else _with_value(self.values, path[:-1], kept))

    def with_marks(self, marks: Mapping[KeyPath, SourceSpan]) -> ConfigDocument:
        """Return a copy with additional spans."""
        return replace(self, marks={**self.marks, **marks})


class Absent(Enum):
    """The value at a path that is not set, because None is a value."""

    ABSENT = 0


def child_of(values: YamlValue, part: str | int) -> YamlValue | Literal[Absent.ABSENT]:
    """Return the value of a key or the item at an index, `ABSENT` if there is none."""
    if isinstance(values, dict):
        return values.get(part, Absent.ABSENT)
    if isinstance(values, list) and isinstance(part, int) and 0 <= part < len(values):
        return values[part]
    return Absent.ABSENT


def _find(values: YamlValue, path: KeyPath) -> YamlValue | Literal[Absent.ABSENT]:
    for part in path:
        child = child_of(values, part)
        if child is Absent.ABSENT:
            return child
        values = child
    return values


def value_at(values: YamlValue, path: KeyPath) -> YamlValue:
    """Return the value at a path; None if it is not set."""
    value = _find(values, path)
    return None if value is Absent.ABSENT else value


def _with_value(section: YamlSection, path: KeyPath, value: YamlValue) -> YamlSection:
    return {**section, path[0]: _replaced(section.get(path[0]), path[1:], value)}


def _replaced(old: YamlValue, path: KeyPath, value: YamlValue) -> YamlValue:
    if not path:
        return value
    if isinstance(old, list):
        return [_replaced(item, path[1:], value) if index == path[0] else item for index, item in enumerate(old)]
    return _with_value(old if isinstance(old, dict) else {}, path, value)


Kind = Literal["unknown key", "missing", "type", "value", "warning"]

MAX_ISSUES = 50


@dataclass(frozen=True)
class ValidationIssue:
    """Something that is wrong at a path of the document, and a hint on how to fix it."""

    path: KeyPath
    message: str
    hint: str | None = None
    kind: Kind = "value"
    meant: str | None = None
    """For an unknown key: the most similar key of the same section."""


def to_problems(findings: Sequence[ValidationIssue], document: ConfigDocument) -> list[Problem]:
    """Return the issues as problems with locations, in file order and without duplicates. At most 50 are listed."""
    problems: dict[str, Problem] = {}
    for finding in findings:
        message = finding.message
        if finding.hint and message[-1] not in ".;:":
            message += "."
        problem = Problem(message, document.location_of(finding.path), finding.hint)
        problems.setdefault(str(problem), problem)
    ordered = sorted(problems.values(), key=lambda problem: (problem.location.line or 0, problem.location.column or 0))
    if len(ordered) <= MAX_ISSUES:
        return ordered
    rest = len(ordered) - MAX_ISSUES
    return [*ordered[:MAX_ISSUES], Problem(f"and {rest} more problems", document.location_of(()))]
