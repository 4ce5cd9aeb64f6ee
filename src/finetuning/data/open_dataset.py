"""A dataset of the config to its typed rows: found, read, handled, its format told, and each row parsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from finetuning.config.sections.data import DatasetSource
from finetuning.config.sections.training import SFTArgs
from finetuning.config.yaml.overrides import unescape
from finetuning.data.formats import FORMATS, KINDS, Options, RowFormat
from finetuning.data.samples import Row
from finetuning.data.sources import Line, find_shards
from finetuning.data.text_template import TextTemplate
from finetuning.data.transforms import TransformChain, make_transforms
from finetuning.errors import ConfigError, DataError, Location, Problem

_LOOKED_AT = 32
_TEXT_KEYS = ("response_template", "instruction_template", "data_formatter_template", "dataset_text_field")


@dataclass(frozen=True)
class OpenDataset:
    """A dataset whose format is known, and its rows."""

    row_format: RowFormat
    is_stated: bool
    """Whether the config says the format; otherwise it was told from the first rows."""
    unparsed: Iterator[Row | Problem | Line]
    parse: Callable[[Row | Problem | Line], Any]
    """What a row is: one that is typed, a list of such, a Problem or a `Skipped`."""

    @property
    def rows(self) -> Iterator[Any]:
        """The rows that are left, parsed."""
        return map(self.parse, self.unparsed)

    def __str__(self) -> str:
        return f"{self.row_format.name}, {'as configured' if self.is_stated else 'told from the rows'}"


def options_for(sft_args: SFTArgs | None, special_tokens: dict[str, str]) -> Options:
    """What all datasets of a run share."""
    if sft_args is None:
        return Options(special_tokens=special_tokens)
    chats = sft_args.train_on or ("assistant" if sft_args.train_on_completions_only else "all")
    return Options(chats=chats, completions=sft_args.train_on or "completions", special_tokens=special_tokens)


def open_dataset(
    source: DatasetSource, key: str, kind: str, options: Options, *, streaming: bool = False
) -> OpenDataset:
    """The dataset, its first rows read; `key` names it in the config, `kind` is one of `KINDS`.

    Raises:
        DataError: a file is missing or no row is in it; also while rows are read.
        ConfigError: the dataset's settings contradict each other.
    """
    transforms = make_transforms(source, key) if source.columns or source.handlers else TransformChain()
    special_tokens = options.special_tokens

    def handled(one: Row | Problem | Line) -> Any:
        row = one.row() if isinstance(one, Line) else one
        return transforms(row, special_tokens) if isinstance(row, Row) else row

    rows = unparsed_rows(source, key, streaming=streaming)
    head = list(islice(rows, _LOOKED_AT))
    _check_columns(source, head, key)
    shown = [row for row in map(handled, head) if isinstance(row, Row)]
    row_format, is_stated = _choose(source, transforms, kind, shown, key)
    own = _own_options(source, transforms, options)

    def parse(one: Row | Problem | Line) -> Any:
        row = handled(one)
        return row_format.parse(row, own) if isinstance(row, Row) else row

    return OpenDataset(row_format, is_stated, chain(head, rows), parse)


def source_title(source: DatasetSource) -> str:
    """What a dataset is called in reports."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    name = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"{name} ({source.split})" if source.split else name


def unparsed_rows(source: DatasetSource, key: str, *, streaming: bool = False) -> Iterator[Row | Problem | Line]:
    """The rows as they stand in their files, no more than the dataset gives."""
    shards = find_shards(source, key, streaming=streaming)
    return islice(chain.from_iterable(shard.unparsed() for shard in shards), source.max_rows)


def _own_options(source: DatasetSource, transforms: TransformChain, options: Options) -> Options:
    return replace(
        options,
        chats=transforms.chats or options.chats,
        text_field=source.dataset_text_field or transforms.text_field or "text",
        formatter=TextTemplate(unescape(source.data_formatter_template)) if source.data_formatter_template else None,
        response_template=unescape(source.response_template) if source.response_template else None,
        instruction_template=unescape(source.instruction_template) if source.instruction_template else None,
        add_eos=source.add_eos_token and transforms.add_eos,
    )


def _check_columns(source: DatasetSource, head: Sequence[Row | Problem | Line], key: str) -> None:
    """Nothing, when a column that is to be renamed is in one of the first rows at least: some files may have others.

    Raises:
        ConfigError: none is, as with a typing error.
    """
    read = (one.row() if isinstance(one, Line) else one for one in head)
    found = [row.values for row in read if isinstance(row, Row)] if source.columns else []
    if found and not any(old in values for old in source.columns for values in found):
        raise ConfigError(
            f"none of {', '.join(source.columns)} is a column of the first rows; they have {', '.join(found[0])}",
            place=Location(key=f"{key}.columns"),
        )


def _choose(
    source: DatasetSource, transforms: TransformChain, kind: str, head: Sequence[Row], key: str
) -> tuple[RowFormat, bool]:
    formats = {one.name: one for one in KINDS[kind]}
    used = [name for name in _TEXT_KEYS if getattr(source, name)]
    if used and "text" not in formats:
        raise ConfigError("is for supervised fine-tuning", place=Location(key=f"{key}.{used[0]}"))
    stated = source.format.value if source.format else transforms.format
    if source.response_template and stated in (None, "text"):
        stated = "response_template"
    elif (used or transforms.text_field) and stated is None:
        stated = "text"
    if stated == "response_template" and not source.response_template:
        raise ConfigError("needs response_template beside it", place=Location(key=f"{key}.format"))
    if stated is not None:
        if stated not in formats:
            raise ConfigError(
                f'"{stated}" is not what this method takes; it takes {", ".join(formats)}',
                place=Location(key=f"{key}.format"),
            )
        if used and head and FORMATS["tokens"].is_of(head[0]):
            raise DataError(
                f"{used[0]} does not go with rows that hold token ids already",
                place=Location(file=head[0].place.file, key=f"{key}.{used[0]}"),
            )
        return formats[stated], True
    for row in head:
        for one in formats.values():
            if one.name != "response_template" and one.is_of(row):
                return one, False
    return next(iter(formats.values())), False
