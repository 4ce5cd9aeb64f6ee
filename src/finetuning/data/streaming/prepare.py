"""Prepared data whose training rows are a stream; the validation rows are prepared ahead."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from finetuning.config.sections.data import Concatenation, DataConfig, DatasetSource
from finetuning.data.mixing import concatenate
from finetuning.data.prepared import PreparedData, cache_key_for, checked_sources, fingerprint_of
from finetuning.data.preprocessor import Preprocessor, to_dataset
from finetuning.data.sources import FileShard, Shard, find_shards
from finetuning.data.statistics import raise_bad_rows
from finetuning.data.streaming.dataset import RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DIGEST_BYTES = 1 << 20


def stream_rows(
    data_conf: DataConfig,
    preprocessor: Preprocessor,
    tokenizer: PreTrainedTokenizerFast,
    rules: Mapping[str, object],
    seed: int,
    capacity: int | None,
) -> PreparedData:
    """Prepare the validation rows and the stream of training rows, including its first block.

    So a template that cannot be verified and a file that cannot be read are errors before the model is loaded.

    Raises:
        DataError: a file is missing, the first rows are bad, or too few of them are left.
    """
    validation, statistics = None, None
    sources = checked_sources(data_conf.training_data, "data_conf.training_data")
    if isinstance(data_conf.validation_data, Concatenation):
        validation_sources = checked_sources(data_conf.validation_data, "data_conf.validation_data")
        split, statistics = preprocessor.read(validation_sources, "validation")
        if data_conf.on_bad_row == "error":
            raise_bad_rows(preprocessor.problems)
        statistics.counts.check(data_conf.max_lost_fraction)
        validation = to_dataset(split, concatenate(split.lengths), "validation")
    preprocessor.problems.clear()
    preprocessor.preview.clear()
    stream = RowStream(data_conf, preprocessor, seed, capacity, statistics)
    cache_key = replace(cache_key_for(data_conf, tokenizer, rules), data=_file_digests(sources))
    buffer = data_conf.shuffle_buffer
    order = "in file order" if buffer == 1 else f"with a shuffle buffer of {buffer:,} rows"
    return PreparedData(
        train=stream,
        validation=validation,
        statistics=stream.statistics,
        preview=[row for rows in preprocessor.preview for row in rows],
        fingerprint=fingerprint_of(cache_key),
        origin=f"streamed during training, {order}; the counts below are of the first rows",
        entry=None,
    )


def _file_digests(sources: Sequence[tuple[str, DatasetSource]]) -> dict[str, str]:
    """A digest of each file's size, first and last megabyte: a corpus is too large to read it twice."""
    shards = [shard for key, source in sources for shard in find_shards(source, key, streaming=True)]
    return {f"{number} {shard.name}": _file_digest(shard) for number, shard in enumerate(shards)}


def _file_digest(shard: Shard) -> str:
    digest = hashlib.sha256()
    if not isinstance(shard, FileShard):
        shard.update_digest(digest)
        return digest.hexdigest()
    size = os.path.getsize(shard.path)
    digest.update(str(size).encode())
    with open(shard.path, "rb") as stream:
        digest.update(stream.read(_DIGEST_BYTES))
        stream.seek(max(size - _DIGEST_BYTES, 0))
        digest.update(stream.read(_DIGEST_BYTES))
    return digest.hexdigest()
