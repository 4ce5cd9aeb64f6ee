from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from finetuning.config.schema.json_schema import field_docstrings, json_schema, schema_text
from finetuning.config.schema.reference import reference
from finetuning.config.sections.experiment import EXPERIMENTS, GenerationConfig, SFTExperiment
from finetuning.config.sections.training import DPOTrainingArgs
from finetuning.config.validation.library_fields import LibraryFields, table_fields
from finetuning.config.validation.section_tree import sections_of, walk
from finetuning.config.yaml.dump import dump_values

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [*EXPERIMENTS.values(), GenerationConfig]


def errors(config: type, values: dict[str, Any], libraries: LibraryFields | None = None) -> list[str]:
    validator = jsonschema.Draft202012Validator(json_schema(config, libraries))
    return [error.message for error in validator.iter_errors(values)]


@pytest.mark.parametrize("config", CONFIGS)
def test_schemas_are_schemas(config: type) -> None:
    for libraries in (None, table_fields()):
        schema = json_schema(config, libraries)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["$schema"].endswith("2020-12/schema")
        assert "$id" not in schema
        assert schema["additionalProperties"] is False
    assert schema_text(config) == schema_text(config)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_is_described(config: type) -> None:
    tags = {"type", "peft_type", "quantization_type"}
    sections = {config} | {section for _, _, field in walk(config) for section in sections_of(field.annotation)}
    missing = [
        f"{section.__name__}.{name}"
        for section in sections
        for name in section.model_fields.keys() - field_docstrings(section).keys() - tags
    ]
    assert missing == []
    for name, definition in json_schema(config)["$defs"].items():
        for key, field in definition.get("properties", {}).items():
            assert key in tags or "description" in field, f"{name}.{key}"
            assert "title" not in field


def test_docstrings_are_inherited_and_overridden() -> None:
    docstrings = field_docstrings(DPOTrainingArgs)
    assert docstrings["seed"].startswith("Random seed of")
    assert docstrings["beta"].startswith("Strength of the regularization")
    assert docstrings.keys() == DPOTrainingArgs.model_fields.keys()


@pytest.mark.parametrize(
    "peft_conf", ["{peft_type: NO_PEFT}", "{peft_type: PRETRAINED_PEFT, name_or_path: x}", "{peft_type: LORA}"]
)
def test_valid_configs_match_the_schema(peft_conf: str, check: Callable, changed: Callable[..., str]) -> None:
    experiment = check(changed(peft_conf=peft_conf, training_args="{dataloader_num_workers: 2}")).experiment
    values = dump_values(experiment)
    assert errors(SFTExperiment, values) == []
    assert errors(SFTExperiment, values, table_fields()) == []


def test_invalid_configs_do_not_match_the_schema(check: Callable, sft_text: str) -> None:
    values = dump_values(check(sft_text).experiment)
    assert errors(SFTExperiment, {**values, "modl": 1})
    assert errors(SFTExperiment, {**values, "batchsize_conf": {"total_train_batch_size": 0}})
    assert errors(SFTExperiment, {**values, "peft_conf": {"peft_type": "NO_PEFT", "r": 8}})
    unknown = {**values, "training_args": {"dataloader_num_worker": 1}}
    assert not errors(SFTExperiment, unknown)
    assert errors(SFTExperiment, unknown, table_fields())
    wrong = {**values, "training_args": {"dataloader_num_workers": "two"}}
    assert errors(SFTExperiment, wrong, table_fields())


def test_config_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    assert written == reference(), "run: make docs"
