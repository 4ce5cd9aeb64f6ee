"""Open a dataset of the config: find its files, detect the format of its rows, and parse each row.

A row goes from a line of a file through the dataset's transforms to the parser of its row format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import cast

from finetuning.config.sections.data import DatasetSource
from finetuning.config.sections.training import SFTArgs
from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.overrides import unescape
from finetuning.data.formats import FORMATS, KINDS, Options, RowFormat
from finetuning.data.formats.row_format import MEDIA, FieldError, ReadValues, TakeImages, problem_of
from finetuning.data.samples import (
    Conversation,
    ImageReference,
    JsonObject,
    JsonValue,
    ParsedRow,
    Preference,
    Prompt,
    Row,
    Sample,
    SkippedRow,
    Text,
)
from finetuning.data.sources import Line, find_shards
from finetuning.data.text_template import TextTemplate, TextTemplateError
from finetuning.data.transforms import TransformChain, from_json_text, make_transforms
from finetuning.errors import ConfigError, DataError, Location, Problem

UnparsedRow = Row | Problem | Line
"""A row as its source yields it: a line of JSON Lines is parsed later."""
_IMAGES = ("image", "images")
_NO_REASON = "on which the engine does not train yet"
_NUM_HEAD_ROWS = 32
"""Rows from which the format is detected."""
_TEXT_OPTIONS = ("response_template", "instruction_template", "data_formatter_template", "dataset_text_field")


@dataclass(frozen=True)
class OpenDataset:
    """A dataset whose format is known, and its rows."""

    row_format: RowFormat
    is_configured: bool
    """Whether the config sets the format; otherwise it was detected from the first rows."""
    unparsed: Iterator[UnparsedRow]
    parse: Callable[[UnparsedRow], ParsedRow | SkippedRow]
    """From an unparsed row to a typed row, a list of them, a Problem, or a SkippedRow."""

    @property
    def rows(self) -> Iterator[ParsedRow | SkippedRow]:
        """The remaining rows, parsed."""
        return map(self.parse, self.unparsed)

    def __str__(self) -> str:
        return f"{self.row_format.name}, {'as configured' if self.is_configured else 'auto-detected'}"


def options_for(
    sft_args: SFTArgs | None, special_tokens: dict[str, str], images: TakeImages | str | None = None
) -> Options:
    """Return the options that all datasets of a run have in common; `images` is that of `Options`."""
    if sft_args is None:
        refused = "on which only sft, dpo and grpo train"
        return Options(special_tokens=special_tokens, images=refused if images is None else images)
    chats = sft_args.train_on or ("assistant" if sft_args.train_on_completions_only else "all")
    options = Options(chats=chats, completions=sft_args.train_on or "completions", special_tokens=special_tokens)
    return options if images is None else replace(options, images=images)


def open_dataset(
    source: DatasetSource, key: str, kind: str, options: Options, *, streaming: bool = False
) -> OpenDataset:
    """Open a dataset and read its first rows.

    Args:
        source: the dataset.
        key: its name in the config.
        kind: the kind of rows that the method trains on, one of `KINDS`.
        options: those of the run.
        streaming: whether rows on the hub are read without downloading the dataset.

    Raises:
        DataError: a file is missing or has no rows; also raised while rows are read.
        ConfigError: the dataset's settings contradict each other.
    """
    has_transforms = source.columns or source.roles or source.handlers
    transforms = make_transforms(source, key) if has_transforms else TransformChain()
    special_tokens, ignored = options.special_tokens, frozenset(source.ignore_columns)

    def transform(unparsed: UnparsedRow) -> Row | Problem | SkippedRow:
        row = unparsed.row() if isinstance(unparsed, Line) else unparsed
        if ignored and isinstance(row, Row):
            row = Row(_without(row.values, ignored), row.location)
        return transforms(row, special_tokens) if transforms.steps and isinstance(row, Row) else row

    rows = unparsed_rows(source, key, streaming=streaming)
    head = list(islice(rows, _NUM_HEAD_ROWS))
    _check_columns(source, head, key)
    transformed = [row for row in map(transform, head) if isinstance(row, Row)]
    row_format, is_configured = _choose_format(source, transforms, kind, transformed, key)
    try:
        has_system = any("system" in row.values for row in transformed)
        dataset_options = replace(_dataset_options(source, transforms, options), has_system=has_system)
    except TextTemplateError as error:
        raise ConfigError(str(error), location=Location(key=f"{key}.data_formatter_template")) from None

    def parse(unparsed: UnparsedRow) -> ParsedRow | SkippedRow:
        row = transform(unparsed)
        if not isinstance(row, Row):
            return row
        return _parse_row(row, row_format, dataset_options)

    return OpenDataset(row_format, is_configured, chain(head, rows), parse)


def _parse_row(row: Row, row_format: RowFormat, options: Options) -> ParsedRow:
    """Return the typed row, or rows, that a row is in its format, or what is wrong with it."""
    images: tuple[ImageReference, ...] = ()
    if not isinstance(options.images, str):
        try:
            row, images = options.images(row, options.text_field)
        except FieldError as error:
            return problem_of(row, error)
    values = row.values if isinstance(row.values, ReadValues) else ReadValues(row.values)
    if not MEDIA.keys().isdisjoint(values) and (
        media := next((name for name in values if _is_media(name, values)), None)
    ):
        kind, reason = MEDIA[media], options.images if media in _IMAGES else _NO_REASON
        return Problem(
            f"holds {kind}, {reason}. To train on the text alone, set ignore_columns: [{media}] for this dataset",
            replace(row.location, key=media),
        )
    parsed = row_format.parse(Row(values, row.location), options)
    if images and not isinstance(parsed, Problem):
        if not isinstance(parsed, Conversation | Text | Preference | Prompt):
            return Problem(f"has images, which rows of the format {row_format.name} cannot have", row.location)
        parsed.images = images
    return parsed if isinstance(parsed, Problem) else _with_unused(parsed, values)


def _without(values: JsonObject, ignored: Collection[str]) -> JsonObject:
    """Return values without columns, and without keys of messages and objects, written as `messages.weight`."""
    left = {name: value for name, value in values.items() if name not in ignored}
    for column, _, key in (name.partition(".") for name in ignored if "." in name):
        if column in left:
            left[column] = _without_key(from_json_text(left[column]), key)
    return left


def _without_key(value: JsonValue, key: str) -> JsonValue:
    """Return an object, or the objects of a list, without a key, which may have dots: `content.cache_control`."""
    if isinstance(value, list):
        return [_without_key(item, key) for item in cast("list[JsonValue]", value)]
    if not isinstance(value, dict):
        return value
    outer, _, inner = key.partition(".")
    left = {name: item for name, item in value.items() if name != key}
    return {**left, outer: _without_key(left[outer], inner)} if inner and outer in left else left


def _is_media(name: str, values: ReadValues) -> bool:
    return name in MEDIA and name in values.unread()


def _with_unused(parsed: Sample | Sequence[Sample], values: ReadValues) -> Sample | Sequence[Sample]:
    """Note on a row, or on the first that was made of it, which columns were not read."""
    if not values.keys() <= values.read and (unread := values.unread()):
        first = parsed[0] if isinstance(parsed, Sequence) else parsed
        first.unused = tuple(sorted({*first.unused, *unread})) if first.unused or len(unread) > 1 else unread
    return parsed


def source_title(source: DatasetSource) -> str:
    """Return the name of a dataset in reports: its paths, and its split."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    name = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"{name} ({source.split})" if source.split else name


def unparsed_rows(source: DatasetSource, key: str, *, streaming: bool = False) -> Iterator[UnparsedRow]:
    """Yield the rows as they are in their files, at most `max_rows` of the dataset."""
    shards = find_shards(source, key, streaming=streaming)
    return islice(chain.from_iterable(shard.unparsed() for shard in shards), source.max_rows)


def _dataset_options(source: DatasetSource, transforms: TransformChain, options: Options) -> Options:
    separator = source.input_separator
    return replace(
        options,
        chats=transforms.chats or options.chats,
        text_field=source.dataset_text_field or transforms.text_field or "text",
        formatter=TextTemplate(unescape(source.data_formatter_template)) if source.data_formatter_template else None,
        response_template=unescape(source.response_template) if source.response_template else None,
        instruction_template=unescape(source.instruction_template) if source.instruction_template else None,
        add_eos=source.add_eos_token and transforms.add_eos,
        input_separator=separator if "\n" in separator else unescape(separator),
    )


def _check_columns(source: DatasetSource, head: Sequence[UnparsedRow], key: str) -> None:
    """Check that at least one column to rename, and one to ignore, is in the first rows.

    Not all, because the files of a dataset may have different columns.

    Raises:
        ConfigError: none of them is.
    """
    rows = (unparsed.row() if isinstance(unparsed, Line) else unparsed for unparsed in head)
    values = [row.values for row in rows if isinstance(row, Row)] if source.columns or source.ignore_columns else []
    for name, columns in (("columns", source.columns), ("ignore_columns", source.ignore_columns)):
        if columns and values and not any(column.partition(".")[0] in row for column in columns for row in values):
            raise ConfigError(
                f"none of {', '.join(columns)} is a column of the first rows; their columns: {', '.join(values[0])}",
                location=Location(key=f"{key}.{name}"),
                hint=next((hint for column in columns if (hint := did_you_mean(column, values[0]))), None),
            )


def _choose_format(
    source: DatasetSource, transforms: TransformChain, kind: str, head: Sequence[Row], key: str
) -> tuple[RowFormat, bool]:
    formats = {row_format.name: row_format for row_format in KINDS[kind]}
    used = [option for option in _TEXT_OPTIONS if getattr(source, option)]
    if used and "text" not in formats:
        raise ConfigError("only valid for sft", location=Location(key=f"{key}.{used[0]}"))
    name = source.format.value if source.format else transforms.format
    if source.response_template and name in (None, "text"):
        name = "response_template"
    elif (used or transforms.text_field) and name is None:
        name = "text"
    if name == "response_template" and not source.response_template:
        raise ConfigError("requires response_template", location=Location(key=f"{key}.format"))
    if name is not None:
        if name not in formats:
            raise ConfigError(
                f'"{name}" is not supported by this method; it supports {", ".join(formats)}',
                location=Location(key=f"{key}.format"),
            )
        if used and head and FORMATS["tokens"].matches(head[0]):
            raise DataError(
                f"{used[0]} is not supported for rows that are already tokenized",
                location=Location(file=head[0].location.file, key=f"{key}.{used[0]}"),
            )
        return formats[name], True
    for row in head:
        for row_format in formats.values():
            if row_format.name != "response_template" and row_format.matches(row):
                return row_format, False
    return next(iter(formats.values())), False
