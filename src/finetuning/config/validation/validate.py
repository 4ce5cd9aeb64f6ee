"""Validate a config document: schema, library fields, cross-field rules. Reports all problems of the file at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from finetuning.config.redaction import redact, remember_secrets
from finetuning.config.sections.controller import TrainerController
from finetuning.config.sections.experiment import EXPERIMENTS, Experiment
from finetuning.config.validation.controller_rules import check_controllers
from finetuning.config.validation.cross_field import check_rules
from finetuning.config.validation.error_messages import KeyIndex, validation_issues
from finetuning.config.validation.library_fields import SHARED_BY_METHODS, LibraryFields, installed_fields, table_fields
from finetuning.config.validation.passthrough import check_passthrough, library_keys
from finetuning.config.validation.renamed_keys import OLD_VALUES, SILOGEN_KEYS, TABLES, apply_renames
from finetuning.config.validation.section_tree import chosen_section, is_list, key_index, members, sections_of
from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import (
    ConfigDocument,
    KeyPath,
    ValidationIssue,
    YamlSection,
    YamlValue,
    to_problems,
)
from finetuning.config.yaml.reader import read_document
from finetuning.errors import ConfigError, Location, Problem

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class ValidatedConfig(Generic[Config]):
    """A valid config, warnings about it, and the document that it was read from, with current key names."""

    experiment: Config
    warnings: list[Problem]
    document: ConfigDocument


def validate(
    document: ConfigDocument,
    config: type[Config],
    *,
    passthrough: bool = True,
    methods: Mapping[str, type[Experiment]] = EXPERIMENTS,
    libraries: LibraryFields | None = None,
) -> ValidatedConfig[Config]:
    """Validate a document as a config of the given class.

    Args:
        passthrough: whether to check keys that are passed through to a library.
        methods: the configs of all algorithms, to detect a config for another subcommand.
        libraries: the fields that the libraries accept; by default the packaged table.

    Raises:
        ConfigError: the document is invalid. Lists all problems in file order.
    """
    remember_secrets(document.values)
    if not document.values:
        required = ", ".join(name for name, field in config.model_fields.items() if field.is_required())
        raise ConfigError(f"is empty; required: {required}", location=Location(document.file))
    fields = libraries or table_fields()
    findings: list[ValidationIssue] = []
    warnings: list[ValidationIssue] = []
    renamed: list[Problem] = []
    if _has_old_names(document):
        translated = apply_renames(document, functools.partial(_trainer_fields, config, fields))
        document, renamed = translated.document, translated.warnings
        findings.extend(translated.findings)
    document = _without_empty_sections(document, config)

    @functools.cache
    def elsewhere() -> dict[str, list[str]]:
        passed_on = library_keys(document, config, fields) if passthrough else {}
        return {**passed_on, **key_index(config)}

    if passthrough:
        checked = check_passthrough(document, config, fields, elsewhere)
        if checked.findings and not fields.is_current():
            # The table was generated from other versions: the installed ones may accept what it rejects.
            fields = installed_fields()
            elsewhere.cache_clear()
            checked = check_passthrough(document, config, fields, elsewhere)
        document = checked.document
        warnings.extend(checked.warnings)
        findings.extend(checked.findings)
    experiment, errors, valid_sections = _check_sections(document.values, config, elsewhere)
    findings.extend(errors)
    findings.extend(_booleans_for_numbers(document, config))
    for finding in check_rules(experiment, valid_sections):
        (warnings if finding.kind == "warning" else findings).append(finding)
    findings = _check_method(findings, document, config, methods, fields)
    if findings:
        raise ConfigError(to_problems(findings, document))
    return ValidatedConfig(experiment, [*renamed, *to_problems(warnings, document)], document)


def _has_old_names(document: ConfigDocument) -> bool:
    """Return whether the document has a key or a value that `apply_renames` replaces or reports."""
    loss = document.get(("training_args", "loss_type"))
    if not {"aot_pair", "exo_pair"}.isdisjoint(str(name) for name in (loss if isinstance(loss, list) else [loss])):
        return True
    sections = [(document.get(section), table) for section, table in TABLES.items()]
    values = [(document.get(path), names) for path, names in OLD_VALUES.items()]
    return (
        any(document.get(path) is not None for path in SILOGEN_KEYS)
        or any(isinstance(section, dict) and not table.keys().isdisjoint(section) for section, table in sections)
        or any(isinstance(value, str) and value in names for value, names in values)
    )


def _check_sections(
    values: YamlSection, config: type[Config], elsewhere: KeyIndex
) -> tuple[Config, list[ValidationIssue], Mapping[str, object]]:
    """Return the config (with its valid sections only, if some are invalid), the issues, and the valid sections by
    name."""
    try:
        experiment = config.model_validate(values)
    except ValidationError as error:
        findings = validation_issues(error.errors(include_url=False, include_input=False), values, config, elsewhere)
    else:
        return experiment, [], {name: getattr(experiment, name) for name in config.model_fields}
    valid: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        if name not in values:
            if not field.is_required():
                valid[name] = field.get_default(call_default_factory=True)
            continue
        try:
            # The annotation is a value here, which a type checker cannot read as a type.
            annotation: Any = Annotated[field.annotation, field]  # pyright: ignore[reportInvalidTypeForm, reportUnknownMemberType]
            valid[name] = TypeAdapter[object](annotation).validate_python(values[name])
        except ValidationError:
            continue
    return config.model_construct(**valid), findings, valid


def _without_empty_sections(document: ConfigDocument, root: type[BaseModel]) -> ConfigDocument:
    """Treat a section whose lines are all commented out (`section:`) as a section of defaults."""
    empty = [
        (path, field)
        for path, field, value in _written_fields(document.values, root)
        if value is None
        and sections_of(field.annotation)
        and not is_list(field.annotation)
        and type(None) not in members(field.annotation)
    ]
    for path, field in empty:
        document = document.with_value(path, {}) if field.is_required() else document.without(path)
    return document


def _booleans_for_numbers(document: ConfigDocument, root: type[BaseModel]) -> Iterator[ValidationIssue]:
    """Report booleans where numbers are expected: bool is a subclass of int, so `max_steps: true` would mean one
    step."""
    for path, field, value in _written_fields(document.values, root):
        kinds = members(field.annotation)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            yield ValidationIssue(path, f"expected a number (got {redact(value, path)})", kind="type")


def _trainer_fields(config: type[BaseModel], libraries: LibraryFields) -> Mapping[str, object]:
    """Return the fields of `training_args`: ours and the trainer's."""
    if not issubclass(config, Experiment):
        return {}
    ours = sections_of(config.model_fields["training_args"].annotation)[0].model_fields
    return {**ours, **(libraries.trainer_fields(config.trainer_config) or {})}


def _written_fields(
    values: YamlValue, root: type[BaseModel], path: KeyPath = ()
) -> Iterator[tuple[KeyPath, FieldInfo, YamlValue]]:
    """Yield the path, the field and the value of every schema field that the document sets."""
    if not isinstance(values, dict):
        return
    for model in chosen_section([root], values):
        for name in model.model_fields.keys() & values.keys():
            field, value = model.model_fields[name], values[name]
            yield (*path, name), field, value
            key: KeyPath = (*path, name)
            items = (
                [((*key, index), item) for index, item in enumerate(value)]
                if isinstance(value, list)
                else [(key, value)]
            )
            for inner, item in items:
                for section in chosen_section(sections_of(field.annotation), item):
                    yield from _written_fields(item, section, inner)


def _check_method(
    findings: list[ValidationIssue],
    document: ConfigDocument,
    config: type[BaseModel],
    methods: Mapping[str, type[Experiment]],
    libraries: LibraryFields,
) -> list[ValidationIssue]:
    """Return the issues, or a single one if the file is clearly meant for another algorithm."""
    if not issubclass(config, Experiment):
        return findings
    named = document.get(("method",))
    if named == config.method_name:
        return findings
    if isinstance(named, str):
        if named in methods:
            return [ValidationIssue(("method",), _other_method(named, "method is", named, document))]
        allowed = ", ".join(methods)
        hint = did_you_mean(named, methods)
        return [*findings, ValidationIssue(("method",), f'unknown method "{named}"; one of: {allowed}.', hint)]
    unknown = [finding.path for finding in findings if finding.kind == "unknown key"]
    for name, candidate in methods.items():
        matches = _keys_of_method(unknown, candidate, libraries) if candidate is not config else []
        if matches and not _has_exclusive_section(document, config, candidate):
            return [ValidationIssue(matches[0], _other_method(name, "has", str(matches[0][-1]), document))]
    return findings


def _other_method(method: str, relation: str, what: str, document: ConfigDocument) -> str:
    # Acronyms are spelled out: an SFT config, a DPO config.
    article = "an" if method[0] in "aefhilmnorsx" else "a"
    command = f"finetuning {method} {document.file or '…'}"
    return f"this looks like {article} {method} config ({relation} {what}); run: {command}"


def _keys_of_method(paths: Sequence[KeyPath], method: type[Experiment], libraries: LibraryFields) -> list[KeyPath]:
    """Return the unknown keys that another algorithm has at the same path."""
    matches: list[KeyPath] = []
    fields: Mapping[str, object] | None = None
    for path in paths:
        if len(path) == 1 and path[0] in method.model_fields:
            matches.append(path)
        elif len(path) == 2 and path[0] == "training_args":
            if fields is None:
                shared = libraries.trainer_fields(SHARED_BY_METHODS) or {}
                fields = {name: kind for name, kind in _trainer_fields(method, libraries).items() if name not in shared}
            if path[1] in fields:
                matches.append(path)
    return matches


def _has_exclusive_section(document: ConfigDocument, config: type[Experiment], candidate: type[Experiment]) -> bool:
    """Return whether the document has a section that this algorithm has and the other one does not."""
    return any(name in config.model_fields and name not in candidate.model_fields for name in document.values)


def read_controllers(section: TrainerController | str | None) -> TrainerController | None:
    """Return the section, read from a file if it is a path; None if there is none.

    Raises:
        ConfigError: the file is invalid. Lists all problems with their lines.
    """
    if not isinstance(section, str):
        return section
    validated = validate(read_document(section), TrainerController)
    findings = list(check_controllers(validated.experiment))
    if findings:
        raise ConfigError(to_problems(findings, validated.document))
    return validated.experiment
