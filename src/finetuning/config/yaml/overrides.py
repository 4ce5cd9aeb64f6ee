"""Apply `key.path=value` overrides from the command line to a config document."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetuning.config.redaction import is_secret_path, redact_text
from finetuning.config.yaml.document import (
    COMMAND_LINE,
    ConfigDocument,
    KeyPath,
    SourceSpan,
    YamlSection,
    YamlValue,
    dotted,
)
from finetuning.config.yaml.reader import parse_value
from finetuning.errors import ConfigError, Location, Problem


def apply_overrides(document: ConfigDocument, overrides: Sequence[str]) -> ConfigDocument:
    """Return the document with the overrides applied in order. Values are parsed as YAML.

    Numbers in a path are list indexes from 0; the index after the last item appends an item.

    Raises:
        ConfigError: overrides without "=", with invalid YAML, or with a path through a value that is not a section.
            Lists all of them.
    """
    problems: list[Problem] = []
    for text in overrides:
        try:
            document = _apply(document, text)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return document


def _apply(document: ConfigDocument, text: str) -> ConfigDocument:
    name, equals, value_text = text.partition("=")
    parts = name.strip().split(".")
    displayed = _displayed(text, parts)
    if not equals or not all(parts):
        raise _error("expected key.path=value", displayed)
    try:
        value = parse_value(value_text, COMMAND_LINE)
    except ConfigError as error:
        reason = error.problems[0].message.split("\n", 1)[0]
        why = "" if is_secret_path(parts) else f": {reason}"
        raise _error(f"the value is not YAML{why}", displayed) from None
    values, path = _set_in_section(document.values, parts, value, (), displayed)
    marks = {key: mark for key, mark in document.marks.items() if key[: len(path)] != path}
    mark = SourceSpan(override=displayed)
    for end in range(1, len(path) + 1):
        if path[:end] not in marks:
            marks[path[:end]] = mark
    return ConfigDocument(values, marks, document.file)


def _set(
    values: YamlValue, parts: list[str], value: YamlValue, done: KeyPath, displayed: str
) -> tuple[YamlValue, KeyPath]:
    """Return a copy of the values with one value set, and the path that it was set at."""
    if not parts:
        return value, done
    head, rest = parts[0], parts[1:]
    if isinstance(values, list):
        index = int(head) if head.isdecimal() and len(head) < 8 else -1
        if not 0 <= index <= len(values):
            raise _error(f'"{dotted(done)}" has items 0 to {len(values) - 1}; "{head}" is none of them', displayed)
        copy = list(values)
        old = copy.pop(index) if index < len(values) else None
        item, path = _set(old, rest, value, (*done, index), displayed)
        copy.insert(index, item)
        return copy, path
    if values is not None and not isinstance(values, dict):
        raise _error(f'"{dotted(done)}" is a value, not a section', displayed)
    return _set_in_section(values or {}, parts, value, done, displayed)


def _set_in_section(
    section: YamlSection, parts: list[str], value: YamlValue, done: KeyPath, displayed: str
) -> tuple[YamlSection, KeyPath]:
    head, rest = parts[0], parts[1:]
    copy = dict(section)
    key: str | int = head
    if head not in copy and head.isdecimal() and int(head) in copy:
        key = int(head)
    copy[key], path = _set(copy.get(key), rest, value, (*done, key), displayed)
    return copy, path


def _displayed(text: str, parts: list[str]) -> str:
    """Return the override as it may be displayed, without secrets."""
    if is_secret_path(parts):
        return f"{'.'.join(parts)}=…"
    displayed = redact_text(text)
    return displayed if len(displayed) <= 100 else displayed[:99] + "…"


def _error(message: str, displayed: str) -> ConfigError:
    return ConfigError(message, location=Location(file=f'{COMMAND_LINE} "{displayed}"'))


_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def unescape(template: str) -> str:
    r"""A template of one line with written-out escapes as what they stand for, and nothing else touched.

    One of several lines has its line breaks already, and stays as it is.

    >>> unescape("\\n### Réponse:")
    '\n### Réponse:'
    """
    if "\n" in template:
        return template
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match.group()], template)
