"""Measure the code base against its bounds.

    python scripts/metrics.py [--without-types] [--without-trace]

Prints one line per measure: its value, its bound, and whether it is met; below, what to look at where it is not. Exits
with 1 when a bound is missed. The type check and the trace take about a minute each and can be left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from vocabulary import private_words

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "finetuning"
SHORT_LINES, LONG_LINES, FUNCTION_LINES = 60, 600, 60
DETAILS_SHOWN = 12
REPEATABLE_STEMS = {"__init__", "__main__"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measure:
    """A value and its bounds; without any it is displayed for information."""

    name: str
    value: float
    most: float | None = None
    least: float | None = None
    details: tuple[str, ...] = ()

    @property
    def is_met(self) -> bool:
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    def __str__(self) -> str:
        bounds = [f"<= {self.most:g}"] if self.most is not None else []
        bounds += [f">= {self.least:g}"] if self.least is not None else []
        verdict = ("ok  " if self.is_met else "FAIL") if bounds else "    "
        return f"{verdict}  {self.name:<52} {self.value:>7g}  {', '.join(bounds)}".rstrip()


@dataclass(frozen=True)
class Module:
    path: Path
    source: str

    @property
    def name(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def lines(self) -> int:
        return len(self.source.splitlines())

    @property
    def counts(self) -> bool:
        """Whether the file has a statement; an `__init__.py` with a docstring at most is no module to read."""
        return any(not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in self.tree.body)


def read_modules(package: Path = PACKAGE) -> list[Module]:
    return [Module(path, path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))]


def any_references(tree: ast.Module) -> int:
    """How often `typing.Any` is referred to, by any name that it was imported under; its imports do not count.

    Annotations in quotes are parsed, too.
    """
    aliases, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("typing", "typing_extensions"):
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name == "Any"}
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "typing"}
    count = 0
    for node in [*ast.walk(tree), *quoted_annotations(tree)]:
        if isinstance(node, ast.Name):
            count += node.id in aliases
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            count += node.attr == "Any" and node.value.id in modules
    return count


def quoted_annotations(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes inside the annotations and `cast` targets that are written as strings."""
    for node in ast.walk(tree):
        places: list[ast.expr | None] = []
        if isinstance(node, Function):
            places = [node.returns]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            places = [node.annotation]
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split(".")[-1] == "cast":
            places = [node.args[0]]
        for location in filter(None, places):
            for inner in ast.walk(location):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    try:
                        yield from ast.walk(ast.parse(inner.value, mode="eval"))
                    except SyntaxError:  # a value of Literal[...]
                        continue


def long_functions(modules: list[Module]) -> list[str]:
    spans = (
        (f"{module.name}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, Function)
    )
    return [f"{where}: {lines} lines" for where, lines in spans if lines > FUNCTION_LINES]


def repeated_classes(modules: list[Module]) -> list[str]:
    places = defaultdict(list)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{module.name}:{node.lineno}")
    return [f"class {name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


def repeated_files(modules: list[Module]) -> list[str]:
    places = defaultdict(list)
    for module in modules:
        if module.path.stem not in REPEATABLE_STEMS:
            places[module.path.stem].append(module.name)
    return [f"{name}.py: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


def import_cycles() -> list[str]:
    """Cycles of imports, those under TYPE_CHECKING included."""
    sys.path.insert(0, str(PACKAGE.parent))
    import grimp

    graph = grimp.build_graph("finetuning", exclude_type_checking_imports=False, cache_dir=None)
    return cycles({module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules})


def cycles(imports: dict[str, set[str]]) -> list[str]:
    """Cycles of a graph, each as `a -> b -> a`, until cutting one import of each leaves none."""
    imports = {module: set(imported) for module, imported in imports.items()}
    cycles = []
    while True:
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            chain = error.args[1][::-1]
            cycles.append(" -> ".join(name.removeprefix("finetuning.") for name in chain))
            imports[chain[0]].discard(chain[1])
        else:
            return cycles


def comments_per_100_lines(modules: list[Module]) -> float:
    """Comment lines per 100 lines; markers for tools (`noqa`, `type:`, `pyright:`) are no comments."""
    comments = 0
    for module in modules:
        for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
            text = token.string.lstrip("# ")
            if token.type == tokenize.COMMENT and not text.startswith(("noqa", "type:", "pyright:", "pragma:")):
                comments += 1
    return round(100 * comments / sum(module.lines for module in modules), 2)


def structure(modules: list[Module]) -> Iterator[Measure]:
    counted = [module for module in modules if module.counts]
    short = [f"{module.name}: {module.lines} lines" for module in counted if module.lines < SHORT_LINES]
    long = [f"{module.name}: {module.lines} lines" for module in counted if module.lines > LONG_LINES]
    # 225 until the layout was settled; above that, for features that are concepts of their own, such as vision.
    yield Measure("modules", len(counted), most=300)
    yield Measure(f"modules under {SHORT_LINES} lines", len(short), most=10, details=tuple(short))
    yield Measure(f"modules over {LONG_LINES} lines", len(long), most=0, details=tuple(long))
    lists = {
        f"functions over {FUNCTION_LINES} lines": long_functions(modules),
        "import cycles, TYPE_CHECKING included": import_cycles(),
        "class names defined more than once": repeated_classes(modules),
    }
    for name, items in lists.items():
        yield Measure(name, len(items), most=0, details=tuple(items))
    repeated = repeated_files(modules)
    yield Measure("file names used more than once", len(repeated), details=tuple(repeated))
    yield Measure("comment lines per 100 lines", comments_per_100_lines(modules))


def typing(modules: list[Module], *, with_pyright: bool) -> Iterator[Measure]:
    counts = {module.name: any_references(module.tree) for module in modules}
    most_used = sorted(counts.items(), key=lambda item: -item[1])
    details = tuple(f"{name}: {count}" for name, count in most_used if count)
    yield Measure("references to typing.Any", sum(counts.values()), most=300, details=details)
    if with_pyright:
        errors = pyright_errors()
        yield Measure("pyright errors", len(errors), most=0, details=tuple(errors))


def pyright_errors() -> list[str]:
    """Errors of pyright with the settings of pyproject.toml.

    Raises:
        SystemExit: pyright could not run, or found no file to check, which it does not call an error.
    """
    command = [str(Path(sys.executable).with_name("pyright")), "--outputjson", "--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        report = json.loads(result.stdout)
    except ValueError:
        sys.exit(f"pyright did not run: {result.stderr or result.stdout}")
    if not report["summary"]["filesAnalyzed"]:
        sys.exit("pyright found no file to check: see [tool.pyright] in pyproject.toml")
    errors = []
    for item in report["generalDiagnostics"]:
        if item["severity"] == "error":
            where = f"{Path(item['file']).relative_to(ROOT)}:{item['range']['start']['line'] + 1}"
            errors.append(f"{where}: {item['message'].splitlines()[0]}")
    return errors


def trace() -> Iterator[Measure]:
    """What a four-row LoRA SFT run enters, in a process of its own.

    Raises:
        SystemExit: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "trace.json")
        command = [sys.executable, str(ROOT / "scripts" / "trace_run.py"), "--json", str(report)]
        environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"scripts/trace_run.py failed:\n{result.stdout}{result.stderr}")
        traced = json.loads(report.read_text())
    files = sorted({name.partition(":")[0] for name in traced["functions"]})
    data = [name for name in files if name.startswith("data/")]
    yield Measure("files entered by a LoRA SFT run of four rows", len(files), most=100, details=tuple(files))
    yield Measure("of those in data/", len(data), most=22, details=tuple(data))
    for name, key, most in (
        ("frames from the console script to trainer.train()", "frames_to_train", 5),
        ("frames from a logged loss to the tracker's queue", "frames_to_queue", 4),
    ):
        yield Measure(name, len(traced[key]), least=1, most=most, details=tuple(traced[key]))


def vocabulary() -> Measure:
    uses = private_words()
    details = tuple(f"{package}: {len(items)}" for package, items in sorted(uses.items()) if items)
    return Measure("private words", sum(map(len, uses.values())), most=0, details=details)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--without-types", action="store_true", help="leave pyright out")
    parser.add_argument("--without-trace", action="store_true", help="leave the traced run out")
    parser.add_argument("--all-details", action="store_true", help="show every place instead of the first few")
    options = parser.parse_args()
    modules = read_modules()
    measures = [*structure(modules), *typing(modules, with_pyright=not options.without_types), vocabulary()]
    if not options.without_trace:
        measures += trace()
    print(*measures, sep="\n")
    for measure in measures:
        if not measure.is_met:
            displayed = measure.details if options.all_details else measure.details[:DETAILS_SHOWN]
            left_out = len(measure.details) - len(displayed)
            print(f"\n{measure.name}:", *(f"    {item}" for item in displayed), sep="\n")
            if left_out:
                print(f"    and {left_out} more; --all-details lists them")
    return 0 if all(measure.is_met for measure in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
