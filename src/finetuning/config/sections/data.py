"""`data_conf`: what is trained on, and the chat template and padding that it meets on its way."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from finetuning.config.sections.section import ConfigSection


class ChatTemplateName(StrEnum):
    """The chat templates that have a name. `keep-original` is the tokenizer's own."""

    MISTRAL_WITH_SYSTEM = "mistral-with-system"
    CHAT_ML = "chat-ml"
    PORO = "poro"
    SIMPLIFIED_LLAMA31 = "simplified-llama31"
    KEEP_ORIGINAL = "keep-original"


class MissingPadTokenStrategy(StrEnum):
    """Which token pads when the tokenizer has no padding token. Padding is never trained on, whichever it is.

    `unk-convert-to-eos` pads with the unknown token in the labels' place and shows the model the end-of-sequence
    token instead.
    """

    BOS_REPURPOSE = "bos-repurpose"
    EOS_REPURPOSE = "eos-repurpose"
    UNK_REPURPOSE = "unk-repurpose"
    UNK_CONVERT_TO_EOS = "unk-convert-to-eos"


class FormatName(StrEnum):
    """The shapes that rows come in; `docs/reference/data-formats.md` shows a row of each."""

    MESSAGES = "messages"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    INPUT_OUTPUT = "input_output"
    TEXT = "text"
    RESPONSE_TEMPLATE = "response_template"
    TOKENS = "tokens"
    PREFERENCE = "preference"
    CHOSEN_REJECTED = "chosen_rejected"
    UNPAIRED = "unpaired"
    COMPLETION_LABEL = "completion_label"
    PROMPT = "prompt"


class Handler(ConfigSection):
    """One step that rows go through before their format is read."""

    name: str = Field(min_length=1)
    """`rename_columns`, `select_columns`, `remove_columns`, `duplicate_columns`, `skip_samples_with_large_columns`,
    `apply_custom_jinja_template`, or one that says how rows are tokenised: `tokenize_and_apply_input_masking`,
    `apply_tokenizer_chat_template`, `tokenize_and_apply_chat_template_with_masking`, `tokenize`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """The step's arguments, by the names that fms-hf-tuning gives them; its `fn_kwargs` may stand in between."""


NonEmpty = Annotated[str, Field(min_length=1)]


class DatasetSource(ConfigSection):
    """One dataset."""

    path: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    """A file, a folder, a glob such as `data/*.jsonl`, a dataset on the Hugging Face Hub, or a list of these. Files are
    JSON Lines, JSON, Parquet, Arrow, CSV or text, and may be compressed (.gz, .bz2, .xz, .zst)."""
    split: str | None = None
    """The split to read of a dataset on the hub (by default `train`), or of a folder with a file for each split."""
    subset: str | None = None
    """The configuration of a dataset on the hub that has several."""
    revision: str | None = None
    """The revision of a dataset on the hub: a branch, tag or commit."""
    format: FormatName | None = None
    """The shape of the rows; by default it is told from the first rows, and reported."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, theirs to ours: `{question: prompt, answer: completion}`."""
    handlers: list[Handler] = Field(default_factory=list)
    """Steps that each row goes through, in order, after the columns were renamed."""
    dataset_text_field: str | None = None
    """The column of rows that are one text; by default `text`."""
    data_formatter_template: str | None = None
    """Makes one text of a row: `### Input: {{input}} ### Answer: {{output}}`. What stands in the braces is a column, or
    else a Jinja expression."""
    response_template: str | None = Field(default=None, min_length=1)
    """In rows that are one text: what stands before the response. The text up to the last of it is not trained."""
    instruction_template: str | None = Field(default=None, min_length=1)
    """With `response_template`, in texts of several turns: what stands before each instruction. Each response is
    trained up to the next instruction."""
    add_eos_token: bool = True
    """End texts, and completions that no chat template ends, with the end-of-sequence token."""
    text_unit: Literal["line", "paragraph", "document"] = "line"
    """What is a row in a text file."""
    max_rows: int | None = Field(default=None, gt=0)
    """Most rows that are read of this dataset, from its beginning."""
    train_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of this dataset that is trained on; by default all that validation leaves."""
    validation_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of this dataset that becomes validation data, where `validation_data.type` is `FROM_DATASETS`."""


class WeightedDatasetSource(DatasetSource):
    """One dataset of a weighted mix."""

    sampling_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How often rows are drawn from this dataset, relative to the others. 0 skips the dataset."""


class _DataInput(ConfigSection):
    data_type: str | None = None
    """Read for compatibility and ignored: the method says which rows it needs."""


class Concatenation(_DataInput):
    """All rows of all datasets, one dataset after another."""

    type: Literal["CONCATENATION"]
    datasets: Annotated[list[DatasetSource], Field(min_length=1)]
    """The datasets, in order."""


class WeightedMix(_DataInput):
    """Datasets interleaved by weight."""

    type: Literal["PRECOMPUTE_WEIGHTED_MIX"]
    datasets: Annotated[list[WeightedDatasetSource], Field(min_length=1)]
    """The datasets with their weights. When all weights are 1.0 the datasets take turns, row by row."""
    seed: int = 19851243
    """Seed of the draws."""
    stopping: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """When the mix ends: when every row of every dataset was drawn, or when one dataset has no row left."""


class AutoSplit(_DataInput):
    """A part of the training data, taken out of it and used for validation."""

    type: Literal["AUTO_SPLIT"]
    ratio: float = Field(default=0.2, gt=0, lt=1)
    """Share of the training data that becomes validation data, between 0 and 1."""
    seed: int = 1289525893
    """Seed of the split."""


class FromDatasets(_DataInput):
    """The `validation_ratio` of each training dataset, taken out of it before datasets are mixed."""

    type: Literal["FROM_DATASETS"]
    seed: int = 1289525893
    """Seed of the splits."""


class NoData(_DataInput):
    """No validation."""

    type: Literal["NONE"]


TrainingData = Annotated[Concatenation | WeightedMix, Field(discriminator="type")]
ValidationData = Annotated[Concatenation | AutoSplit | FromDatasets | NoData, Field(discriminator="type")]


class DataConfig(ConfigSection):
    """What is trained on, and the chat template and padding that it meets on its way."""

    training_data: TrainingData
    """Where the training rows come from."""
    validation_data: ValidationData
    """Where the validation rows come from; `type: NONE` for none."""
    chat_template_name: ChatTemplateName = ChatTemplateName.MISTRAL_WITH_SYSTEM
    """The chat template that renders a conversation to text."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A chat template of your own, in place of a named one: Jinja, or the path of a file with it."""
    special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Tokens that the tokenizer is to know besides its own, each as one: those that `chat_template` writes, or that
    stand in the data."""
    padding_side: Literal["right", "left"] = "right"
    """On which side shorter rows of a batch are padded."""
    missing_pad_token_strategy: MissingPadTokenStrategy = MissingPadTokenStrategy.BOS_REPURPOSE
    """Which token pads when the tokenizer has no padding token."""
    streaming: bool = False
    """Read, render, mask and pack rows while training (sft): a corpus that does not fit, without its preparation. Needs
    `training_args.max_steps`."""
    shuffle_buffer: int = Field(default=10_000, ge=1)
    """Of a stream: how many rows are held, out of which the next is drawn by `training_args.seed`. 1 keeps the order of
    the files."""
    cache: str = "auto"
    """Where prepared rows are kept for the next run: a folder, `off`, or `auto`: $FINETUNING_CACHE, which may be off
    too, else ~/.cache/finetuning/prepared. A change of the data's bytes, of the template, the tokenizer or a setting
    prepares them anew, and the run says which it was."""
    prepared: str | None = None
    """A folder that `finetuning prepare --output` wrote. Its rows are used, and the data is not read."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens when a row cannot be used: stop and list the first ten, or drop it, counted and written to
    `rejects.jsonl`."""
    max_lost_fraction: float = Field(default=0.05, ge=0, le=1)
    """The run stops when more than this share of the rows is lost to faults (bad rows, nothing left to train on).
    Rows that `length_handling` filters are counted apart: that loss was asked for."""
