"""The measures of scripts/metrics.py count what they say."""

from __future__ import annotations

import ast
from pathlib import Path

import metrics
import pytest
from metrics import Measure, Module
from trace_run import Tracer


def module(name: str, source: str) -> Module:
    return Module(metrics.PACKAGE / name, source)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from typing import Any\ndef f(a: Any, b: list[Any]) -> None: ...", 2),
        ("from typing import Any as Anything\nx: Anything = 1", 1),
        ("import typing as t\nx = t.cast(t.Any, 1)", 1),
        ("from typing import Any\nx: 'dict[str, Any]' = {}", 1),
        ("from typing import Any\nAny_rows = 'Any'  # Any", 0),
        ("from sqlalchemy import Any\nx: Any", 0),
    ],
)
def test_references_to_any_are_counted_by_meaning(source: str, count: int) -> None:
    assert metrics.any_references(ast.parse(source)) == count


def test_an_init_without_statements_is_no_module() -> None:
    assert not module("a/__init__.py", '"""Only a docstring."""\n').counts
    assert module("a/__init__.py", "from a import b\n").counts


def test_structure_finds_what_is_too_long_and_what_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "import_cycles", lambda: [])
    long_function = "def f():\n" + "    a = 1\n" * metrics.FUNCTION_LINES
    modules = [
        module("a/rows.py", "class Row: ...\n" * 2),
        module("b/rows.py", "# why\n" + "\n" * metrics.LONG_LINES + "a = 1\n"),
        module("b/columns.py", long_function),
    ]
    values = {measure.name: measure.value for measure in metrics.structure(modules)}
    assert values["modules"] == 3
    assert values["modules under 60 lines"] == 1
    assert values["modules over 600 lines"] == 1
    assert values["functions over 60 lines"] == 1
    assert values["class names defined more than once"] == 1
    assert values["file names used more than once"] == 1


def test_a_missed_bound_fails() -> None:
    assert Measure("m", 3, most=3).is_met and not Measure("m", 4, most=3).is_met
    assert not Measure("m", 0, least=1, most=5).is_met
    assert Measure("m", 100).is_met


def test_each_cycle_is_listed_once() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d", "a"}}
    assert [set(cycle.split(" -> ")) for cycle in metrics.cycles(graph)] in (
        [{"a", "b", "c"}, {"d", "e"}],
        [{"d", "e"}, {"a", "b", "c"}],
    )
    assert metrics.cycles({"a": {"b"}, "b": set()}) == []


def test_every_frame_of_the_package_is_named_and_no_body_of_a_module_or_class(tmp_path: Path) -> None:
    source = "class A:\n    def f(self): ...\nrows = [row for row in ()]\n"
    code = compile(source, str(metrics.PACKAGE / "data" / "rows.py"), "exec")
    inner = [item for item in code.co_consts if hasattr(item, "co_name")]
    names = {item.co_name: Tracer._find_name(item) for item in [code, *inner]}
    assert names["<module>"] is None and names["A"] is None
    method = next(item for item in inner[0].co_consts if hasattr(item, "co_name"))
    assert Tracer._find_name(method) == "data/rows.py:A.f"
    elsewhere = compile(source, str(tmp_path / "rows.py"), "exec")
    assert Tracer._find_name(elsewhere) is None
