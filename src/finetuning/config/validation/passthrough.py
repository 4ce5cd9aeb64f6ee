"""Check keys that are passed through to a library against the fields that the library accepts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from finetuning.config.redaction import redact
from finetuning.config.sections.experiment import Experiment
from finetuning.config.validation.error_messages import KeyIndex, unknown_key, validation_issues
from finetuning.config.validation.library_fields import Fields, LibraryFields
from finetuning.config.validation.section_tree import sections_at, sections_of
from finetuning.config.validation.suggestions import did_you_mean, nearest, unknown_value
from finetuning.config.yaml.document import ConfigDocument, KeyPath, ValidationIssue, YamlValue

_BATCH_FIELDS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
SET_BY_OTHER_KEYS = {
    **dict.fromkeys(_BATCH_FIELDS, "batchsize_conf"),
    "model_init_kwargs": "run_conf.model_args",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "reward_weights": "grpo_args.rewards",
    "chat_template_path": "data_conf.chat_template",
    "chat_template_kwargs": "the column chat_template_kwargs of the rows",
}
"""Fields of the trainers' configs that another key of the config sets."""

# The library accepts more than its annotation says.
_WIDER: Fields = {"fsdp": bool | str | list[str] | None}
_WITHOUT_KWARGS = ("NO_PEFT", "PRETRAINED_PEFT")
_PEFT_SET_ELSEWHERE = {"peft_type": "peft_conf.peft_type", "task_type": "peft_conf.task_type"}
_PEFT_NOT_SETTINGS = ("auto_mapping", "peft_version", "inference_mode")


@dataclass(frozen=True)
class PassthroughResult:
    """The issues of the pass-through sections, and the document with values coerced to the types of the library."""

    document: ConfigDocument
    findings: list[ValidationIssue]
    warnings: list[ValidationIssue]


@dataclass(frozen=True)
class CoercedValue:
    """A value at a path, coerced to the type that the library expects."""

    path: KeyPath
    value: YamlValue


Findings = Iterator[ValidationIssue | CoercedValue]


def check_passthrough(
    document: ConfigDocument, root: type[BaseModel], libraries: LibraryFields, elsewhere: KeyIndex
) -> PassthroughResult:
    """Check the pass-through keys of a document: unknown keys, invalid values, keys that another section sets.

    Valid values in another notation, such as `yes` for a boolean, are coerced in the returned document.
    """
    results: list[ValidationIssue | CoercedValue] = []
    for check in (_training_args, _peft_conf, _model_args, _generation):
        results.extend(check(document, root, libraries, elsewhere))
    for item in results:
        if isinstance(item, CoercedValue):
            document = document.with_value(item.path, item.value)
    findings = [item for item in results if isinstance(item, ValidationIssue)]
    warnings = [item for item in findings if item.kind == "warning"]
    return PassthroughResult(document, [item for item in findings if item.kind != "warning"], warnings)


def _training_args(
    document: ConfigDocument, root: type[BaseModel], libraries: LibraryFields, elsewhere: KeyIndex
) -> Findings:
    path: KeyPath = ("training_args",)
    section = document.get(path)
    if not isinstance(section, dict) or not issubclass(root, Experiment):
        return
    ours = set(sections_of(root.model_fields["training_args"].annotation)[0].model_fields)
    extras = [key for key in section if key not in ours]
    for key in [key for key in extras if key in SET_BY_OTHER_KEYS]:
        extras.remove(key)
        owner = SET_BY_OTHER_KEYS[key]
        origin = "is computed from" if key in _BATCH_FIELDS else "is set by"
        yield ValidationIssue((*path, key), f"{origin} {owner}.", "Remove it here.")
    yield from _check_listed_names(document, root, libraries)
    yield from _check_schedule(document, libraries)
    if not extras:
        return
    fields = libraries.trainer_fields(root.trainer_config)
    if fields is None:
        return
    accepted = {**{name: kind for name, kind in fields.items() if name not in ours}, **_WIDER}
    usable = [*ours, *(name for name in accepted if name not in SET_BY_OTHER_KEYS)]
    yield from _check_keys(document, path, extras, accepted, usable, elsewhere)


def _check_listed_names(document: ConfigDocument, root: type[Experiment], libraries: LibraryFields) -> Findings:
    """Check fields of ours whose values the library lists: schedules, optimizers, trackers, DPO losses."""
    listed = {key: key for key in ("lr_scheduler_type", "optim", "report_to")}
    if root.method_name == "dpo":
        listed["loss_type"] = "dpo_loss_type"
    for key, name in listed.items():
        value = document.get(("training_args", key))
        values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        unusual = [item for item in values if isinstance(item, str) and item not in ("none", "linear", "adamw_torch")]
        allowed = libraries.choices(name)
        for item in unusual:
            if item not in allowed:
                hint = did_you_mean(item, allowed)
                yield ValidationIssue(("training_args", key), unknown_value(key, redact(item), allowed, hint), hint)


_KWARGS_PATH = ("training_args", "lr_scheduler_kwargs")
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")
"""Schedules whose `lr_scheduler_kwargs` transformers ignores."""


def _check_schedule(document: ConfigDocument, libraries: LibraryFields) -> Findings:
    """Check `lr_scheduler_kwargs` against the arguments of the schedule."""
    schedule = document.get(("training_args", "lr_scheduler_type"), "linear")
    kwargs = document.get(_KWARGS_PATH)
    arguments = libraries.scheduler_arguments(schedule) if isinstance(schedule, str) else None
    if arguments is None or not isinstance(kwargs, dict | None):
        return
    path = _KWARGS_PATH if kwargs else ("training_args", "lr_scheduler_type")
    kwargs = kwargs or {}
    for key in kwargs:
        if schedule in _WITHOUT_ARGUMENTS:
            message = f'is ignored: the schedule "{schedule}" takes no arguments.'
            yield ValidationIssue((*_KWARGS_PATH, key), message, kind="warning")
        elif key not in arguments:
            message = f'is no argument of the schedule "{schedule}", which takes {_listed(arguments)}.'
            yield ValidationIssue((*_KWARGS_PATH, key), message, did_you_mean(str(key), list(arguments)))
    missing = [name for name, is_required in arguments.items() if is_required and name not in kwargs]
    if missing:
        message = f'the schedule "{schedule}" needs training_args.lr_scheduler_kwargs with {_listed(missing)}.'
        yield ValidationIssue(path, message)
    minimum = [name for name in ("min_lr", "min_lr_rate") if kwargs.get(name) is not None]
    if {"min_lr", "min_lr_rate"} <= arguments.keys() and len(minimum) != 1:
        message = (
            f'the schedule "{schedule}" needs training_args.lr_scheduler_kwargs with either min_lr or min_lr_rate.'
        )
        yield ValidationIssue(path, message)


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "none"


def _peft_conf(
    document: ConfigDocument, root: type[BaseModel], libraries: LibraryFields, elsewhere: KeyIndex
) -> Findings:
    peft_type = document.get(("peft_conf", "peft_type"))
    if not isinstance(peft_type, str) or peft_type in _WITHOUT_KWARGS:
        return
    types = libraries.choices("peft_type")
    allowed = [*_WITHOUT_KWARGS, *types]
    if peft_type not in types:
        close = nearest(peft_type, allowed)
        hint = f"Did you mean {close}?" if close else None
        message = unknown_value("peft_type", redact(peft_type), allowed, hint)
        yield ValidationIssue(("peft_conf", "peft_type"), message, hint)
        return
    path = ("peft_conf", "peft_kwargs")
    kwargs = document.get(path)
    if not isinstance(kwargs, dict) or not kwargs:
        return
    fields = libraries.peft_fields(peft_type)
    if fields is None:
        return
    extras: list[str | int] = []
    for key in kwargs:
        if key in _PEFT_SET_ELSEWHERE:
            yield ValidationIssue((*path, key), f"is set by {_PEFT_SET_ELSEWHERE[key]}.", "Remove it here.")
        else:
            extras.append(key)
    # PEFT annotates alphas as int and accepts float.
    fields = {name: float | int if "alpha" in name and kind is int else kind for name, kind in fields.items()}
    usable = [name for name in fields if name not in _PEFT_SET_ELSEWHERE and name not in _PEFT_NOT_SETTINGS]
    yield from _check_keys(document, path, extras, fields, usable, elsewhere)


def _model_args(
    document: ConfigDocument, root: type[BaseModel], libraries: LibraryFields, elsewhere: KeyIndex
) -> Findings:
    for parent in ("run_conf", "model_conf"):
        path: KeyPath = (parent, "model_args")
        section = document.get(path)
        sections = sections_at(root, document.values, path)
        if not isinstance(section, dict) or not sections:
            continue
        ours = set(sections[0].model_fields)
        extras = [key for key in section if key not in ours]
        if not extras:
            continue
        accepted: Fields = {name: Any for name in libraries.from_pretrained_arguments() if name not in ours}
        unknown = [key for key in extras if key not in accepted]
        model = document.get((parent, "model"), "")
        fields = libraries.model_fields(model) if unknown and isinstance(model, str) and model else None
        if fields is None:
            yield from _unknown_model_keys(path, unknown, [*ours, *accepted], elsewhere)
            continue
        accepted = {**{name: kind for name, kind in fields.items() if name not in ours}, **accepted}
        yield from _check_keys(document, path, extras, accepted, [*ours, *accepted], elsewhere)


def _unknown_model_keys(path: KeyPath, unknown: list[str | int], usable: list[str], elsewhere: KeyIndex) -> Findings:
    """Report keys that may belong to a model config which is not on this machine."""
    for key in unknown:
        issue = unknown_key((*path, key), usable, elsewhere())
        if issue.hint is not None:
            yield issue
        else:
            message = "is not an argument of from_pretrained, and the model's config is not on this machine."
            yield ValidationIssue((*path, key), message, "It is passed on without a check.", kind="warning")


def _generation(
    document: ConfigDocument, root: type[BaseModel], libraries: LibraryFields, elsewhere: KeyIndex
) -> Findings:
    path: KeyPath = ("hf_gen_params",)
    section = document.get(path)
    if not isinstance(section, dict) or not section or "hf_gen_params" not in root.model_fields:
        return
    fields = libraries.generation_fields()
    yield from _check_keys(document, path, list(section), fields, list(fields), elsewhere)


def _check_keys(
    document: ConfigDocument,
    path: KeyPath,
    keys: list[str | int],
    accepted: Mapping[str, object],
    usable: list[str],
    elsewhere: KeyIndex,
) -> Findings:
    """Report unknown keys and invalid values among the given keys of a section; yield coerced values."""
    for key in keys:
        if not isinstance(key, str) or key not in accepted:
            yield unknown_key((*path, key), usable, elsewhere())
            continue
        kind = accepted[key]
        if kind is Any:
            continue
        value = document.get((*path, key))
        if isinstance(value, bool) and (kind is int or kind is float):
            yield ValidationIssue((*path, key), f"expected a number (got {redact(value, (*path, key))})", kind="type")
            continue
        try:
            coerced = type_adapter(kind).validate_python(value)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
            for issue in validation_issues([{**item, "loc": (key, *item["loc"])} for item in errors], {key: value}):
                yield ValidationIssue((*path, *issue.path), issue.message, issue.hint, issue.kind)
            continue
        if coerced != value or type(coerced) is not type(value):
            yield CoercedValue((*path, key), coerced)


def type_adapter(kind: Any) -> TypeAdapter[Any]:
    """Return a validator for a type of `LibraryFields`."""
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def library_keys(document: ConfigDocument, root: type[BaseModel], libraries: LibraryFields) -> dict[str, list[str]]:
    """Return the pass-through section of each key that a library accepts."""
    sections: dict[str, list[str]] = {}
    if not issubclass(root, Experiment):
        return sections
    peft_type = document.get(("peft_conf", "peft_type"))
    if not isinstance(peft_type, str) or not peft_type.isupper() or peft_type in _WITHOUT_KWARGS:
        peft_type = "LORA"
    for section, fields in (
        ("training_args", libraries.trainer_fields(root.trainer_config)),
        ("peft_conf.peft_kwargs", libraries.peft_fields(peft_type)),
    ):
        for name in fields or ():
            if name not in SET_BY_OTHER_KEYS and name not in _PEFT_SET_ELSEWHERE and name not in _PEFT_NOT_SETTINGS:
                sections.setdefault(name, []).append(section)
    return sections
