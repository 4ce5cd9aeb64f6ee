"""pydantic's errors in plain words: one finding for each thing that is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from finetuning.config.redaction import is_secret_path, redact
from finetuning.config.validation.section_tree import keys_of, sections_at, tag_of
from finetuning.config.validation.suggestions import did_you_mean, key_hint, nearest, unknown_value
from finetuning.config.yaml.document import MAX_ISSUES, KeyPath, ValidationIssue

_EXPECTED = {
    "string_type": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "number_wanted": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "none_required": "nothing",
}
_LIMITS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


KeyIndex = Callable[[], dict[str, list[str]]]
"""Works out, for each key that is known anywhere, the sections that know it."""


def validation_issues(
    errors: Sequence[Mapping[str, Any]],
    values: Any,
    root: type[BaseModel] | None = None,
    elsewhere: KeyIndex = dict,
) -> list[ValidationIssue]:
    """The findings behind pydantic's errors on plain values.

    Args:
        errors: what `ValidationError.errors()` returns.
        root: the section that the values were validated as; None for the value of a single key.
    """
    findings: list[ValidationIssue] = []
    for error in errors[: 4 * MAX_ISSUES]:
        path = _document_path(error["loc"], values)
        if error["type"] == "extra_forbidden" and root is not None:
            findings.append(unknown_key(path, keys_of(sections_at(root, values, path[:-1])), elsewhere()))
        elif error["type"] == "missing":
            findings.append(ValidationIssue((*path, str(error["loc"][-1])), "is required, but missing", kind="missing"))
        elif error["type"] in ("union_tag_not_found", "union_tag_invalid") and root is not None:
            findings.extend(_wrong_tag(error, path, values, root))
        else:
            findings.append(_wrong_value(error, path, _value_at(values, path)))
    return _one_for_each(findings)


def unknown_key(path: KeyPath, siblings: Sequence[str], elsewhere: dict[str, list[str]]) -> ValidationIssue:
    """The finding for a key that its section does not know."""
    name = str(path[-1])
    section = ".".join(str(part) for part in path[:-1] if isinstance(part, str))
    places = {key: [place for place in found if place != section] for key, found in elsewhere.items()}
    hint = key_hint(name, siblings, {key: found for key, found in places.items() if found})
    meant = nearest(name, siblings)
    return ValidationIssue(path, "unknown key.", hint, kind="unknown key", meant=meant)


def _document_path(loc: Sequence[str | int], values: Any) -> KeyPath:
    """The part of pydantic's location that stands in the document: it also names unions' members."""
    path: list[str | int] = []
    for part in loc:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and 0 <= part < len(values)
        ):
            path.append(part)
            values = values[part]
    return tuple(path)


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _wrong_tag(error: Mapping[str, Any], path: KeyPath, values: Any, root: type[BaseModel]) -> list[ValidationIssue]:
    """A union whose tag is missing, misspelt or unknown: one finding, whatever its members would say."""
    name = re.sub(r"\W", "", str(error["ctx"]["discriminator"]))
    section = _value_at(values, path)
    members = sections_at(root, _without_tags(values, path, name), path)
    tags = [tag for member in members if (tag := tag_of(member, name))]
    if error["type"] == "union_tag_invalid":
        tag = section.get(name) if isinstance(section, dict) else None
        hint = did_you_mean(str(tag), tags)
        return [ValidationIssue((*path, name), unknown_value(name, redact(tag), tags, hint), hint)]
    if not isinstance(section, dict):
        return [_wrong_value({"type": "model_type"}, path, section)]
    keys = keys_of(members)
    misspelt = next((key for key in section if key not in keys and nearest(str(key), [name])), None)
    if misspelt is not None:
        return [
            ValidationIssue((*path, misspelt), f'unknown key. Did you mean "{name}"?', kind="unknown key", meant=name)
        ]
    return [ValidationIssue((*path, name), f"is required, but missing; one of: {', '.join(tags)}", kind="missing")]


def _without_tags(values: Any, path: KeyPath, name: str) -> Any:
    """The values with the tag at a path taken out, so that it picks no member."""
    if not path:
        return {key: item for key, item in values.items() if key != name} if isinstance(values, dict) else values
    if isinstance(values, list):
        return [_without_tags(item, path[1:], name) if index == path[0] else item for index, item in enumerate(values)]
    return {key: _without_tags(item, path[1:], name) if key == path[0] else item for key, item in values.items()}


def _wrong_value(error: Mapping[str, Any], path: KeyPath, value: Any) -> ValidationIssue:
    kind, context = error["type"], error.get("ctx") or {}
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
        return ValidationIssue(
            path, f"must be the name of one folder: letters, digits, dots, dashes, underscores{suffix}"
        )
    message = str(error.get("msg", "is not valid")).removeprefix("Value error, ")
    return ValidationIssue(path, f"{message[:1].lower()}{message[1:]}{suffix}")


def _one_for_each(findings: list[ValidationIssue]) -> list[ValidationIssue]:
    """The findings without those that only say again, for another member of a union, what one of them says."""
    inner = {finding.path[:end] for finding in findings for end in range(len(finding.path))}
    grouped: dict[KeyPath, list[ValidationIssue]] = {}
    for finding in findings:
        # A union that takes text or a list complains twice about a list's wrong item.
        if finding.kind != "type" or finding.path not in inner:
            grouped.setdefault(finding.path, []).append(finding)
    meant = {(*finding.path[:-1], finding.meant) for finding in findings if finding.kind == "unknown key"}
    result = []
    for path, group in grouped.items():
        if group[0].kind == "missing" and path in meant:
            continue
        result.append(_either(group))
    return result


def _either(group: list[ValidationIssue]) -> ValidationIssue:
    """One finding for what the members of a union say about one value."""
    words = list(dict.fromkeys(_expectation(finding.message) for finding in group if finding.kind == "type"))
    others = [finding for finding in group if finding.kind != "type"]
    if len(words) < 2 or others:
        return others[0] if others else group[0]
    _, got, value = group[0].message.partition(" (got ")
    return ValidationIssue(group[0].path, f"expected {' or '.join(words)}{got}{value.rstrip('.')}", kind="type")


def _expectation(message: str) -> str:
    text = message.partition(" (got ")[0].rstrip(".")
    return text.removeprefix("expected ").removeprefix("must be ")
