"""The chain of steps that rows go through, by fms-hf-tuning's names and arguments, and what the last of them, which
says how rows are tokenised there, means for how they are read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetuning.config.sections.data import DatasetSource, Handler
from finetuning.data.formats.messages import SPELLINGS
from finetuning.data.samples import Row, SkippedRow
from finetuning.data.text_template import TextTemplate, TextTemplateError
from finetuning.errors import ConfigError, Location, Problem

Values = dict[str, Any]
Arguments = Mapping[str, Any]
_OF_MAPS = ("remove_columns", "batched", "num_proc", "load_from_cache_file", "fn_kwargs")
_OF_TOKENISERS = ("truncation", "max_length", "max_seq_length")
"""Accepted and left to `sft_args.max_seq_length` and `length_handling`."""


class TransformError(ValueError):
    """A step cannot be done on a row; turned into a Problem by `TransformChain`, never seen by users."""


class SkipRow(Exception):
    """A step leaves the row out; turned into a `SkippedRow` by `TransformChain`."""


Step = Callable[[Values, Mapping[str, str]], Values]
"""Makes the values of a row new; is also given the tokenizer's special tokens."""


@dataclass(frozen=True)
class TransformChain:
    """What a dataset's handlers come to."""

    steps: tuple[Step, ...] = ()
    format: str | None = None
    text_field: str | None = None
    add_eos: bool = True
    chats: str | None = None

    def __call__(self, row: Row, special_tokens: Mapping[str, str]) -> Row | Problem | SkippedRow:
        """The row after all steps."""
        if not self.steps:
            return row
        values = row.values
        try:
            for step in self.steps:
                values = step(values, special_tokens)
        except (TransformError, TextTemplateError) as error:
            return Problem(str(error), row.place)
        except SkipRow as skip:
            return SkippedRow(row.place, str(skip))
        return Row(values, row.place)


def make_transforms(source: DatasetSource, key: str) -> TransformChain:
    """The recipe of a dataset's `columns` and `handlers`; `key` names the dataset in the config.

    Raises:
        ConfigError: a handler or an argument is not known, is missing, or comes after rows were tokenised.
    """
    recipe = TransformChain()
    if source.columns:
        recipe = TransformChain((_renaming(source.columns, must_exist=False),))
    for index, handler in enumerate(source.handlers):
        try:
            recipe = _add(recipe, handler)
        except TransformError as error:
            raise ConfigError(str(error), place=Location(key=f"{key}.handlers[{index}]")) from None
    return recipe


def _add(recipe: TransformChain, handler: Handler) -> TransformChain:
    if handler.name not in _HANDLERS:
        raise TransformError(f'no handler "{handler.name}"; known are {", ".join(_HANDLERS)}')
    known, needed, make = _HANDLERS[handler.name]
    given = {name: value for name, value in handler.arguments.items() if name != "fn_kwargs"}
    inner = handler.arguments.get("fn_kwargs") or {}
    if not isinstance(inner, dict):
        raise TransformError("fn_kwargs must be keys and values")
    arguments = {name: value for name, value in {**given, **inner}.items() if name in known}
    unknown = sorted({*given, *inner} - {*known, *_OF_MAPS})
    missing = [name for name in needed if arguments.get(name) is None]
    if unknown or missing:
        wrong = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise TransformError(f"{handler.name} {wrong}; its arguments are {', '.join(known)}")
    if recipe.format and handler.name not in _AFTER_TOKENISING:
        raise TransformError(f"{handler.name} comes after a handler that tokenises the rows")
    made = make(recipe, arguments)
    removed = given.get("remove_columns")
    # What is removed of the rows that a tokeniser gives would not be read any more.
    if removed is None or made.format or handler.name in ("remove_columns", "rename_columns", "select_columns"):
        return made
    return replace(made, steps=(*made.steps[:-1], _replacing(made.steps[-1], removed)))


def _replacing(step: Step, removed: str | Sequence[str]) -> Step:
    """The step, without the columns that came in: all of them, or those named; what the step makes stays."""

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        made = step(values, special_tokens)
        gone = set(values) if removed == "all" else {removed} if isinstance(removed, str) else set(removed)
        return {name: value for name, value in made.items() if name not in gone or value is not values.get(name)}

    return run


def _with(recipe: TransformChain, step: Step, **changes: Any) -> TransformChain:
    return replace(recipe, steps=(*recipe.steps, step), **changes)


def _renaming(mapping: Mapping[str, str], *, must_exist: bool = True) -> Step:
    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        for old, new in mapping.items():
            if must_exist and old not in values:
                raise TransformError(f"no column {old} to rename; columns are: {', '.join(values)}")
            if old in values and new in values and new not in mapping:
                raise TransformError(f"{old} cannot be renamed to {new}: there is a column of that name")
        return {mapping.get(name, name): value for name, value in values.items()}

    return run


def _rename(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    mapping = arguments["column_mapping"]
    if not isinstance(mapping, dict):
        raise TransformError("column_mapping must be keys and values: old names and new ones")
    return _with(recipe, _renaming(mapping))


def _names(arguments: Arguments) -> list[str]:
    names = arguments["column_names"]
    return [names] if isinstance(names, str) else list(names)


def _select(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    names = _names(arguments)

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        return {name: _column(values, name) for name in names}

    return _with(recipe, run)


def _remove(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    names = _names(arguments)

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        for name in names:
            _column(values, name)
        return {name: value for name, value in values.items() if name not in names}

    return _with(recipe, run)


def _duplicate(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    old, new = arguments["existing_column_name"], arguments["new_column_name"]
    if recipe.format:
        if (old, new) != ("input_ids", "labels"):
            raise TransformError("after rows were tokenised, only input_ids can be duplicated, to labels")
        return replace(recipe, chats="all")

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        if new in values:
            raise TransformError(f"{old} cannot be duplicated to {new}: there is a column of that name")
        return {**values, new: _column(values, old)}

    return _with(recipe, run)


def _skip_large(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    name, most = arguments["column_name"], arguments["max_allowed_length"]
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise TransformError("max_allowed_length must be a whole number")
    if recipe.format:
        raise TransformError(
            "rows of too many tokens are left out by sft_args.max_seq_length and length_handling: filter"
        )

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        value = _column(values, name)
        if not isinstance(value, str | list | dict):
            raise TransformError(f"{name} has no length")
        if len(value) > most:
            raise SkipRow(f"{name} is longer than {most}")
        return values

    return _with(recipe, run)


def _jinja(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    formatter, column = TextTemplate(arguments["template"]), arguments["formatted_text_column_name"]

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        return {**values, column: formatter(values, special_tokens)}

    return _with(recipe, run, text_field=column)


def _input_masking(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    renames = {arguments["input_column_name"]: "input", arguments["output_column_name"]: "output"}
    keep = _keeping(renames)
    return _with(recipe, keep, format="input_output", add_eos=arguments.get("add_eos_token", True))


def _chat(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    name = arguments.get("conversation_column_name") or arguments.get("conversation_column")
    steps = (*recipe.steps, _keeping({name: "messages"})) if name and name not in SPELLINGS else recipe.steps
    return replace(recipe, steps=steps, format="messages", text_field=None)


def _chat_text(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    return replace(_chat(recipe, arguments), chats="all")


def _chat_masked(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    return replace(_chat(recipe, {"conversation_column": "messages", **arguments}), chats="assistant")


def _tokenize(recipe: TransformChain, arguments: Arguments) -> TransformChain:
    if recipe.format == "messages":
        return recipe
    return replace(recipe, format="text", text_field=arguments["text_column_name"])


def _keeping(renames: Mapping[str, str]) -> Step:
    """Gives columns the names that a format knows, in place of what else goes by these."""

    def run(values: Values, special_tokens: Mapping[str, str]) -> Values:
        renamed = {new: _column(values, old) for old, new in renames.items()}
        others = {name: value for name, value in values.items() if name not in renames and name not in renamed}
        return {**others, **renamed}

    return run


def _column(values: Values, name: str) -> Any:
    if name not in values:
        raise TransformError(f"no column {name}; columns are: {', '.join(values) or 'none'}")
    return values[name]


_AFTER_TOKENISING = ("tokenize", "duplicate_columns", "skip_samples_with_large_columns")
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
        ("formatted_text_column_name", "template"),
        ("formatted_text_column_name", "template"),
        _jinja,
    ),
    "tokenize_and_apply_input_masking": (
        ("input_column_name", "output_column_name", "add_eos_token", *_OF_TOKENISERS),
        ("input_column_name", "output_column_name"),
        _input_masking,
    ),
    "apply_tokenizer_chat_template": (
        ("formatted_text_column_name", "conversation_column_name"),
        ("formatted_text_column_name",),
        _chat_text,
    ),
    "tokenize_and_apply_chat_template_with_masking": (("conversation_column", *_OF_TOKENISERS), (), _chat_masked),
    "tokenize": (("text_column_name", *_OF_TOKENISERS), ("text_column_name",), _tokenize),
}
"""The handlers: the arguments that each knows, those that it needs, and what it adds to a recipe."""
