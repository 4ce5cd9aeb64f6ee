"""`data_conf`: training and validation data, chat template and padding."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from finetuning.config.sections.section import ConfigSection


class ChatTemplateName(StrEnum):
    """Built-in chat templates. `keep-original` uses the template of the tokenizer."""

    MISTRAL_WITH_SYSTEM = "mistral-with-system"
    CHAT_ML = "chat-ml"
    PORO = "poro"
    SIMPLIFIED_LLAMA31 = "simplified-llama31"
    KEEP_ORIGINAL = "keep-original"


class MissingPadTokenStrategy(StrEnum):
    """Which token to pad with if the tokenizer has no padding token. Padding never contributes to the loss.

    `unk-convert-to-eos` pads the labels with the unknown token and the model's inputs with the end-of-sequence token.
    """

    BOS_REPURPOSE = "bos-repurpose"
    EOS_REPURPOSE = "eos-repurpose"
    UNK_REPURPOSE = "unk-repurpose"
    UNK_CONVERT_TO_EOS = "unk-convert-to-eos"


class FormatName(StrEnum):
    """Row formats. `docs/reference/data-formats.md` shows an example row of each."""

    MESSAGES = "messages"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    INPUT_OUTPUT = "input_output"
    SEGMENTS = "segments"
    TEXT = "text"
    RESPONSE_TEMPLATE = "response_template"
    TOKENS = "tokens"
    PREFERENCE = "preference"
    CHOSEN_REJECTED = "chosen_rejected"
    UNPAIRED = "unpaired"
    COMPLETION_LABEL = "completion_label"
    PROMPT = "prompt"


class Handler(ConfigSection):
    """A transformation of the rows, applied before their format is read."""

    name: str = Field(min_length=1)
    """`rename_columns`, `select_columns`, `remove_columns`, `duplicate_columns`, `skip_samples_with_large_columns`,
    `apply_custom_jinja_template`, or one of the handlers that choose how rows are tokenized:
    `tokenize_and_apply_input_masking`, `apply_tokenizer_chat_template`,
    `tokenize_and_apply_chat_template_with_masking`, `tokenize`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the handler, named as in fms-hf-tuning. They may be nested under `fn_kwargs`."""


NonEmpty = Annotated[str, Field(min_length=1)]


class DatasetSource(ConfigSection):
    """A dataset and how to read it."""

    path: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    """A file, a folder, a glob such as `data/*.jsonl`, a dataset id on the Hugging Face Hub, or a list of these.
    Supported files: JSON Lines, JSON, Parquet, Arrow, CSV and text, optionally compressed (.gz, .bz2, .xz, .zst)."""
    split: str | None = None
    """Split of a Hub dataset (default `train`), or of a folder with one file per split."""
    subset: str | None = None
    """Configuration name of a Hub dataset that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    format: FormatName | None = None
    """Format of the rows. By default detected from the first rows, and logged."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, from the dataset's name to the engine's: `{question: prompt, answer: completion}`. A key of
    messages is written as `messages.speaker`."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Roles of messages to rename, from the dataset's name to the engine's: `{customer: user, agent: assistant}`."""
    ignore_columns: list[str] = Field(default_factory=list)
    """Columns, by the dataset's names, that are left out on purpose: not trained on, and not reported as unused. A key
    of messages is written as `messages.weight`."""
    handlers: list[Handler] = Field(default_factory=list[Handler])
    """Transformations applied to each row, in order, after `columns` were renamed."""
    dataset_text_field: str | None = None
    """Column that holds the text of plain-text rows. Defaults to `text`."""
    data_formatter_template: str | None = None
    """Template that renders a row to plain text: `### Input: {{input}} ### Answer: {{output}}`. Each placeholder is a
    column name or a Jinja expression."""
    response_template: str | None = Field(default=None, min_length=1)
    """Marker before the response in plain-text rows. Text up to and including its last occurrence is masked out of the
    loss."""
    instruction_template: str | None = Field(default=None, min_length=1)
    """Marker before each instruction in multi-turn plain text. Requires `response_template`: each response is then
    trained on up to the next instruction."""
    add_eos_token: bool = True
    """Append the end-of-sequence token to plain text and to completions that no chat template terminates."""
    input_separator: str = "\n\n"
    """What joins `instruction` and `input` of a row that has both: by default an empty line. LLaMA-Factory and ms-swift
    join them with a line break, `"\\n"`."""
    text_unit: Literal["line", "paragraph", "document"] = "line"
    """What makes up one row of a text file."""
    max_rows: int | None = Field(default=None, gt=0)
    """Maximum number of rows to read from the start of this dataset."""
    train_ratio: float | None = Field(default=None, ge=0, le=1)
    """Fraction of this dataset to train on. By default everything that is not used for validation. 0 uses the dataset
    for validation only."""
    validation_ratio: float = Field(default=0.0, ge=0, le=1)
    """Fraction of this dataset to use as validation data, if `validation_data.type` is `FROM_DATASETS`."""


class WeightedDatasetSource(DatasetSource):
    """A dataset in a weighted mix."""

    sampling_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Relative probability of drawing a row from this dataset. 0 skips the dataset."""


class _DataInput(ConfigSection):
    data_type: str | None = None
    """Accepted for compatibility and ignored: the algorithm determines the kind of rows."""


class Concatenation(_DataInput):
    """All rows of all datasets, one dataset after the other."""

    type: Literal["CONCATENATION"]
    datasets: Annotated[list[DatasetSource], Field(min_length=1)]
    """Datasets to concatenate, in order."""


class WeightedMix(_DataInput):
    """Datasets interleaved by sampling weight."""

    type: Literal["PRECOMPUTE_WEIGHTED_MIX"]
    datasets: Annotated[list[WeightedDatasetSource], Field(min_length=1)]
    """Datasets and their sampling weights. If all weights are 1.0, the datasets alternate row by row."""
    seed: int = 19851243
    """Random seed of the sampling."""
    stopping: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """When the mix ends: `all_exhausted` once every row of every dataset was drawn, `first_exhausted` once any dataset
    runs out of rows."""


class AutoSplit(_DataInput):
    """Hold out a random fraction of the training data for validation."""

    type: Literal["AUTO_SPLIT"]
    ratio: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of the training data to hold out, between 0 and 1."""
    seed: int = 1289525893
    """Random seed of the split."""


class FromDatasets(_DataInput):
    """Hold out the `validation_ratio` of each training dataset, before the datasets are mixed."""

    type: Literal["FROM_DATASETS"]
    seed: int = 1289525893
    """Random seed of the splits."""


class NoData(_DataInput):
    """No validation data."""

    type: Literal["NONE"]


TrainingData = Annotated[Concatenation | WeightedMix, Field(discriminator="type")]
ValidationData = Annotated[Concatenation | AutoSplit | FromDatasets | NoData, Field(discriminator="type")]


class ImagesConfig(ConfigSection):
    """Images in training rows (of a vision-language model). Sizes are those that the model's image processor has;
    by default each is the one in the processor's files."""

    folder: str | None = Field(default=None, min_length=1)
    """Folder below which all images are. Paths in rows are relative to it. By default the folder of each data file. An
    image outside of it, also by a link, makes its row invalid."""
    max_file_pixels: int = Field(default=89_478_485, gt=0)
    """Most pixels of an image file. A larger one makes its row invalid, and is not decoded."""
    min_pixels: int | None = Field(default=None, gt=0)
    """Smallest number of pixels of an image after resizing (Qwen-VL and others)."""
    max_pixels: int | None = Field(default=None, gt=0)
    """Largest number of pixels of an image after resizing, and so its largest number of tokens (Qwen-VL and others)."""
    longest_edge: int | None = Field(default=None, gt=0)
    """Longest edge of an image after resizing (Idefics3, SmolVLM, Pixtral, Mistral 3)."""
    do_image_splitting: bool | None = None
    """Split large images into tiles (Idefics3, SmolVLM)."""
    do_pan_and_scan: bool | None = None
    """Add crops of oblong images (Gemma 3)."""
    crop_to_patches: bool | None = None
    """Split images into tiles (InternVL)."""
    min_patches: int | None = Field(default=None, gt=0)
    """Fewest tiles of an image (InternVL)."""
    max_patches: int | None = Field(default=None, gt=0)
    """Most tiles of an image (InternVL)."""


class DataConfig(ConfigSection):
    """Training and validation data, chat template and padding."""

    training_data: TrainingData
    """Training datasets and how to combine them."""
    validation_data: ValidationData
    """Validation datasets, or how to hold out validation rows. `type: NONE` disables validation."""
    images: ImagesConfig = ImagesConfig()
    """Images in rows: where they are, and their sizes."""
    chat_template_name: ChatTemplateName | None = None
    """Built-in chat template that renders conversations to text. By default the tokenizer's own template is used, and
    `mistral-with-system` if it has none."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Custom chat template, instead of a built-in one: Jinja source, the path of a file, or `trl/NAME` for one that
    ships with TRL, such as `trl/glm4moe_training`."""
    special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Tokens to add to the tokenizer as special tokens, such as those that `chat_template` or the data uses."""
    padding_side: Literal["right", "left"] = "right"
    """Side on which shorter rows of a batch are padded."""
    missing_pad_token_strategy: MissingPadTokenStrategy = MissingPadTokenStrategy.BOS_REPURPOSE
    """Which token to pad with if the tokenizer has no padding token."""
    streaming: bool = False
    """Tokenize and pack rows during training instead of in advance (sft only), for datasets that are too large to
    prepare. Requires `training_args.max_steps`."""
    shuffle_buffer: int = Field(default=10_000, ge=1)
    """Number of rows in the shuffle buffer of a streaming dataset, from which rows are drawn with `training_args.seed`.
    1 keeps the order of the files."""
    cache: str = "auto"
    """Where to cache prepared datasets: a folder, `off`, or `auto` for $FINETUNING_CACHE (which may also be `off`),
    falling back to ~/.cache/finetuning/prepared. Rows are prepared again if the data, the chat template, the tokenizer
    or a relevant setting changed; the log says which."""
    prepared: str | None = None
    """Folder written by `finetuning prepare --output`. Its rows are used as they are; the datasets are not read."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with an invalid row: `error` stops and lists the first ten, `skip` drops it, counts it and writes it
    to `rejects.jsonl`."""
    max_lost_fraction: float = Field(default=0.05, ge=0, le=1)
    """Maximum fraction of rows that may be lost because they are invalid or have no tokens to train on; above it the
    run stops. Rows that `length_handling` filters are not included."""
