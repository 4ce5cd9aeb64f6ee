"""`data_conf`: what is trained on, and the chat template and padding that it meets on its way."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from finetuning.config.base import Section


class ChatTemplateName(str, Enum):
    """The chat templates that have a name. `keep-original` is the tokenizer's own."""

    MISTRAL_WITH_SYSTEM = "mistral-with-system"
    CHAT_ML = "chat-ml"
    PORO = "poro"
    SIMPLIFIED_LLAMA31 = "simplified-llama31"
    KEEP_ORIGINAL = "keep-original"


class MissingPadTokenStrategy(str, Enum):
    """Which token pads when the tokenizer has no padding token. Padding is never trained on, whichever it is.

    `unk-convert-to-eos` pads with the unknown token in the labels' place and shows the model the end-of-sequence
    token instead.
    """

    BOS_REPURPOSE = "bos-repurpose"
    EOS_REPURPOSE = "eos-repurpose"
    UNK_REPURPOSE = "unk-repurpose"
    UNK_CONVERT_TO_EOS = "unk-convert-to-eos"


class DatasetSource(Section):
    """One dataset."""

    path: str = Field(min_length=1)
    """Path of a JSONL file. Rows hold `messages` for SFT; `prompt_messages`, `chosen_messages` and
    `rejected_messages` for DPO."""


class WeightedDatasetSource(DatasetSource):
    """One dataset of a weighted mix."""

    sampling_weight: float = Field(default=1.0, ge=0)
    """How often rows are drawn from this dataset, relative to the others. 0 skips the dataset."""


class _DataInput(Section):
    data_type: str | None = None
    """Read for compatibility and ignored: the method says which rows it needs."""


class Concatenation(_DataInput):
    """All rows of all datasets, one dataset after another."""

    type: Literal["CONCATENATION"]
    datasets: Annotated[list[DatasetSource], Field(min_length=1)]
    """The datasets, in order."""


class WeightedMix(_DataInput):
    """Datasets interleaved by weight until every row of every dataset was drawn at least once."""

    type: Literal["PRECOMPUTE_WEIGHTED_MIX"]
    datasets: Annotated[list[WeightedDatasetSource], Field(min_length=1)]
    """The datasets with their weights. When all weights are 1.0 the datasets take turns, row by row."""
    seed: int = 19851243
    """Seed of the draws."""


class AutoSplit(_DataInput):
    """A part of the training data, taken out of it and used for validation."""

    type: Literal["AUTO_SPLIT"]
    ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of the training data that becomes validation data, between 0 and 1."""
    seed: int = 1289525893
    """Seed of the split."""


class NoData(_DataInput):
    """No validation."""

    type: Literal["NONE"]


TrainingData = Annotated[Concatenation | WeightedMix, Field(discriminator="type")]
ValidationData = Annotated[Concatenation | AutoSplit | NoData, Field(discriminator="type")]


class DataConfig(Section):
    """What is trained on, and the chat template and padding that it meets on its way."""

    training_data: TrainingData
    """Where the training rows come from."""
    validation_data: ValidationData
    """Where the validation rows come from; `type: NONE` for none."""
    chat_template_name: ChatTemplateName = ChatTemplateName.MISTRAL_WITH_SYSTEM
    """The chat template that renders a conversation to text."""
    padding_side: Literal["right", "left"] = "right"
    """On which side shorter rows of a batch are padded."""
    missing_pad_token_strategy: MissingPadTokenStrategy = MissingPadTokenStrategy.BOS_REPURPOSE
    """Which token pads when the tokenizer has no padding token."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens when a row cannot be used: stop and list the first ten, or drop it, counted and written to
    `rejects.jsonl`."""
    max_lost_fraction: float = Field(default=0.05, ge=0, le=1)
    """The run stops when more than this share of the rows is lost to faults (bad rows, nothing left to train on).
    Rows that `length_handling` filters are counted apart: that loss was asked for."""
