"""A stream of training rows beside validation rows that are all at hand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.data import Concatenation, DataConfig, DatasetSource
from finetuning.data import mixing
from finetuning.data.prepared import PreparedData, cache_key_for, checked_sources, fingerprint_of
from finetuning.data.preprocessor import Preprocessor, to_dataset
from finetuning.data.sources import FileShard, Shard, find_shards
from finetuning.data.statistics import raise_bad_rows
from finetuning.data.streaming.dataset import RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_EDGE = 1 << 20


def stream_rows(
    data_conf: DataConfig,
    reading: Preprocessor,
    tokenizer: PreTrainedTokenizerFast,
    rules: dict[str, Any],
    seed: int,
    capacity: int | None,
) -> PreparedData:
    """The rows, those of training as a stream whose first block is made: a template that cannot be proven, or a file
    that cannot be read, is known before a model is loaded.

    Raises:
        DataError: a file is missing, the first rows are bad, or too few of them are left.
    """
    validation, ledger = None, None
    sources = checked_sources(data_conf.training_data, "data_conf.training_data")
    if isinstance(data_conf.validation_data, Concatenation):
        other = checked_sources(data_conf.validation_data, "data_conf.validation_data")
        part, ledger = reading.read(other, "validation")
        if data_conf.on_bad_row == "error":
            raise_bad_rows(reading.problems)
        ledger.totals.check(data_conf.max_lost_fraction)
        validation = to_dataset(part, mixing.concatenate(part.lengths), "validation")
    reading.problems.clear()
    reading.preview.clear()
    stream = RowStream(data_conf, reading, seed, capacity, ledger)
    inputs = replace(cache_key_for(data_conf, tokenizer, rules), data=_sketches(sources))
    held = data_conf.shuffle_buffer
    order = "in the order of their files" if held == 1 else f"each drawn out of the next {held:,}"
    return PreparedData(
        train=stream,
        validation=validation,
        ledger=stream.ledger,
        preview=[row for rows in reading.preview for row in rows],
        fingerprint=fingerprint_of(inputs),
        origin=f"made as training goes, {order}; what follows is of the first rows",
        stored=None,
    )


def _sketches(sources: Sequence[tuple[str, DatasetSource]]) -> dict[str, str]:
    """A digest for each file: of its size, its beginning and its end, as a corpus is too large to read it twice."""
    shards = [shard for key, source in sources for shard in find_shards(source, key, streaming=True)]
    return {f"{number} {shard.name}": _sketch(shard) for number, shard in enumerate(shards)}


def _sketch(shard: Shard) -> str:
    digest = hashlib.sha256()
    if not isinstance(shard, FileShard):
        shard.feed(digest)
        return digest.hexdigest()
    size = os.path.getsize(shard.path)
    digest.update(str(size).encode())
    with open(shard.path, "rb") as stream:
        digest.update(stream.read(_EDGE))
        stream.seek(max(size - _EDGE, 0))
        digest.update(stream.read(_EDGE))
    return digest.hexdigest()
