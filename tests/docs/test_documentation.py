"""Every code block of the documentation is validated or run.

A comment above a block exempts it and says why: `<!-- docs-test: not run: needs a GPU -->`.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from removed_checks import NOT_REMOVED, REMOVED_CHECKS, missing_functions
from run_tutorial import bash, follow

import finetuning
from finetuning.config.sections.data import DataConfig, DatasetSource
from finetuning.config.sections.experiment import EXPERIMENTS, GenerationConfig
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.overrides import apply_overrides
from finetuning.config.yaml.reader import parse_document
from finetuning.data.formats import FORMATS, Options
from finetuning.data.samples import Row
from finetuning.errors import Location, Problem

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "configs/README.md")]
PAGES += sorted(DOCS.rglob("*.md"))
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
EXEMPT = re.compile(r"<!-- docs-test: (not run|compile only): \S.* -->\s*\Z")
SCRIPTS = ("finetuning", "merge_adapter", "create_vllm_compatible_adapter", "generate", "replace_tokens")
BASE: dict[str, Any] = {
    "data_conf": {
        "training_data": {"type": "CONCATENATION", "datasets": [{"path": "train.jsonl"}]},
        "validation_data": {"type": "NONE"},
    },
    "training_args": {"output_dir": "out"},
    "batchsize_conf": {"total_train_batch_size": 16, "max_per_device_train_batch_size": 4},
    "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 8, "target_modules": "all-linear"}},
}
"""A valid config that fragments are merged into."""
REPLACED = ("peft_conf", "quant_conf")
"""Sections whose keys depend on a tag: a fragment replaces them as a whole."""


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: str
    line: int
    language: str
    title: str | None
    body: str
    exemption: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        exemption = EXEMPT.search(text[: match.start()].rstrip(" "))
        line = text[: match.start()].count("\n") + 1
        yield Block(page, line, match["language"], match["title"], body, exemption and exemption[1])


BLOCKS = [
    block for path in PAGES for block in blocks_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
]


def of(*languages: str, exempt: tuple[str, ...] = ()) -> list[Any]:
    chosen = [block for block in BLOCKS if block.language in languages and block.exemption in (None, *exempt)]
    return [pytest.param(block, id=str(block)) for block in chosen]


def merged(base: Any, fragment: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(fragment, dict)):
        return fragment
    result = {**base}
    for key, value in fragment.items():
        result[key] = value if key in REPLACED else merged(base.get(key), value)
    return result


def method_of(values: dict[str, Any]) -> str:
    training = values.get("training_args") or {}
    if "grpo_args" in values:
        return "grpo"
    return values.get("method") or ("dpo" if {"beta", "loss_type"} & training.keys() else "sft")


def test_every_language_is_checked_by_a_test() -> None:
    # `text` is output: that of the tutorial and of data-formats.md is compared by tests of their own.
    assert {block.language for block in BLOCKS} <= {"yaml", "json", "jsonl", "bash", "python", "text", "errors"}


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_a_valid_config_or_a_fragment_of_one(block: Block) -> None:
    values = parse_document(block.body, str(block)).values
    if "prompt_conf" in values:
        validate(parse_document(block.body, str(block)), GenerationConfig)
    elif block.page.startswith("docs/moving-from/") and block.title not in (None, "config.yaml"):
        pytest.skip("the config of another engine, compared with its translation below")
    elif values.keys() <= DatasetSource.model_fields.keys():
        DatasetSource.model_validate({"path": "rows.jsonl", **values})
    elif values.keys() <= DataConfig.model_fields.keys():
        DataConfig.model_validate({**BASE["data_conf"], **values})
    else:
        is_whole = values.keys() >= BASE.keys()
        text = block.body if is_whole else yaml.safe_dump(merged(BASE, values))
        validate(parse_document(text, str(block)), EXPERIMENTS[method_of(values)])


@pytest.mark.parametrize("block", of("json", "jsonl"))
def test_json_parses_and_rows_have_a_format(block: Block) -> None:
    try:
        rows = [json.loads(block.body)]
    except ValueError:
        rows = [json.loads(line) for line in block.body.splitlines()]
    for row in rows:
        if row.keys() & {"messages", "prompt_messages", "prompt", "completion", "text", "input_ids", "chosen"}:
            options = Options(chats="assistant")
            parsed = [row_format.parse(Row(row, Location(str(block), 1)), options) for row_format in FORMATS.values()]
            assert any(not isinstance(result, Problem) for result in parsed), parsed


def commands_of(body: str) -> Iterator[list[str]]:
    """The words of each command: continuation lines joined, comments, variables and redirections removed."""
    for line in re.sub(r"\\\n", " ", body).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if ">" in words:
            words = words[: words.index(">")]
        if words:
            yield words


def help_texts() -> dict[str, str]:
    """The help of each command, from the generated page, which a test below keeps fresh."""
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## `([^`]+)`\n\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("block", of("bash"))
def test_commands_exist_and_take_these_options(block: Block) -> None:
    helps = help_texts()
    for words in commands_of(block.body):
        if words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=True)
        for word in words:
            if word.startswith(("configs/", "examples/", "scripts/", "docker/")) and "<" not in word:
                assert (ROOT / word).exists(), f"{block}: {word}"
        if "finetuning" in words[1:]:
            words = words[words.index("finetuning") :]
        if words[0] not in SCRIPTS:
            continue
        name = " ".join(words[:2]) if " ".join(words[:2]) in helps else words[0]
        if name == "finetuning":
            assert words[1] in EXPERIMENTS or words[1].startswith("-"), f"{block}: {words}"
        flags = words
        if name == "finetuning launch":
            method = next(index for index, word in enumerate(words) if word in EXPERIMENTS)
            flags, rest = words[:method], words[method:]
            check_overrides(rest, block)
        for word in flags:
            if word.startswith("--"):
                option = word.partition("=")[0]
                assert re.search(rf"{re.escape(option)}\b", helps[name]), f"{block}: {name} has no {option}"
        check_overrides(flags, block)


def check_overrides(words: list[str], block: Block) -> None:
    overrides = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    if not overrides:
        return
    if words[0] == "generate":
        base, config = {"prompt_conf": {"type": "eval-data", "data": {"path": "q.jsonl"}}}, GenerationConfig
        base |= {"model_conf": {"model": "m"}}
    else:
        method = next((word for word in words if word in EXPERIMENTS), "sft")
        base, config = BASE, EXPERIMENTS[method]
    validate(apply_overrides(parse_document(yaml.safe_dump(base), str(block)), overrides), config)


@pytest.mark.parametrize("block", of("python", exempt=("compile only",)))
def test_python_compiles_and_its_imports_exist(block: Block) -> None:
    if block.page == "docs/contributing/new-algorithm.md":
        pytest.skip("run by test_new_algorithm.py")
    for node in ast.walk(ast.parse(block.body, str(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetuning"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"


def python_on(page: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == page and block.language == "python" and not block.exemption]


def test_telemetry_in_a_training_loop_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in python_on("docs/how-to/telemetry.md") if "open_telemetry" in block.body]
    exec(compile(block.body, str(block), "exec"), {})
    (file,) = tmp_path.rglob("rank0.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    names = {event.get("name") for event in events}
    assert {"application", "training_loop", "my_span", "my_event", "training_metrics_update"} <= names


def test_telemetry_with_one_loggers_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuning.telemetry.one_logger import TrainingTelemetryProvider

    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in python_on("docs/how-to/telemetry.md") if "configure_provider" in block.body]
    TrainingTelemetryProvider.reset()
    exec(compile(block.body, str(block), "exec"), {})
    TrainingTelemetryProvider.reset()
    events = [json.loads(line) for line in (tmp_path / "telemetry.json").read_text().splitlines()]
    updates = [event["attributes"] for event in events if event.get("name") == "training_metrics_update"]
    assert [update["num_iterations"] for update in updates] == [10, 20, 25]


def test_a_reward_function_of_your_own() -> None:
    (block,) = python_on("docs/how-to/choose-an-algorithm.md")
    names: dict[str, Any] = {}
    exec(compile(block.body, str(block), "exec"), names)
    short, long = ([{"role": "assistant", "content": text}] for text in ("yes", "yes, of course"))
    first, second = names["shorter_is_better"]([short, long], prompts=[])
    assert 1 > first > second > 0


def test_a_loss_of_your_own(sft_values: Any, tmp_path: Path) -> None:
    """Of a step of two micro-batches. An untrained model gives each token about the same probability."""
    (block,) = [block for block in python_on("docs/how-to/python.md") if "ZLoss" in block.body]
    (tmp_path / "z_loss.py").write_text(block.body, encoding="utf-8")
    changes = {"sft_args.logits_at_once": "all", "training_args.max_steps": 1}
    losses: list[float] = []
    for mixin in (None, f"{tmp_path}/z_loss.py:ZLoss"):
        changes |= {"run_conf.trainer_mixin": mixin, "training_args.output_dir": str(tmp_path / f"out-{len(losses)}")}
        loss = finetuning.run(sft_values(changes), method="sft").final_loss
        assert loss is not None
        losses.append(loss)
    assert losses[1] - losses[0] == pytest.approx(1e-4 * math.log(504) ** 2, rel=0.1)


@pytest.mark.parametrize("page", ["axolotl", "llama-factory", "trl"])
def test_an_imported_config_is_what_the_page_shows(page: str, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    theirs, ours = [
        block for block in BLOCKS if block.page == f"docs/moving-from/{page}.md" and block.language == "yaml"
    ]
    (tmp_path / "theirs.yaml").write_text(theirs.body, encoding="utf-8")
    result = run_cli(["import", str(tmp_path / "theirs.yaml")])
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout) == yaml.safe_load(ours.body)


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    def shell(script: str, folder: Path, variables: Mapping[str, str]) -> str:
        """Run the console scripts forked, which spares each of them the imports, and anything else in bash."""
        printed = []
        for line in re.sub(r"\\\n", " ", script).splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in SCRIPTS:
                result = run_cli(words[1:], cwd=folder, env=variables, program=words[0])
                printed += [result.stdout, result.stderr]
            else:
                printed.append(bash(line, folder, variables))
        return "".join(printed)

    make = ROOT / "examples" / "quickstart" / "make_base_model.py"
    made = run_cli(["base", "--steps", "1"], cwd=tmp_path, program=str(make))
    assert made.returncode == 0, made.stderr
    _, faults = follow(tmp_path / "base", shell)
    assert not faults, "no longer printed; run: python scripts/run_tutorial.py quickstart-run/base"


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse formats options differently from Python 3.13 on")
def test_the_command_reference_is_fresh() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "command_reference.py"))
    written = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    assert written == script["reference"](), "run: make docs"


def slug(heading: str) -> str:
    """The anchor that mkdocs gives to a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors_of(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_each_verification_has_an_entry_that_removes_it_or_a_reason() -> None:
    text = (DOCS / "concepts" / "verification.md").read_text(encoding="utf-8")
    table = text.partition("| check | where |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = {line.split("|")[1].strip() for line in table}
    removed = {check.row or check.name for check in REMOVED_CHECKS} & rows
    assert rows - removed == set(NOT_REMOVED)
    assert not missing_functions()
    assert {check.row for check in REMOVED_CHECKS} - {""} <= rows, "a row that is not in the table"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_exist(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path}: {target}"
        assert not anchor or anchor in anchors_of(linked), f"{path}: no heading for {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_and_files_that_are_named_exist(path: Path) -> None:
    if path.name == "new-algorithm.md":
        pytest.skip("names the files of an algorithm that is not part of the package")
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`(finetuning(?:\.\w+)+)`", text):
        module, _, attribute = name.rpartition(".")
        path_of_name = ROOT / "src" / name.replace(".", "/")
        is_module = path_of_name.is_dir() or path_of_name.with_suffix(".py").exists()
        assert is_module or hasattr(importlib.import_module(module), attribute), name
    packages = "|".join(folder.name for folder in (ROOT / "src" / "finetuning").iterdir() if folder.is_dir())
    for name in re.findall(rf"`((?:{packages})/[\w./-]*)`", text):
        assert (ROOT / "src" / "finetuning" / name).exists() or name == "data/train.jsonl", name
    for name in re.findall(r"`((?:src|tests|scripts|benchmarks|examples|deploy|docker)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert not [page for page in missing if f"{page}\n" not in config]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="pip install -c constraints.txt -r docs/requirements.txt")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_pins_of_the_site_are_within_bounds_and_not_repeated() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if line and not line.startswith("#"))

    flags = pins(DOCS / "requirements.txt")
    assert not flags.keys() & pins(ROOT / "constraints.txt").keys()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for requirement in map(Requirement, extras["docs"]):
        assert requirement.specifier.contains(flags[requirement.name])


def test_a_wrong_block_would_be_found() -> None:
    text = (
        "<!-- docs-test: not run: needs a GPU -->\n```bash\nx\n```\n\n    ```yaml\n    guard: {patients: 1}\n    ```\n"
    )
    exempt, wrong = blocks_of(text, "page.md")
    assert (exempt.exemption, wrong.exemption, wrong.body) == ("not run", None, "guard: {patients: 1}\n")
    with pytest.raises(Exception, match="patients"):
        test_yaml_is_a_valid_config_or_a_fragment_of_one(wrong)
    with pytest.raises(AssertionError, match="--no-such"):
        test_commands_exist_and_take_these_options(
            Block("page.md", 1, "bash", None, "finetuning sft a.yaml --no-such", None)
        )
    with pytest.raises(Exception, match="lerning_rate"):
        check_overrides(["finetuning", "sft", "a.yaml", "training_args.lerning_rate=1"], wrong)
