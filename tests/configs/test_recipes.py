"""Every recipe is valid, and its header and its line in configs/README.md are right."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from finetuning.config.schema.json_schema import schema_text
from finetuning.config.sections.experiment import EXPERIMENTS, DPOExperiment, Experiment, GRPOExperiment, SFTExperiment
from finetuning.config.sections.model import BitsAndBytes, NoPeft
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "controllers")
ON_A_GPU = [path for path in RECIPES if path.stem != "quickstart" and path.parent.name != "techniques"]
METHODS: dict[str, type[Experiment]] = EXPERIMENTS
PAIRS = ("dpo", "reward", "orpo", "cpo")
EXPERIMENTAL = ("orpo", "cpo")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def method_named(path: Path) -> str:
    """The method of a recipe, which its folder or, of a technique, the file itself names."""
    folder = path.parent.name
    return read_document(path).values["method"] if folder == "techniques" else folder


def experiment_of(path: Path) -> Experiment:
    return validate(read_document(path), METHODS[method_named(path)]).experiment


def header_of(path: Path) -> dict[str, str]:
    """The header's fields by name; a continuation line belongs to the field above it."""
    fields: dict[str, str] = {}
    name = ""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if match := re.match(r"# ([A-Z][a-z]+): +(.+)", line):
            name, fields[match[1]] = match[1], match[2]
        elif name and line.startswith("#  "):
            fields[name] += f" {line.lstrip('# ')}"
    return fields


def test_each_method_has_a_recipe_for_this_machine_and_one_for_a_model_of_today() -> None:
    for method in METHODS:
        names = [path.stem for path in RECIPES if path.parent.name == method]
        assert "quickstart" in names
        assert len(names) > 1
    assert {path.parent.name for path in RECIPES} == {*METHODS, "techniques"}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_valid_and_says_nothing_that_is_out_of_date(path: Path) -> None:
    validated = validate(read_document(path), METHODS[method_named(path)])
    assert validated.experiment.method == method_named(path)
    assert [str(warning) for warning in validated.warnings] == []


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_an_editor_finds_nothing_to_mark(path: Path) -> None:
    schema = json.loads(schema_text(METHODS[method_named(path)]))
    values = read_document(path).values
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values | {"batchsize_conf": {"total_train_batch_size": "many"}}, schema)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_header_says_what_a_reader_needs(path: Path) -> None:
    method = method_named(path)
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema=../schema/{method}.json"
    header = header_of(path)
    assert header.keys() >= {"Hardware", "Memory", "Command", "Data"}
    assert f"{method} {name_of(path)}" in header["Command"] and "finetuning " in header["Command"]
    columns = '"text"' if "pretraining" in path.stem else '"messages"' if method == "sft" else "prompt_messages"
    assert columns in header["Data"]
    assert path not in ON_A_GPU or header.keys() >= {"Time", "License"}
    assert ("Experimental." in path.read_text()) == (method in EXPERIMENTAL)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_in_the_table(path: Path) -> None:
    table = (ROOT / "configs" / "README.md").read_text()
    (row,) = re.findall(
        rf"^\| `{path.parent.name}/{re.escape(path.stem)}`(?: \(experimental\))? \|.*$", table, re.MULTILINE
    )
    count, device = gpus_of(path)
    size = f"{count} x {device} GB" if count > 1 else f"{device} GB"
    assert row.endswith(f"| {size} |" if device else "| none |")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_supervised_recipes_train_on_completions_only(path: Path) -> None:
    experiment = experiment_of(path)
    if isinstance(experiment, SFTExperiment):
        assert experiment.sft_args.train_on_completions_only or "pretraining" in path.stem


def gpus_of(path: Path) -> tuple[int, int]:
    """The number of GPUs that a recipe needs and the size of each in GB; 0 for a recipe that needs none."""
    match = re.match(r"(one|\d+) GPUs? of (\d+) GB", header_of(path)["Hardware"])
    return (1 if match[1] == "one" else int(match[1]), int(match[2])) if match else (0, 0)


@dataclass(frozen=True)
class Shape:
    """A model's sizes: parameters in all and in linear layers but the output layer; inputs + outputs of those layers.

    Source: the models' published configs, counted on models built without memory.
    """

    parameters: float
    linear: float
    inputs_and_outputs: float
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    cache: int = 0
    """Bytes of a token's keys and values in bfloat16."""


SHAPES = {
    "Qwen/Qwen3-0.6B": Shape(0.596e9, 0.440e9, 0.631e6, 1024, 3072, 28, 151936),
    "Qwen/Qwen3-1.7B-Base": Shape(1.721e9, 1.409e9, 1.090e6, 2048, 6144, 28, 151936),
    "Qwen/Qwen3-4B-Instruct-2507": Shape(4.022e9, 3.633e9, 2.064e6, 2560, 9728, 36, 151936, 147456),
    "Qwen/Qwen3-4B-Thinking-2507": Shape(4.022e9, 3.633e9, 2.064e6, 2560, 9728, 36, 151936, 147456),
    "Qwen/Qwen3-14B": Shape(14.768e9, 13.212e9, 4.014e6, 5120, 17408, 40, 151936),
    "Qwen/Qwen3-8B": Shape(8.191e9, 6.946e9, 2.728e6, 4096, 12288, 36, 151936),
    "google/gemma-3-1b-it": Shape(1.000e9, 0.698e9, 0.815e6, 1152, 6912, 26, 262144),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(8.030e9, 6.979e9, 2.621e6, 4096, 14336, 32, 128256),
    "meta-llama/Llama-3.3-70B-Instruct": Shape(70.554e9, 68.451e9, 12.943e6, 8192, 28672, 80, 128256),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(7.248e9, 6.979e9, 2.621e6, 4096, 14336, 32, 32768),
    "mistralai/Mistral-Small-24B-Instruct-2501": Shape(23.572e9, 22.230e9, 5.775e6, 5120, 32768, 40, 131072),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Shape(1.711e9, 1.611e9, 1.130e6, 2048, 8192, 24, 49152),
}


def longest_row(experiment: Experiment) -> int:
    if isinstance(experiment, SFTExperiment):
        return experiment.sft_args.max_seq_length
    if isinstance(experiment, GRPOExperiment):
        return experiment.grpo_args.max_prompt_length + experiment.training_args.max_completion_length
    return experiment.training_args.max_length


def memory_gb(experiment: Experiment) -> tuple[float, float, float]:
    """GB of weights, of what is trained, and of activations, by the formulas of configs/README.md."""
    shape = SHAPES[experiment.run_conf.model]
    method = experiment.method_name
    if isinstance(experiment.peft_conf, NoPeft):
        assert experiment.run_conf.model_args.dtype == "float32"
        weights = shape.parameters * (4 + 2 + (4 if isinstance(experiment, DPOExperiment) else 0))
        trained = shape.parameters * 12
    else:
        assert experiment.peft_conf.peft_kwargs["target_modules"] == "all-linear"
        quantized = isinstance(experiment.quant_conf, BitsAndBytes) and experiment.quant_conf.load_in_4bit
        rest = shape.parameters - shape.linear
        weights = shape.linear * 0.516 + rest * 2 if quantized else shape.parameters * 2
        trained = shape.inputs_and_outputs * experiment.peft_conf.peft_kwargs["r"] * 16
    length = longest_row(experiment)
    tokens = experiment.batchsize_conf.max_per_device_train_batch_size * length * (2 if method in PAIRS else 1)
    layer = 2 * (12 * shape.hidden + 4 * shape.intermediate)
    logits = 0 if method == "reward" else 10 * shape.vocabulary
    activations = tokens * (2 * shape.hidden * shape.layers + logits + layer)
    if method == "grpo":
        activations = max(activations, experiment.batchsize_conf.total_train_batch_size * length * shape.cache)
    return weights / 1e9, trained / 1e9, activations / 1e9


@pytest.mark.parametrize("path", ON_A_GPU, ids=name_of)
def test_memory_in_the_header_follows_from_the_recipe(path: Path) -> None:
    header = header_of(path)
    written = re.match(
        r"([\d.]+) GB = ([\d.]+) weights \+ ([\d.]+) trained parameters \+ ([\d.]+) activations", header["Memory"]
    )
    count, device = gpus_of(path)
    weights, trained, activations = memory_gb(experiment_of(path))
    computed = (weights / count, trained / count, activations)
    assert [float(number) for number in written.groups()] == pytest.approx([sum(computed), *computed], abs=0.051)
    assert sum(computed) <= 0.9 * device


@pytest.mark.parametrize("path", ON_A_GPU, ids=name_of)
def test_time_in_the_header_follows_from_the_recipe(path: Path) -> None:
    experiment, (count, _) = experiment_of(path), gpus_of(path)
    if isinstance(experiment, GRPOExperiment):
        return
    operations = (8 if isinstance(experiment.peft_conf, NoPeft) else 6) + 2 * (experiment.method_name in ("dpo", "kto"))
    minutes = operations * SHAPES[experiment.run_conf.model].parameters * 1e7 / (312e12 * 0.4) / 60 / count
    number, unit = re.match(r"([\d.]+) (minutes|hours) for 10 million tokens", header_of(path)["Time"]).groups()
    assert float(number) * (60 if unit == "hours" else 1) == pytest.approx(minutes, rel=0.02, abs=0.51)
