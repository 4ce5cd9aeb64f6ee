"""The project's own files agree with each other: pins with bounds, README with Makefile, workflow with its limits."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from finetuning import __version__

ROOT = Path(__file__).resolve().parents[1]
# A GPU build of torch needs these, and pins them itself.
GPU_LIBRARIES = re.compile(r"(nvidia|cuda|rocm)-|(pytorch-)?triton")


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins.items()}


def requirements() -> list[Requirement]:
    """The requirements of the package and of the extras that `make venv` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras["test"], *extras["lint"])]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_pins_lie_within_the_bounds(requirement: Requirement) -> None:
    pinned = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_the_pins_are_closed() -> None:
    """Whatever a pinned package needs is pinned, too, within the bounds that it is needed in."""
    pins = constraints()
    waiting, seen = [(requirement, "") for requirement in requirements()], set()
    while waiting:
        requirement, parent = waiting.pop()
        name = canonicalize_name(requirement.name)
        if GPU_LIBRARIES.match(name):
            continue
        assert name in pins, f"{name}, which {parent or 'finetuning'} needs, has no pin"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{parent} needs {requirement}"
        for extra in (requirement.extras or set()) | {""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                children = (Requirement(line) for line in requires(name) or ())
                waiting += [(c, name) for c in children if not c.marker or c.marker.evaluate({"extra": extra})]
    assert pins.keys() == {name for name, _ in seen}, "a pin that nothing needs"


def make(*arguments: str) -> str:
    command = ["make", "--dry-run", "--always-make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_every_make_target_that_is_named_exists(page: str) -> None:
    named = set(re.findall(r"^ *make ([a-z][a-z-]*)|`make ([a-z][a-z-]*)", (ROOT / page).read_text(), re.MULTILINE))
    assert named
    for target in {first or second for first, second in named}:
        assert make(target)


def test_the_tests_and_the_quickstart_install_first() -> None:
    for target, command in (("test", "-m pytest"), ("quickstart", "examples/quickstart/run.py")):
        planned = make(target)
        assert planned.index("pip install") < planned.index(command)


def test_ci_runs_what_the_readme_promises() -> None:
    commands = set(re.findall(r"^(make [a-z]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    promised = re.findall(r"^(make (?:test|quickstart))\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == {"make check", *promised, "make audit"}


def test_an_audit_that_looked_nothing_up_is_not_green() -> None:
    summarize = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["summarize"]
    sound, unknown = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    vulnerable = {"name": "c", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    assert summarize([sound]) == ("1 of 1 packages were looked up, 0 vulnerabilities are known", 0)
    text, code = summarize([unknown])
    assert "0 of 1" in text and "NOT AUDITED: 1 packages" in text and code == 0
    text, code = summarize([sound, vulnerable])
    assert "c 1: CVE-1, fixed in 2" in text and code == 1


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_runs_no_moving_target(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        # 90 for the tests of clusters, which take about 50 on two cores.
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


VERSIONS = {
    "CITATION.cff": r"^version: (.+)$",
    "deploy/kubernetes/chart/Chart.yaml": r"^(?:version|appVersion): (.+)$",
    "deploy/kubernetes/chart/values.yaml": r"finetuning-worker:(.+)$",
    "deploy/kubernetes/fms-job.yaml": r"finetuning-worker:(.+)$",
    "deploy/kubernetes/job.yaml": r"finetuning-worker:(.+)$",
    "deploy/kubernetes/jobset.yaml": r"finetuning-worker:(.+)$",
    "deploy/kubernetes/pytorchjob.yaml": r"finetuning-worker:(.+)$",
    "deploy/kubernetes/trainjob.yaml": r"finetuning-worker:(.+)$",
    "deploy/kubernetes/volcano.yaml": r"finetuning-worker:(.+)$",
    "docker/cuda/worker.Dockerfile": r"^ARG VERSION=(.+)$",
    "docker/rocm/worker.Dockerfile": r"^ARG VERSION=(.+)$",
}


@pytest.mark.parametrize("path", VERSIONS)
def test_every_file_that_repeats_the_version_has_the_one_of_the_package(path: str) -> None:
    versions = re.findall(VERSIONS[path], (ROOT / path).read_text(), re.MULTILINE)
    assert versions
    assert set(versions) == {__version__}


def test_pyproject_reads_the_version_from_the_package() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "finetuning.__version__"}


def test_tools_assume_the_oldest_python_that_is_supported() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = pyproject["project"]["requires-python"].removeprefix(">=")
    assert pyproject["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert pyproject["tool"]["pyright"]["pythonVersion"] == oldest


def test_the_workflows_run_every_check_on_every_declared_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    checks = re.search(r"^check: ([a-z -]+?) ##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert checks and set(checks[1].split()) <= set(jobs["check"]["strategy"]["matrix"]["target"])
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = {name.rpartition(" ")[2] for name in classifiers if re.search(r":: 3\.\d+$", name)}
    assert declared <= set(jobs["test"]["strategy"]["matrix"]["python"])


def test_what_an_ordinary_run_leaves_out_is_run_by_the_workflow() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    assert options[options.index("-m") + 1] == "not full"
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test-full: .*\n\t\$\(PYTHON\) -m pytest \$\(PYTEST_OPTIONS\) -m ''$", makefile, re.MULTILINE)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    assert {"run": "make test-full"} in jobs["test-full"]["steps"]
    assert {"run": "make coverage"} in jobs["coverage"]["steps"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.name)
def test_issue_forms_are_valid(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    names = [item["id"] for item in fields]
    assert len(names) == len(set(names)) > 0
    assert all(item["attributes"]["label"] for item in fields)
