"""The rules of a run, whether they stand in its YAML or in a file of their own."""

from __future__ import annotations

from finetuning.config.sections.controller import TrainerController
from finetuning.config.validation.controller_rules import check_controllers
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.findings import to_problems
from finetuning.config.yaml.reader import read_document
from finetuning.errors import ConfigError


def read_controllers(section: TrainerController | str | None) -> TrainerController | None:
    """The section itself, or the one that a file holds; None when there is none.

    Raises:
        ConfigError: every mistake of the file, each with its line.
    """
    if not isinstance(section, str):
        return section
    validated = validate(read_document(section), TrainerController)
    findings = list(check_controllers(validated.experiment))
    if findings:
        raise ConfigError(to_problems(findings, validated.document))
    return validated.experiment
