"""Conventions that a machine can check. Each rule is also run on a bad snippet and must reject it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "finetuning"
MODULES = sorted(PACKAGE.rglob("*.py"))

HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "mlflow", "bitsandbytes", "pandas", "scipy"}
LIGHT_PACKAGES = ("errors.py", "distributed.py", "atomic_io.py", "config/", "plan/", "cli/")
MOST_LINES = 600
MOST_FUNCTION_LINES = 60
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[ast.Module, str], Iterator[str]]


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported_at_top(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import that runs when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            waiting += node.orelse
        elif not isinstance(node, Function | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def heavy_import_in_light_package(tree: ast.Module, name: str) -> Iterator[str]:
    if name.startswith(LIGHT_PACKAGES):
        for line, package in imported_at_top(tree):
            if package in HEAVY:
                yield f"{name}:{line}: imports {package} at its top; import it inside the function that needs it"


def root_name(expression: ast.expr) -> str | None:
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None


def assignments(tree: ast.Module) -> Iterator[tuple[int, ast.expr, ast.expr | None]]:
    """Line, target and value of every assignment and deletion."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from ((node.lineno, target, node.value) for target in node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            yield node.lineno, node.target, node.value
        elif isinstance(node, ast.Delete):
            yield from ((node.lineno, target, None) for target in node.targets)


def patch_of_foreign_object(tree: ast.Module, name: str) -> Iterator[str]:
    """Assignments to an attribute of something imported; functions put into any object; setattr but on self."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    functions = {node.name for node in ast.walk(tree) if isinstance(node, Function)}
    for line, target, value in assignments(tree):
        owner = root_name(target)
        is_function = isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in functions)
        if isinstance(target, ast.Attribute) and (owner in imported or (is_function and owner != "self")):
            yield f"{name}:{line}: assigns to {ast.unparse(target)}; subclass or compose instead"
    for node in ast.walk(tree):
        is_setattr = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr")
        if is_setattr and root_name(node.args[0]) != "self":
            yield f"{name}:{node.lineno}: {ast.unparse(node)}; subclass or compose instead"


def print_outside_cli(tree: ast.Module, name: str) -> Iterator[str]:
    if not name.startswith("cli/"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{name}:{node.lineno}: prints; only cli/ does"


def broad_except(tree: ast.Module, name: str) -> Iterator[str]:
    """Handlers of everything, outside of cli/ and trackers; one that ends by raising again swallows nothing."""
    if name.startswith(("cli/", "telemetry/", "tracking/", "callbacks/", "report/")):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {ast.unparse(kind).split(".")[-1] if kind else "" for kind in kinds}
            last = node.body[-1]
            if caught & {"", "Exception", "BaseException"} and not (isinstance(last, ast.Raise) and last.exc is None):
                yield f"{name}:{node.lineno}: catches everything"


def long_function(tree: ast.Module, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Function) and (lines := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES:
            yield f"{name}:{node.lineno}: {node.name} has {lines} lines, {MOST_FUNCTION_LINES} are allowed"


def untyped_argument(tree: ast.Module, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
            for argument in arguments:
                if argument.annotation is None and argument.arg not in ("self", "cls"):
                    yield f"{name}:{node.lineno}: {node.name}: {argument.arg} has no type"


def no_postponed_annotations(tree: ast.Module, name: str) -> Iterator[str]:
    futures = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for alias in node.names
    }
    annotated = any(isinstance(node, Function | ast.AnnAssign) for node in ast.walk(tree))
    if annotated and "annotations" not in futures:
        yield f"{name}:1: lacks `from __future__ import annotations`"


RULES: dict[Rule, tuple[str, str]] = {
    heavy_import_in_light_package: ("plan/bad.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
    patch_of_foreign_object: ("model/bad.py", "import trl\ntrl.SFTTrainer.log = None"),
    print_outside_cli: ("training/bad.py", "def f() -> None:\n    print('here')"),
    broad_except: ("training/bad.py", "try:\n    pass\nexcept (OSError, Exception):\n    pass"),
    long_function: ("data/bad.py", "def f() -> None:\n" + "    a = 1\n" * MOST_FUNCTION_LINES),
    untyped_argument: ("data/bad.py", "class A:\n    def f(self, *, rows, **more: int) -> None: ..."),
    no_postponed_annotations: ("data/bad.py", "rows: int = 0"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_is_kept(rule: Rule) -> None:
    actual = [
        problem
        for path in MODULES
        for problem in rule(ast.parse(path.read_text()), path.relative_to(PACKAGE).as_posix())
    ]
    assert not actual, "\n".join(actual)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_objects_to_a_breach(rule: Rule) -> None:
    name, snippet = RULES[rule]
    assert len(list(rule(ast.parse(snippet), name))) == 1


@pytest.mark.parametrize(
    ("rule", "name", "snippet"),
    [
        (heavy_import_in_light_package, "plan/good.py", "def f() -> None:\n    import torch"),
        (heavy_import_in_light_package, "plan/good.py", "if TYPE_CHECKING:\n    import torch"),
        (heavy_import_in_light_package, "training/good.py", "import torch"),
        (patch_of_foreign_object, "model/good.py", "def f(model: M) -> None:\n    model.config.use_cache = False"),
        (broad_except, "training/good.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise"),
        (broad_except, "tracking/good.py", "try:\n    f()\nexcept Exception:\n    g()"),
        (print_outside_cli, "cli/good.py", "print('here')"),
    ],
)
def test_rule_allows_what_is_allowed(rule: Rule, name: str, snippet: str) -> None:
    assert not list(rule(ast.parse(snippet), name))


@pytest.mark.parametrize(
    "breach",
    [
        "import os as operating_system\noperating_system.sep = '/'",
        "from trl import SFTTrainer\nSFTTrainer.log = None",
        "def f(tokenizer: T) -> None:\n    tokenizer.save_pretrained = lambda *_: None",
        "def g() -> None: ...\ndef f(tokenizer: T) -> None:\n    tokenizer.save_pretrained = g",
        "def f(tokenizer: T) -> None:\n    setattr(tokenizer, 'pad', 1)",
        "import torch\ndel torch.compile",
    ],
)
def test_every_kind_of_patch_is_seen(breach: str) -> None:
    assert list(patch_of_foreign_object(ast.parse(breach), "model/bad.py"))


def too_long(paths: list[Path]) -> list[str]:
    counts = {path: len(path.read_text().splitlines()) for path in paths}
    return [f"{path}: {lines} lines, {MOST_LINES} are allowed" for path, lines in counts.items() if lines > MOST_LINES]


def test_files_are_short(tmp_path: Path) -> None:
    assert not too_long(MODULES)
    (tmp_path / "long.py").write_text("\n" * (MOST_LINES + 1))
    assert len(too_long([tmp_path / "long.py"])) == 1


def vague(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths if VAGUE_NAMES & set(re.split(r"[_/.]", path.as_posix()))]


def test_names_say_what_is_inside() -> None:
    assert not vague([path.relative_to(SRC) for path in MODULES])
    assert vague([Path("finetuning/data/row_utils.py"), Path("finetuning/common/rows.py")]) != []


def first_cycle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, in order; empty when there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_have_no_cycle() -> None:
    graph = grimp.build_graph("finetuning", exclude_type_checking_imports=True, cache_dir=None)
    assert not first_cycle({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    assert first_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


def lint_imports(source: Path) -> subprocess.CompletedProcess[str]:
    """import-linter with the project's contracts on the package in this folder."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    command += ["--config", str(ROOT / ".importlinter")]
    environment = os.environ | {"PYTHONPATH": str(source)}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)


def test_packages_import_only_from_lower_packages() -> None:
    result = lint_imports(SRC)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "imports", "broken"),
    [
        ("config/redaction.py", "finetuning.cli.main", "A package imports only from packages below it"),
        ("data/__init__.py", "finetuning.model", "A package imports only from packages below it"),
        ("export/__init__.py", "finetuning.data", "export uses model only"),
        ("attic/__init__.py", "finetuning.errors", "A package imports only from packages below it"),
    ],
)
def test_a_wrong_arrow_breaks_the_contracts(tmp_path: Path, module: str, imports: str, broken: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "finetuning", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "finetuning" / module
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as stream:
        stream.write(f"\nimport {imports}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    assert broken in result.stdout


def loaded_by(module: str, source: Path = SRC) -> set[str]:
    """The heavy packages that importing a module loads, seen in a process of its own."""
    code = f"import sys, {module}; print(*(set({sorted(HEAVY)}) & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split())


def console_modules() -> list[str]:
    scripts = re.findall(r'= "(finetuning\.cli\.\w+):main"', (ROOT / "pyproject.toml").read_text())
    return [script for script in scripts if (SRC / f"{script.replace('.', '/')}.py").is_file()]


@pytest.mark.parametrize(
    "module", ["finetuning.config.sections.experiment", "finetuning.plan.plan", *console_modules()]
)
def test_light_packages_load_nothing_heavy(module: str) -> None:
    assert loaded_by(module) == set()


def test_a_heavy_import_further_down_is_seen(tmp_path: Path) -> None:
    (tmp_path / "light.py").write_text("import further_down\n")
    (tmp_path / "further_down.py").write_text("import trl\n")
    assert "trl" in loaded_by("light", tmp_path)


MACHINE_PATHS = re.compile(r"(?<![\w.])(/home/(?!finetuning\b|<)|/Users/(?!<)|/mnt/[a-z]/|[A-Z]:\\\\?Users)")


def machine_paths(text: str, of_this_machine: list[str]) -> list[str]:
    """Places in a text that name a folder of one person's or one machine's."""
    here = [location for location in of_this_machine if location in text]
    return here + [match.group() for match in MACHINE_PATHS.finditer(text)]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_path_of_a_machine_is_in_the_repository() -> None:
    configured = [os.environ.get(name, "") for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")]
    local = [location for value in configured for location in value.split() if location.startswith(("/", "file:"))]
    here = [f"{ROOT}/", f"{sys.prefix}/", *local]
    actual = {}
    for path in tracked_files():
        if path != Path(__file__).resolve() and (places := machine_paths(path.read_text(errors="replace"), here)):
            actual[str(path.relative_to(ROOT))] = places
    assert not actual
    assert machine_paths("see /home/somebody/models and /data/x/y", ["/data/x/"]) == ["/data/x/", "/home/"]
    assert not machine_paths("file:///home/<USERNAME>/mlruns, HOME=/home/finetuning", [])
