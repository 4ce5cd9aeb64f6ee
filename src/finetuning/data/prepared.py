"""Prepared data: from a folder that was prepared ahead of time, from the cache, or from the input files."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
from collections.abc import Generator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from finetuning import __version__
from finetuning.config.sections.data import Concatenation, DataConfig, DatasetSource, WeightedMix
from finetuning.config.sections.training import SFTArgs
from finetuning.data.cache import (
    CacheEntry,
    CacheKey,
    cache_folder,
    job_folder,
    load_or_prepare,
    read_prepared,
    read_prepared_folder,
    write_entry,
)
from finetuning.data.mixing import arrange, concatenate, used_datasets
from finetuning.data.open_dataset import open_dataset, options_for, source_title, unparsed_rows
from finetuning.data.preprocessor import PreparedSplit, Preprocessor, held_out_statistics, to_dataset
from finetuning.data.preview import PreviewRow
from finetuning.data.sources import find_shards
from finetuning.data.statistics import DatasetStatistics, SplitStatistics, raise_bad_rows
from finetuning.errors import ConfigError, DataError, Location, Problem

if TYPE_CHECKING:
    import datasets  # pyright: ignore[reportMissingTypeStubs]
    from transformers import PreTrainedTokenizerFast

    from finetuning.data.streaming.dataset import RowStream
    from finetuning.data.streaming.stream_statistics import StreamStatistics

_PACKAGES_IN_KEY = ("transformers", "tokenizers", "jinja2")
_NOT_IN_KEY = {
    "cache", "prepared", "streaming", "shuffle_buffer", "padding_side", "missing_pad_token_strategy",
    "chat_template_name", "images",
}  # fmt: skip
RULES = "2"
"""Version of the rules by which rows are rendered, masked, truncated and mixed; part of the cache key."""


@dataclass(frozen=True)
class DataFingerprint:
    """SHA-256 digests of what the prepared rows depend on, in hexadecimal."""

    data: str
    template: str
    tokenizer: str
    rules: str

    def with_rule(self, rule: str) -> DataFingerprint:
        """The fingerprint after one more processing step."""
        return replace(self, rules=_sha256(f"{self.rules} {rule}"))

    @property
    def digest(self) -> str:
        """One SHA-256 over all parts."""
        return _sha256(f"{self.data} {self.template} {self.tokenizer} {self.rules}")


@dataclass(frozen=True)
class PreparedData:
    """Tokenized rows with their statistics.

    Columns: `input_ids` and `labels` for SFT, with `lengths` if rows are packed, and `images` and `text` if the model
    takes images; `prompt_ids`, `chosen_ids` and
    `rejected_ids` for preferences; `prompt_ids`, `completion_ids` and `label` for KTO; `prompt_ids` and `row` (JSON for
    the reward functions) for GRPO.
    """

    train: datasets.Dataset | RowStream
    validation: datasets.Dataset | None
    statistics: DatasetStatistics | StreamStatistics
    preview: list[PreviewRow]
    fingerprint: DataFingerprint
    origin: str
    """Whether the rows were prepared now or read, from where, and why."""
    entry: CacheEntry | None
    """The rows as they are cached, before packing or shuffling; None for a stream."""

    @property
    def has_images(self) -> bool:
        """Whether rows have images: their columns are removed where no row has one."""
        return "images" in (getattr(self.train, "column_names", None) or ())

    @property
    def rows(self) -> int | None:
        """Number of training rows, a pack counting as one; None for a stream."""
        return len(self.train) if isinstance(self.train, Sized) else None


def prepare_rows(
    data_conf: DataConfig, preprocessor: Preprocessor, tokenizer: PreTrainedTokenizerFast, rules: Mapping[str, object]
) -> PreparedData:
    """Read the rows from the folder that the config names or from the cache, or prepare them now.

    `rules` are the settings of the method that the rows depend on.
    """
    cache_key = cache_key_for(data_conf, tokenizer, rules)
    if data_conf.prepared:
        result = read_prepared(Path(data_conf.prepared).expanduser(), cache_key)
        return _from_entry(result.entry, result.origin)
    training, validation = data_conf.training_data, data_conf.validation_data
    sources = checked_sources(training, "data_conf.training_data")
    validation_sources = (
        checked_sources(validation, "data_conf.validation_data") if isinstance(validation, Concatenation) else []
    )
    folder = cache_folder(data_conf.cache)
    is_cached = folder is not None
    # Without a cache, too, the processes of a job prepare the rows once on each machine.
    folder = folder or job_folder()
    cache_key = replace(cache_key, data=_digests([*sources, *validation_sources]))
    if folder is None:
        entry = _prepare(data_conf, preprocessor, sources, validation_sources, cache_key, None)
        return _from_entry(entry, "prepared now; the cache is off")

    def prepare(target: Path) -> None:
        entry = _prepare(data_conf, preprocessor, sources, validation_sources, cache_key, target.parent)
        write_entry(target, entry.train, entry.validation, entry.statistics, entry.preview, cache_key)

    result = load_or_prepare(folder, cache_key, prepare)
    origin = result.origin if is_cached else "prepared once for the processes on this machine; the cache is off"
    return _from_entry(result.entry, origin)


def _from_entry(entry: CacheEntry, origin: str) -> PreparedData:
    return PreparedData(
        entry.train, entry.validation, entry.statistics, entry.preview, fingerprint_of(entry.key), origin, entry
    )


def cache_key_for(data_conf: DataConfig, tokenizer: PreTrainedTokenizerFast, rules: Mapping[str, object]) -> CacheKey:
    """The cache key without the data's digests."""
    return CacheKey(
        data={},
        template=_sha256(json.dumps(cast("object", tokenizer.chat_template))),  # pyright: ignore[reportUnknownMemberType]
        tokenizer=_sha256(json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])),
        rules={key: json.dumps(value) for key, value in {"rules": RULES, **rules, **_settings(data_conf)}.items()},
        versions={"finetuning": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES_IN_KEY}},
    )


def fingerprint_of(key: CacheKey) -> DataFingerprint:
    """The fingerprint of rows with this cache key."""
    return DataFingerprint(
        # Only the content of files counts, not their names.
        data=_sha256(json.dumps(list(key.data.values()))),
        template=key.template,
        tokenizer=key.tokenizer,
        rules=_sha256(json.dumps(key.rules, sort_keys=True)),
    )


@contextmanager
def _existing_objects_frozen() -> Generator[None, None, None]:
    """Exclude the objects that exist now from garbage collection in the block, unless some are excluded already.

    Those of torch and transformers alone are half a million. Rows make garbage fast, and each full collection would
    look at all of them: a twentieth of the time of preparation.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_existing_objects_frozen()
def _prepare(
    data_conf: DataConfig,
    preprocessor: Preprocessor,
    sources: Sequence[tuple[str, DatasetSource]],
    validation_sources: Sequence[tuple[str, DatasetSource]],
    cache_key: CacheKey,
    folder: Path | None,
) -> CacheEntry:
    """Prepare the rows. Temporary files go into `folder`, by default into the system's."""
    split, statistics = preprocessor.read(sources, "training", folder)
    splits, split_statistics = [split], [statistics]
    if validation_sources:
        split, statistics = preprocessor.read(validation_sources, "validation", folder)
        splits.append(split)
        split_statistics.append(statistics)
    if data_conf.on_bad_row == "error":
        raise_bad_rows(preprocessor.problems)
    DatasetStatistics(tuple(split_statistics)).check(data_conf.max_lost_fraction)
    if data_conf.max_lost_fraction < 1:
        for read, split, statistics in zip((sources, validation_sources), splits, split_statistics, strict=False):
            _check_no_dataset_is_empty(read, split, statistics)
    train_order, held_out = arrange(data_conf.training_data, data_conf.validation_data, splits[0].lengths)
    validation = None
    if held_out is not None:
        method = data_conf.validation_data.type
        split_statistics.append(held_out_statistics(splits[0], held_out, train_order, method))
        validation = to_dataset(splits[0], held_out, "validation", folder)
    elif validation_sources:
        validation = to_dataset(splits[1], concatenate(splits[1].lengths), "validation", folder)
    return CacheEntry(
        train=to_dataset(splits[0], train_order, "training", folder),
        validation=validation,
        statistics=DatasetStatistics(tuple(split_statistics)),
        preview=[row for rows in preprocessor.preview for row in rows],
        key=cache_key,
    )


def _check_no_dataset_is_empty(
    sources: Sequence[tuple[str, DatasetSource]], split: PreparedSplit, statistics: SplitStatistics
) -> None:
    """Raise DataError if every row of a dataset was dropped: it would vanish from a mix, along with its weight."""
    problems: list[Problem] = []
    kept = np.add.reduceat(split.kept_mask, np.cumsum([0, *split.lengths[:-1]]))
    for (key, source), rows in zip(sources, kept, strict=True):
        if rows:
            continue
        files = {shard.name for shard in find_shards(source, key)}
        first = next((row for row in statistics.outcomes if row.location.file in files), None)
        example = f"; first at {first.problem()}" if first else ""
        problems.append(Problem(f"every row of {source_title(source)} was dropped{example}", Location(key=key)))
    if problems:
        raise DataError(problems)


def _settings(data_conf: DataConfig) -> dict[str, object]:
    """The settings of `data_conf` that rows depend on. Not the padding; and the template is a part of its own."""
    values = data_conf.model_dump(
        mode="json",
        exclude=_NOT_IN_KEY,
    )
    return {f"data_conf.{key}": value for key, value in values.items()}


def _digests(sources: Sequence[tuple[str, DatasetSource]]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for key, source in sources:
        for shard in find_shards(source, key):
            digest = hashlib.sha256()
            shard.update_digest(digest)
            name = shard.name
            while name in digests:
                name += "+"
            digests[name] = digest.hexdigest()
    return digests


def checked_sources(data: Concatenation | WeightedMix, key: str) -> list[tuple[str, DatasetSource]]:
    """The datasets to read, without those of weight 0, after checking all of their files.

    Raises:
        DataError: names every file that is missing or invalid.
    """
    used = used_datasets(data, key)
    problems: list[Problem] = []
    for dataset_key, source in used:
        try:
            find_shards(source, dataset_key)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return used


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RowCount:
    """A number of rows, None if it is unknown, and what it counts."""

    rows: int | None
    reason: str


_NUM_FIRST_ROWS = 32
_ANY_TOKENS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
"""In place of the tokenizer's special tokens, which templates may name."""


def check_first_rows(data_conf: DataConfig, kind: str, sft_args: SFTArgs | None) -> None:
    """Open every dataset and parse its first rows, without a tokenizer: what a run would refuse in them is raised.

    Args:
        kind: the kind of rows that the method trains on, one of `KINDS`.
        sft_args: for SFT.

    Raises:
        DataError: lists every file that is missing, setting of a dataset that is wrong, and row that is bad.
    """
    if data_conf.prepared:
        return
    validation = data_conf.validation_data
    sources = used_datasets(data_conf.training_data, "data_conf.training_data")
    if isinstance(validation, Concatenation):
        sources += used_datasets(validation, "data_conf.validation_data")
    problems: list[Problem] = []
    for key, source in sources:
        try:
            opened = open_dataset(source, key, kind, options_for(sft_args, _ANY_TOKENS), streaming=data_conf.streaming)
            rows = list(islice(opened.rows, _NUM_FIRST_ROWS))
        except (ConfigError, DataError) as error:
            problems += error.problems
            continue
        bad = [row for row in rows if isinstance(row, Problem)]
        is_nothing_left = bool(bad) and len(bad) == len(rows) < _NUM_FIRST_ROWS
        if data_conf.on_bad_row == "error" or is_nothing_left:
            problems += bad
    if problems:
        raise DataError(problems[:_NUM_FIRST_ROWS])


def count_training_rows(data_conf: DataConfig, *, unpaired: bool = False) -> RowCount:
    """Count the training rows after mixing and splitting, without tokenizing them.

    Rows that are dropped later are included, except in data that was prepared ahead of time.

    Args:
        unpaired: rows are unpaired preferences, so that a row with a chosen and a rejected answer counts twice.

    Raises:
        DataError: names every file that is missing or empty.
    """
    if data_conf.prepared:
        entry = read_prepared_folder(Path(data_conf.prepared).expanduser())
        return RowCount(len(entry.train), f"in {data_conf.prepared}, before packing")
    lengths: list[int] = []
    problems: list[Problem] = []
    for key, source in used_datasets(data_conf.training_data, "data_conf.training_data"):
        try:
            if data_conf.streaming:
                find_shards(source, key, streaming=True)
            else:
                lengths.append(_unpaired_rows(source, key) if unpaired else sum(1 for _ in unparsed_rows(source, key)))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    if data_conf.streaming:
        return RowCount(None, "data_conf.streaming: rows are read during training")
    rows = len(arrange(data_conf.training_data, data_conf.validation_data, lengths)[0])
    return RowCount(rows, "before filtering and dropping")


def _unpaired_rows(source: DatasetSource, key: str) -> int:
    """Count rows, paired preferences twice, and rows that cannot be read once."""
    rows = open_dataset(source, key, "unpaired", options_for(None, {})).rows
    return sum(len(row) if isinstance(row, list) else 1 for row in rows)
