"""A renderer for the templates of our chart, for machines without Helm.

It knows the words of Helm's language that the chart uses, and refuses others. `tests/cluster/test_helm.py` compares it
with Helm itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CONTROL = re.compile(r"\s*\{\{-? ?(?:(if|else if|range) (.+?)|(else|end)|fail \"(.+)\") ?-?\}\}\s*")
BLOCK = re.compile(r"\s*\{\{- toYaml (\S+) \| nindent (\d+) \}\}")
VALUE = re.compile(r"\{\{ (?:mul (\S+) (\S+)|(\S+?)( \| quote)?) \}\}")


class ChartError(Exception):
    """What Helm would refuse to render, with its message."""


def render_chart(chart: Path, overrides: Mapping[str, Any], release: str = "run") -> list[dict[str, Any]]:
    """Return the resources of a chart in the order of its templates' names.

    Raises:
        ChartError: the values do not fit the chart's schema, or a template fails.
    """
    import json

    values = yaml.safe_load((chart / "values.yaml").read_text()) | dict(overrides)
    schema = json.loads((chart / "values.schema.json").read_text())
    for error in jsonschema.Draft7Validator(schema).iter_errors(values):
        raise ChartError(f"values don't meet the specifications of the schema: {error.message}")
    scope = {"Values": values, "Release": {"Name": release}}
    items: list[dict[str, Any]] = []
    for file in sorted((chart / "templates").iterdir()):
        text = "\n".join(_lines(file.read_text().splitlines(), scope))
        items += [item for item in yaml.safe_load_all(text) if item]
    return items


def _look_up(path: str, scope: Mapping[str, Any]) -> Any:
    value: Any = scope
    for name in path.strip(".").split("."):
        value = value["."] if not name else value.get(name)
    return value


def _is_true(condition: str, scope: Mapping[str, Any]) -> bool:
    words = re.fullmatch(r'eq (\S+) "(.*)"', condition)
    return _look_up(words[1], scope) == words[2] if words else bool(_look_up(condition, scope))


def _branches(lines: Sequence[str], start: int) -> tuple[list[tuple[str, list[str]]], int]:
    """Return the branches of the block that begins at a line, each with its control line, and the line after it."""
    branches: list[tuple[str, list[str]]] = [(lines[start], [])]
    depth, index = 0, start + 1
    while True:
        control = CONTROL.fullmatch(lines[index])
        if control and control[3] == "end" and depth == 0:
            return branches, index + 1
        if control and control[1] in ("if", "range"):
            depth += 1
        elif control and control[3] == "end":
            depth -= 1
        if control and depth == 0 and (control[1] == "else if" or control[3] == "else"):
            branches.append((lines[index], []))
        else:
            branches[-1][1].append(lines[index])
        index += 1


def _lines(lines: Sequence[str], scope: Mapping[str, Any]) -> Iterator[str]:
    index = 0
    while index < len(lines):
        control = CONTROL.fullmatch(lines[index])
        if not control:
            yield from _filled(lines[index], scope)
            index += 1
        elif control[4]:
            raise ChartError(control[4])
        elif control[1] == "range":
            [(_, body)], index = _branches(lines, index)
            for item in _look_up(control[2], scope):
                yield from _lines(body, {**scope, "": item})
        else:
            branches, index = _branches(lines, index)
            for head, body in branches:
                words = CONTROL.fullmatch(head)
                assert words
                if words[3] == "else" or _is_true(words[2], scope):
                    yield from _lines(body, scope)
                    break


def _filled(line: str, scope: Mapping[str, Any]) -> Iterator[str]:
    block = BLOCK.fullmatch(line)
    if block:
        dumped = yaml.safe_dump(_look_up(block[1], scope), sort_keys=False)
        yield from (" " * int(block[2]) + item for item in dumped.splitlines())
        return

    def fill(match: re.Match[str]) -> str:
        if match[1]:
            return str(_look_up(match[1], scope) * _look_up(match[2], scope))
        value = str(scope[""] if match[3] == "." else _look_up(match[3], scope))
        return f'"{value}"' if match[4] else value

    line = VALUE.sub(fill, line)
    assert "{{" not in line, f"a word of Helm's language that this renderer does not know: {line}"
    yield line
