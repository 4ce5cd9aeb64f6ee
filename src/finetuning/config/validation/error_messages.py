"""Turn pydantic's validation errors into issues in plain words, one per problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from finetuning.config.redaction import is_secret_path, redact
from finetuning.config.validation.section_tree import keys_of, sections_at, tag_of
from finetuning.config.validation.suggestions import did_you_mean, key_hint, nearest, unknown_value
from finetuning.config.yaml.document import MAX_ISSUES, Absent, KeyPath, ValidationIssue, YamlValue, child_of, value_at

_EXPECTED = {
    "string_type": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "number_expected": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "none_required": "nothing",
}
_PATTERNS = {
    "trainer_mixin": "a file or module and the name of the class in it, such as path/to/file.py:Name",
    "path": "a file or module and the name of the function in it, such as path/to/file.py:name",
    "max_time": "a number and d, h, m or s, or several of them, such as 1d12h",
    "endpoint": "an http or https address without user name and spaces",
}
"""What texts with a pattern have to be, by their key."""
_LIMITS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


KeyIndex = Callable[[], dict[str, list[str]]]
"""Returns the sections that have each key of the schema. Called only if there is an unknown key."""


def validation_issues(
    errors: Sequence[ErrorDetails],
    values: YamlValue,
    root: type[BaseModel] | None = None,
    elsewhere: KeyIndex = dict,
) -> list[ValidationIssue]:
    """Return the issues for pydantic's errors on plain values.

    Args:
        errors: the result of `ValidationError.errors()`.
        root: the section that the values were validated as; None for the value of a single key.
    """
    issues: list[ValidationIssue] = []
    for error in errors[: 4 * MAX_ISSUES]:
        path = _document_path(error["loc"], values)
        if error["type"] == "extra_forbidden" and root is not None:
            unknown = unknown_key(path, keys_of(sections_at(root, values, path[:-1])), elsewhere())
            issues.append(replace(unknown, hint=unknown.hint or _tag_that_has(path, values, root)))
        elif error["type"] == "missing":
            issues.append(ValidationIssue((*path, str(error["loc"][-1])), "is required, but missing", kind="missing"))
        elif error["type"] in ("union_tag_not_found", "union_tag_invalid") and root is not None:
            issues.extend(_wrong_tag(error, path, values, root))
        else:
            issues.append(_wrong_value(error["type"], path, value_at(values, path), error.get("ctx"), error["msg"]))
    return _one_for_each(issues)


def unknown_key(path: KeyPath, siblings: Sequence[str], elsewhere: dict[str, list[str]]) -> ValidationIssue:
    """Return the issue for a key that its section does not have."""
    name = str(path[-1])
    section = ".".join(str(part) for part in path[:-1] if isinstance(part, str))
    places = {key: [location for location in sections if location != section] for key, sections in elsewhere.items()}
    hint = key_hint(name, siblings, {key: sections for key, sections in places.items() if sections})
    meant = nearest(name, siblings)
    return ValidationIssue(path, "unknown key.", hint, kind="unknown key", meant=meant)


def _document_path(loc: Sequence[str | int], values: YamlValue) -> KeyPath:
    """Return the part of pydantic's location that exists in the document. It also contains names of union members."""
    path: list[str | int] = []
    for part in loc:
        child = child_of(values, part)
        if child is not Absent.ABSENT:
            path.append(part)
            values = child
    return tuple(path)


def _wrong_tag(error: ErrorDetails, path: KeyPath, values: YamlValue, root: type[BaseModel]) -> list[ValidationIssue]:
    """Return one issue for a union whose tag is missing, misspelled or unknown, instead of one per member."""
    name = re.sub(r"\W", "", str(error.get("ctx", {})["discriminator"]))
    section = value_at(values, path)
    members = sections_at(root, _without_tags(values, path, name), path)
    tags = [tag for member in members if (tag := tag_of(member, name))]
    if error["type"] == "union_tag_invalid":
        tag = section.get(name) if isinstance(section, dict) else None
        hint = did_you_mean(str(tag), tags)
        return [ValidationIssue((*path, name), unknown_value(name, redact(tag), tags, hint), hint)]
    if not isinstance(section, dict):
        return [_wrong_value("model_type", path, section)]
    keys = keys_of(members)
    misspelled = next((key for key in section if key not in keys and nearest(str(key), [name])), None)
    if misspelled is not None:
        return [
            ValidationIssue((*path, misspelled), f'unknown key. Did you mean "{name}"?', kind="unknown key", meant=name)
        ]
    return [ValidationIssue((*path, name), f"is required, but missing; one of: {', '.join(tags)}", kind="missing")]


def _tag_that_has(path: KeyPath, values: YamlValue, root: type[BaseModel]) -> str | None:
    """Return a hint for a key that the section would have with another tag, such as another `type`; or None."""
    section = value_at(values, path[:-1])
    for name in ("type", "peft_type", "quantization_type") if isinstance(section, dict) else ():
        members = sections_at(root, _without_tags(values, path[:-1], name), path[:-1])
        tags = [tag for member in members if path[-1] in keys_of([member]) and (tag := tag_of(member, name))]
        if tags:
            return f"It belongs to {name} {' or '.join(tags)}."
    return None


def _without_tags(values: YamlValue, path: KeyPath, name: str) -> YamlValue:
    """Return the values without the tag at a path, so that it selects no union member."""
    if not path:
        return {key: item for key, item in values.items() if key != name} if isinstance(values, dict) else values
    if isinstance(values, list):
        return [_without_tags(item, path[1:], name) if index == path[0] else item for index, item in enumerate(values)]
    if isinstance(values, dict):
        return {key: _without_tags(item, path[1:], name) if key == path[0] else item for key, item in values.items()}
    return values


def _wrong_value(
    kind: str,
    path: KeyPath,
    value: YamlValue,
    context: Mapping[str, object] | None = None,
    message: str = "is not valid",
) -> ValidationIssue:
    """Return the issue for one of pydantic's error types and its context."""
    context = context or {}
    got = redact(value, path)
    suffix = f" (got {got})" if got else ""
    if kind in _EXPECTED:
        is_number = kind.startswith("string") and isinstance(value, int | float)
        hint = "Put it in quotes." if is_number and not is_secret_path(path) else None
        return ValidationIssue(path, f"expected {_EXPECTED[kind]}{suffix}", hint, kind="type")
    if kind in _LIMITS:
        key, sign = _LIMITS[kind]
        return ValidationIssue(path, f"must be {sign} {context[key]:g}{suffix}")
    if kind == "finite_number":
        return ValidationIssue(path, f"must be a finite number{suffix}")
    if kind in ("literal_error", "enum"):
        allowed = re.findall(r"'([^']*)'", str(context["expected"])) or [str(context["expected"])]
        hint = did_you_mean(value, allowed) if isinstance(value, str) else None
        return ValidationIssue(path, f"must be one of {', '.join(allowed)}{suffix}.", hint, kind="type")
    if kind in ("string_too_short", "too_short"):
        return ValidationIssue(path, "must not be empty")
    if kind == "string_pattern_mismatch":
        expected = _PATTERNS.get(str(path[-1]), "the name of one folder: letters, digits, dots, dashes, underscores")
        return ValidationIssue(path, f"must be {expected}{suffix}")
    message = message.removeprefix("Value error, ")
    return ValidationIssue(path, f"{message[:1].lower()}{message[1:]}{suffix}")


def _one_for_each(issues: list[ValidationIssue]) -> list[ValidationIssue]:
    """Drop issues that repeat another one for a different member of a union."""
    inner = {issue.path[:end] for issue in issues for end in range(len(issue.path))}
    grouped: dict[KeyPath, list[ValidationIssue]] = {}
    for issue in issues:
        # A union that takes text or a list complains twice about a list's wrong item.
        if issue.kind != "type" or issue.path not in inner:
            grouped.setdefault(issue.path, []).append(issue)
    meant = {(*issue.path[:-1], issue.meant) for issue in issues if issue.kind == "unknown key"}
    result: list[ValidationIssue] = []
    for path, group in grouped.items():
        if group[0].kind == "missing" and path in meant:
            continue
        result.append(_either(group))
    return result


def _either(group: list[ValidationIssue]) -> ValidationIssue:
    """Merge the issues that the members of a union report for one value."""
    words = list(dict.fromkeys(_expectation(issue.message) for issue in group if issue.kind == "type"))
    specific = [issue for issue in group if issue.kind != "type"]
    if len(words) < 2 or specific:
        return specific[0] if specific else group[0]
    _, got, value = group[0].message.partition(" (got ")
    return ValidationIssue(group[0].path, f"expected {' or '.join(words)}{got}{value.rstrip('.')}", kind="type")


def _expectation(message: str) -> str:
    text = message.partition(" (got ")[0].rstrip(".")
    return text.removeprefix("expected ").removeprefix("must be ")
