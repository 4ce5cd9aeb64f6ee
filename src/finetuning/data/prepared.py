"""Prepared rows from where they are: a folder made ahead of time, the cache, or the data itself.

How many rows a run would train on, before any is tokenised."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning import __version__
from finetuning.config.sections.data import Concatenation, DataConfig, DatasetSource, WeightedMix
from finetuning.data import mixing
from finetuning.data.cache import CacheEntry, CacheKey, cache_folder, load_or_prepare, prepared_in, read_prepared, write
from finetuning.data.mixing import arrange, used_datasets
from finetuning.data.open_dataset import open_dataset, options_for, source_title, unparsed_rows
from finetuning.data.preprocessor import PreparedSplit, Preprocessor, dropped_split_statistics, to_dataset
from finetuning.data.preview import PreviewRow
from finetuning.data.sources import find_shards
from finetuning.data.statistics import DatasetStatistics, SplitStatistics, raise_bad_rows
from finetuning.errors import DataError, Location, Problem

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

    from finetuning.data.streaming.dataset import RowStream
    from finetuning.data.streaming.stream_statistics import StreamStatistics

_PACKAGES = ("transformers", "tokenizers", "jinja2")
_NOT_OF_ROWS = {
    "cache", "prepared", "streaming", "shuffle_buffer", "padding_side", "missing_pad_token_strategy",
    "chat_template_name",
}  # fmt: skip
RULES = "1"
"""Changes whenever the same rows would be rendered, masked, cut or mixed in another way."""


@dataclass(frozen=True)
class DataFingerprint:
    """SHA-256 of each thing that the prepared rows depend on, in hexadecimal."""

    data: str
    template: str
    tokenizer: str
    rules: str

    def with_rule(self, rule: str) -> DataFingerprint:
        """The fingerprint of rows that went through one more step."""
        return replace(self, rules=_sha256(f"{self.rules} {rule}"))

    @property
    def digest(self) -> str:
        """One SHA-256 over all of them."""
        return _sha256(f"{self.data} {self.template} {self.tokenizer} {self.rules}")


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows. SFT: `input_ids` and `labels`, with `lengths` where rows are packed; preferences: `prompt_ids`,
    `chosen_ids`, `rejected_ids`; KTO: `prompt_ids`, `completion_ids`, `label`; GRPO: `prompt_ids` and `row`, what
    rewards are told as JSON."""

    train: datasets.Dataset | RowStream
    validation: datasets.Dataset | None
    ledger: DatasetStatistics | StreamStatistics
    preview: list[PreviewRow]
    fingerprint: DataFingerprint
    origin: str
    """Whether the rows were made now or before, where they lie, and why."""
    stored: CacheEntry | None
    """The rows as they are kept, before they are packed or shuffled; those of a stream are not."""

    @property
    def rows(self) -> int | None:
        """How many rows are trained on, packs counting as one; None for a stream."""
        return len(self.train) if isinstance(self.train, Sized) else None


def prepare_rows(
    data_conf: DataConfig, reading: Preprocessor, tokenizer: PreTrainedTokenizerFast, rules: dict[str, Any]
) -> PreparedData:
    """The rows, from the folder that the config names, from the cache, or made now."""
    inputs = cache_key_for(data_conf, tokenizer, rules)
    if data_conf.prepared:
        found = read_prepared(Path(data_conf.prepared).expanduser(), inputs)
        return _prepared(found.stored, found.why)
    training, validation = data_conf.training_data, data_conf.validation_data
    sources = checked_sources(training, "data_conf.training_data")
    other = checked_sources(validation, "data_conf.validation_data") if isinstance(validation, Concatenation) else []
    folder = cache_folder(data_conf.cache)
    inputs = replace(inputs, data=_digests([*sources, *other]))
    if folder is None:
        return _prepared(_make(data_conf, reading, sources, other, inputs, None), "prepared now; the cache is off")

    def make(entry: Path) -> None:
        made = _make(data_conf, reading, sources, other, inputs, entry.parent)
        write(entry, made.train, made.validation, made.ledger, made.preview, inputs)

    found = load_or_prepare(folder, inputs, make)
    return _prepared(found.stored, found.why)


def _prepared(stored: CacheEntry, origin: str) -> PreparedData:
    fingerprint = fingerprint_of(stored.inputs)
    return PreparedData(stored.train, stored.validation, stored.ledger, stored.preview, fingerprint, origin, stored)


def cache_key_for(data_conf: DataConfig, tokenizer: PreTrainedTokenizerFast, rules: dict[str, Any]) -> CacheKey:
    """What rows depend on besides the data."""
    return CacheKey(
        data={},
        template=_sha256(json.dumps(tokenizer.chat_template)),
        tokenizer=_sha256(json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])),
        rules={key: json.dumps(value) for key, value in {"rules": RULES, **rules, **_settings(data_conf)}.items()},
        versions={"finetuning": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    )


def fingerprint_of(inputs: CacheKey) -> DataFingerprint:
    return DataFingerprint(
        # The bytes count, not the name of the file that they lie in.
        data=_sha256(json.dumps(list(inputs.data.values()))),
        template=inputs.template,
        tokenizer=inputs.tokenizer,
        rules=_sha256(json.dumps(inputs.rules, sort_keys=True)),
    )


def _make(
    data_conf: DataConfig,
    reading: Preprocessor,
    sources: Sequence[tuple[str, DatasetSource]],
    other: Sequence[tuple[str, DatasetSource]],
    inputs: CacheKey,
    folder: Path | None,
) -> CacheEntry:
    """The rows, on the disk of `folder`, by default on that of temporary files."""
    part, ledger = reading.read(sources, "training", folder)
    parts, ledgers = [part], [ledger]
    if other:
        part, ledger = reading.read(other, "validation", folder)
        parts.append(part)
        ledgers.append(ledger)
    if data_conf.on_bad_row == "error":
        raise_bad_rows(reading.problems)
    DatasetStatistics(tuple(ledgers)).check(data_conf.max_lost_fraction)
    if data_conf.max_lost_fraction < 1:
        for read, part, ledger in zip((sources, other), parts, ledgers, strict=False):
            _check_each_is_left(read, part, ledger)
    train, held_out = arrange(data_conf.training_data, data_conf.validation_data, parts[0].lengths)
    if held_out is not None:
        ledgers.append(dropped_split_statistics(parts[0], held_out, train, data_conf.validation_data.type))
    return CacheEntry(
        train=to_dataset(parts[0], train, "training", folder),
        validation=(
            to_dataset(parts[0], held_out, "validation", folder)
            if held_out is not None
            else to_dataset(parts[1], mixing.concatenate(parts[1].lengths), "validation", folder)
            if other
            else None
        ),
        ledger=DatasetStatistics(tuple(ledgers)),
        preview=[row for rows in reading.preview for row in rows],
        inputs=inputs,
    )


def _check_each_is_left(
    sources: Sequence[tuple[str, DatasetSource]], part: PreparedSplit, ledger: SplitStatistics
) -> None:
    """Nothing, when every dataset has a row left: one without would vanish from a mix, and its weight with it.

    Raises:
        DataError: with every dataset that has none, and what became of its first row.
    """
    problems = []
    kept = np.add.reduceat(part.alive, np.cumsum([0, *part.lengths[:-1]]))
    for (key, source), rows in zip(sources, kept, strict=True):
        if rows:
            continue
        files = {shard.name for shard in find_shards(source, key)}
        first = next((fate for fate in ledger.fates if fate.place.file in files), None)
        why = f"; first at {first.problem()}" if first else ""
        problems.append(Problem(f"no row of {source_title(source)} is left{why}", Location(key=key)))
    if problems:
        raise DataError(problems)


def _settings(data_conf: DataConfig) -> dict[str, Any]:
    """The settings of the data that rows depend on; padding does not touch them, and templates count by their text."""
    values = data_conf.model_dump(
        mode="json",
        exclude=_NOT_OF_ROWS,
    )
    return {f"data_conf.{key}": value for key, value in values.items()}


def _digests(sources: Sequence[tuple[str, DatasetSource]]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for key, source in sources:
        for shard in find_shards(source, key):
            digest = hashlib.sha256()
            shard.feed(digest)
            name = shard.name
            while name in digests:
                name += "+"
            digests[name] = digest.hexdigest()
    return digests


def checked_sources(data: Concatenation | WeightedMix, key: str) -> list[tuple[str, DatasetSource]]:
    """The datasets to read, all of their files checked; those of weight 0 are left out.

    Raises:
        DataError: with every file that is wrong.
    """
    used, problems = used_datasets(data, key), []
    for place, source in used:
        try:
            find_shards(source, place)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return used


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RowCount:
    """A number of rows, None where nobody knows it, and what it says."""

    rows: int | None
    why: str


def count_training_rows(data_conf: DataConfig, *, rated: bool = False) -> RowCount:
    """Training rows after mixing and splitting, with none lost: what filters take is known only when they run. Of
    prepared rows those that are left.

    Args:
        rated: whether rows are rated answers, of which a preference makes two.

    Raises:
        DataError: a file is missing or empty; every such file is named.
    """
    if data_conf.prepared:
        stored = prepared_in(Path(data_conf.prepared).expanduser())
        return RowCount(len(stored.train), f"as prepared in {data_conf.prepared}, before any are packed")
    lengths, problems = [], list[Problem]()
    for key, source in used_datasets(data_conf.training_data, "data_conf.training_data"):
        try:
            if data_conf.streaming:
                find_shards(source, key, streaming=True)
            else:
                lengths.append(_rated_rows(source, key) if rated else sum(1 for _ in unparsed_rows(source, key)))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    if data_conf.streaming:
        return RowCount(None, "data_conf.streaming: they are read as training goes")
    rows = len(arrange(data_conf.training_data, data_conf.validation_data, lengths)[0])
    return RowCount(rows, "before any is filtered or dropped")


def _rated_rows(source: DatasetSource, key: str) -> int:
    """Rows, the two of a preference both counted; a row that cannot be read counts as one."""
    rows = open_dataset(source, key, "unpaired", options_for(None, {})).rows
    return sum(len(row) if isinstance(row, list) else 1 for row in rows)
