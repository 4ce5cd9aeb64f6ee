"""Transforms of rows before they are parsed: the `columns` and `handlers` of a dataset.

Names and arguments of the handlers are those of fms-hf-tuning. There the last handler of a chain usually tokenizes.
Here it sets how rows are parsed and what of them is trained (`TransformChain`), and tokenization comes later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from finetuning.config.sections.data import DatasetSource, Handler
from finetuning.data.formats.messages import MESSAGE_COLUMN_NAMES
from finetuning.data.formats.row_format import ReadValues, TrainOn
from finetuning.data.samples import JsonObject, JsonValue, Row, SkippedRow
from finetuning.data.text_template import TextTemplate, TextTemplateError
from finetuning.errors import ConfigError, Location, Problem, unique_keys

Values = JsonObject
Arguments = Mapping[str, Any]
_MAP_ARGUMENTS = ("remove_columns", "batched", "num_proc", "load_from_cache_file", "fn_kwargs")
"""Arguments of `datasets.Dataset.map`; all but `remove_columns` and `fn_kwargs` are accepted and ignored."""
_TOKENIZER_ARGUMENTS = ("truncation", "max_length", "max_seq_length")
"""Accepted and ignored: `sft_args.max_seq_length` and `length_handling` apply."""


class TransformError(ValueError):
    """A transform failed on a row, or is configured wrongly. Turned into a Problem or ConfigError."""


class SkipRow(Exception):
    """A transform filters the row out. Turned into a `SkippedRow` by `TransformChain`."""


Transform = Callable[[Values, Mapping[str, str]], Values]
"""From the values of a row, and the tokenizer's special tokens, to new values."""


@dataclass(frozen=True)
class TransformChain:
    """The transforms of a dataset, and how its handlers set the parsing of its rows."""

    steps: tuple[Transform, ...] = ()
    format: str | None = None
    """The row format; None to detect it."""
    text_field: str | None = None
    """The column of the text, for the format `text`."""
    add_eos: bool = True
    chats: TrainOn | None = None
    """What is trained of chats; None for the setting of the run."""

    def __call__(self, row: Row, special_tokens: Mapping[str, str]) -> Row | Problem | SkippedRow:
        """Return the row after all transforms."""
        if not self.steps:
            return row
        values, read = row.values, set[str]()
        try:
            for transform in self.steps:
                values = transform(ReadValues(values, read), special_tokens)
        except (TransformError, TextTemplateError) as error:
            return Problem(str(error), row.location)
        except SkipRow as skip:
            return SkippedRow(row.location, str(skip))
        return Row(ReadValues(values, read), row.location)


def make_transforms(source: DatasetSource, key: str) -> TransformChain:
    """Return the transforms of a dataset's `columns` and `handlers`; `key` names the dataset in the config.

    Raises:
        ConfigError: a handler or an argument is unknown or missing, or a handler comes after one that tokenizes.
    """
    steps: list[Transform] = []
    keys = {name: new for name, new in source.columns.items() if "." in name}
    columns = {name: new for name, new in source.columns.items() if name not in keys}
    if keys or source.roles:
        steps.append(_renaming_in_messages(keys, source.roles))
    if columns:
        steps.append(_renaming(columns, must_exist=False))
    chain = TransformChain(tuple(steps))
    for index, handler in enumerate(source.handlers):
        try:
            chain = _add(chain, handler)
        except TransformError as error:
            raise ConfigError(str(error), location=Location(key=f"{key}.handlers[{index}]")) from None
    return chain


def handler_arguments(handler: Handler) -> Arguments:
    """Return the arguments of a handler's own, without those of `datasets.Dataset.map`.

    Raises:
        TransformError: the handler or an argument is unknown, or one is missing.
    """
    if handler.name not in _HANDLERS:
        raise TransformError(f'unknown handler "{handler.name}"; supported are {", ".join(_HANDLERS)}')
    supported, required, _ = _HANDLERS[handler.name]
    inner: JsonValue = handler.arguments.get("fn_kwargs") or {}
    if not isinstance(inner, dict):
        raise TransformError("fn_kwargs must be a mapping")
    combined = {**{name: value for name, value in handler.arguments.items() if name != "fn_kwargs"}, **inner}
    arguments = {name: value for name, value in combined.items() if name in supported}
    unknown = sorted(set(combined) - {*supported, *_MAP_ARGUMENTS})
    missing = [name for name in required if arguments.get(name) is None]
    if unknown or missing:
        problem = f"has no argument {', '.join(unknown)}" if unknown else f"requires {', '.join(missing)}"
        raise TransformError(f"{handler.name} {problem}; its arguments are {', '.join(supported)}")
    return arguments


def _add(chain: TransformChain, handler: Handler) -> TransformChain:
    arguments = handler_arguments(handler)
    add = _HANDLERS[handler.name][2]
    if chain.format and handler.name not in _AFTER_TOKENIZATION:
        raise TransformError(f"{handler.name} cannot come after a handler that tokenizes the rows")
    result = add(chain, arguments)
    removed: str | list[str] | None = handler.arguments.get("remove_columns")
    # The parser of a format reads no columns but its own: nothing has to be removed before it.
    if removed is None or result.format or handler.name in ("remove_columns", "rename_columns", "select_columns"):
        return result
    return replace(result, steps=(*result.steps[:-1], _removing_inputs(result.steps[-1], removed)))


def _removing_inputs(transform: Transform, removed: str | Sequence[str]) -> Transform:
    """Return the transform followed by the removal of its input columns, all or those named, but not of its outputs."""

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        result = transform(values, special_tokens)
        names = set(values) if removed == "all" else {removed} if isinstance(removed, str) else set(removed)
        return {name: value for name, value in result.items() if name not in names or value is not values.get(name)}

    return run


def _add_transform(chain: TransformChain, transform: Transform, **changes: Any) -> TransformChain:
    return replace(chain, steps=(*chain.steps, transform), **changes)


def _renaming(mapping: Mapping[str, str], *, must_exist: bool = True) -> Transform:
    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        for old, new in mapping.items():
            if must_exist and old not in values:
                raise TransformError(f"no column {old} to rename; columns: {', '.join(values)}")
            if old in values and new in values and new not in mapping:
                raise TransformError(f"{old} cannot be renamed to {new}: a column of that name exists")
        return _renamed(values, mapping)

    return run


def _renamed(values: Values, names: Mapping[str, str]) -> Values:
    """Return values under their new names.

    Raises:
        TransformError: two of them get the same name, and one would vanish.
    """
    renamed = {names.get(name, name): value for name, value in values.items()}
    if len(renamed) != len(values):
        new = [names.get(name, name) for name in values]
        name = next(name for name in new if new.count(name) > 1)
        both = " and ".join(old for old in values if names.get(old, old) == name)
        raise TransformError(f"{both} cannot both be {name}: ignore_columns leaves one of them out")
    return renamed


def _renaming_in_messages(keys: Mapping[str, str], roles: Mapping[str, str]) -> Transform:
    """Return a transform that renames keys of messages, each written as `column.key`, and the roles of all messages."""
    by_column: dict[str, dict[str, str]] = {}
    for name, new in keys.items():
        column, _, key = name.rpartition(".")
        by_column.setdefault(column, {})[key] = new

    def renamed(message: JsonValue, names: Mapping[str, str]) -> JsonValue:
        if not isinstance(message, dict):
            return message
        message = _renamed(message, names)
        for key in ("role", "from"):
            role: JsonValue = message.get(key)
            if isinstance(role, str) and role in roles:
                message[key] = roles[role]
        return message

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        result = dict(values)
        for column in result if roles else by_column.keys() & result.keys():
            value = result[column]
            names = by_column.get(column, {})
            value = from_json_text(value)
            if isinstance(value, list):
                result[column] = [renamed(message, names) for message in cast("list[JsonValue]", value)]
            elif isinstance(value, dict):
                result[column] = renamed(value, names)
        return result

    return run


def from_json_text(value: JsonValue) -> JsonValue:
    """Return the list of a JSON text; any other value as it is, of which the format says what is wrong with it."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return value


def _rename(chain: TransformChain, arguments: Arguments) -> TransformChain:
    mapping: JsonValue = arguments["column_mapping"]
    if not isinstance(mapping, dict):
        raise TransformError("column_mapping must map old names to new names")
    return _add_transform(chain, _renaming(mapping))


def _names(arguments: Arguments) -> list[str]:
    names = arguments["column_names"]
    return [names] if isinstance(names, str) else list(names)


def _select(chain: TransformChain, arguments: Arguments) -> TransformChain:
    names = _names(arguments)

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        return {name: _column(values, name) for name in names}

    return _add_transform(chain, run)


def _remove(chain: TransformChain, arguments: Arguments) -> TransformChain:
    names = _names(arguments)

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        for name in names:
            _column(values, name)
        return {name: value for name, value in values.items() if name not in names}

    return _add_transform(chain, run)


def _duplicate(chain: TransformChain, arguments: Arguments) -> TransformChain:
    old, new = arguments["existing_column_name"], arguments["new_column_name"]
    if chain.format:
        if (old, new) != ("input_ids", "labels"):
            raise TransformError("after tokenization only input_ids can be duplicated, to labels")
        return replace(chain, chats="all")

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        if new in values:
            raise TransformError(f"{old} cannot be duplicated to {new}: a column of that name exists")
        return {**values, new: _column(values, old)}

    return _add_transform(chain, run)


def _skip_large(chain: TransformChain, arguments: Arguments) -> TransformChain:
    name = arguments["column_name"]
    max_length: JsonValue = arguments["max_allowed_length"]
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 0:
        raise TransformError("max_allowed_length must be an integer of at least 0")
    if chain.format:
        raise TransformError(
            "use sft_args.max_seq_length and length_handling: filter to drop rows by their number of tokens"
        )

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        value: JsonValue = _column(values, name)
        if not isinstance(value, str | list | dict):
            raise TransformError(f"{name} has no length")
        if len(value) > max_length:
            raise SkipRow(f"{name} is longer than {max_length}")
        return values

    return _add_transform(chain, run)


def _jinja(chain: TransformChain, arguments: Arguments) -> TransformChain:
    try:
        formatter, column = TextTemplate(arguments["template"]), arguments["formatted_text_column_name"]
    except TextTemplateError as error:
        raise TransformError(str(error)) from None

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        return {**values, column: formatter(values, special_tokens)}

    return _add_transform(chain, run, text_field=column, add_eos=arguments.get("add_eos_token", True))


def _input_masking(chain: TransformChain, arguments: Arguments) -> TransformChain:
    renames = {arguments["input_column_name"]: "input", arguments["output_column_name"]: "output"}
    rename = _renaming_for_format(renames)
    return _add_transform(chain, rename, format="input_output", add_eos=arguments.get("add_eos_token", True))


def _chat(chain: TransformChain, arguments: Arguments) -> TransformChain:
    name = arguments.get("conversation_column_name") or arguments.get("conversation_column")
    steps = (
        (*chain.steps, _renaming_for_format({name: "messages"}))
        if name and name not in MESSAGE_COLUMN_NAMES
        else chain.steps
    )
    return replace(chain, steps=steps, format="messages", text_field=None)


def _chat_text(chain: TransformChain, arguments: Arguments) -> TransformChain:
    return replace(_chat(chain, arguments), chats="all")


def _chat_masked(chain: TransformChain, arguments: Arguments) -> TransformChain:
    return replace(_chat(chain, {"conversation_column": "messages", **arguments}), chats="assistant")


def _tokenize(chain: TransformChain, arguments: Arguments) -> TransformChain:
    if chain.format == "messages":
        return chain
    return replace(chain, format="text", text_field=arguments["text_column_name"])


def _renaming_for_format(renames: Mapping[str, str]) -> Transform:
    """Return a transform that gives columns the names that a format requires, replacing others of these names."""

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        renamed = {new: _column(values, old) for old, new in renames.items()}
        # What has the name already is not used, and is reported so.
        rest = {
            f"{name} (of the file)" if name in renamed else name: value
            for name, value in values.items()
            if name not in renames
        }
        return {**rest, **renamed}

    return run


def _column(values: Values, name: str) -> JsonValue:
    if name not in values:
        raise TransformError(f"no column {name}; columns: {', '.join(values) or 'none'}")
    # Renamed, copied or measured, which is not yet used: it is not read through `ReadValues`.
    return Values.__getitem__(values, name)


_AFTER_TOKENIZATION = ("tokenize", "duplicate_columns", "skip_samples_with_large_columns")
_HANDLERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[TransformChain, Arguments], TransformChain]]] = {
    "rename_columns": (("column_mapping",), ("column_mapping",), _rename),
    "select_columns": (("column_names",), ("column_names",), _select),
    "remove_columns": (("column_names",), ("column_names",), _remove),
    "duplicate_columns": (
        ("existing_column_name", "new_column_name"),
        ("existing_column_name", "new_column_name"),
        _duplicate,
    ),
    "skip_samples_with_large_columns": (
        ("column_name", "max_allowed_length"),
        ("column_name", "max_allowed_length"),
        _skip_large,
    ),
    "apply_custom_jinja_template": (
        ("formatted_text_column_name", "template", "add_eos_token"),
        ("formatted_text_column_name", "template"),
        _jinja,
    ),
    "tokenize_and_apply_input_masking": (
        ("input_column_name", "output_column_name", "add_eos_token", *_TOKENIZER_ARGUMENTS),
        ("input_column_name", "output_column_name"),
        _input_masking,
    ),
    "apply_tokenizer_chat_template": (
        ("formatted_text_column_name", "conversation_column_name"),
        (),
        _chat_text,
    ),
    "tokenize_and_apply_chat_template_with_masking": (
        # The name of a column for the text, which is tokenized at once here: accepted, as there.
        ("conversation_column", "conversation_column_name", "formatted_text_column_name", *_TOKENIZER_ARGUMENTS),
        (),
        _chat_masked,
    ),
    "tokenize": (("text_column_name", *_TOKENIZER_ARGUMENTS), ("text_column_name",), _tokenize),
}
"""The handlers: the supported arguments, the required ones, and the function that adds it to a chain."""
