"""Data preparation for each kind of method: files to tokenized datasets that a trainer takes as they are."""

# pyarrow and datasets have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from finetuning.config.sections.data import DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.arrow import as_dataset, take_rows
from finetuning.data.chat.end_of_turn import EndOfTurnFinder
from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer, configured_template, special_tokens_of
from finetuning.data.formats.row_format import Options, TakeImages
from finetuning.data.open_dataset import options_for
from finetuning.data.packing import pack_dataset
from finetuning.data.prepared import PreparedData, prepare_rows
from finetuning.data.preprocessor import Inspector, Preprocessor
from finetuning.data.processors.base import Processor
from finetuning.data.processors.preference import PreferenceProcessor, UnpairedProcessor, WholePairProcessor
from finetuning.data.processors.prompt import PromptProcessor
from finetuning.data.processors.sft import ChatProcessor, SFTProcessor
from finetuning.data.statistics import DatasetStatistics
from finetuning.data.streaming.prepare import stream_rows
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

    from finetuning.data.images.processor import ImageTextProcessor


def prepare_sft(
    data_conf: DataConfig,
    sft_args: SFTArgs,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
    seed: int = 0,
    inspector: Inspector | None = None,
    images: ImageTextProcessor | str | None = None,
) -> PreparedData:
    """Prepare `input_ids` and `labels` of the training and validation rows.

    Args:
        tokenizer: has its chat template and special tokens already.
        num_workers: processes that share the work where there are many rows; the result does not depend on it.
        stop_tokens: tokens that end a turn in addition to the end-of-sequence token (from `generation_config`); some
            templates end a tool call with one of them.
        seed: of the order of a stream.
        inspector: looks at the rows while they are prepared; not at those of a stream.
        images: the processor of a model that takes images, or why rows with images are refused.

    Raises:
        DataError: a file, a row or the template is invalid, or too few rows are left.
    """
    label_builder = _make_label_builder(tokenizer)
    parts = _parts_for(images)
    options = options_for(sft_args, tokenizer.special_tokens_map, parts.take_images)
    max_length, truncate = sft_args.max_seq_length, sft_args.length_handling == "truncate"

    def make_chat_processor() -> ChatProcessor:
        renderer, mask_builder = _make_mask_builder(
            data_conf, tokenizer, label_builder, stop_tokens, parts.make_renderer
        )
        return ChatProcessor(renderer, mask_builder, label_builder, max_length, truncate, options.chats != "all")

    processor = parts.make_processor(
        make_chat_processor,
        label_builder,
        cast("str | None", tokenizer.eos_token),
        len(tokenizer),
        max_length,
        truncate,
        special_tokens_of(tokenizer),
        partial(_turn_ends, tokenizer, stop_tokens),
    )
    rules = {**_sft_rules(sft_args, options, stop_tokens), **parts.rules}
    split_rows = processor.split_rows if sft_args.length_handling == "split" else None
    preprocessor = Preprocessor("sft", options, processor, label_builder, max_length, num_workers, split_rows)
    preprocessor.inspector = inspector
    if data_conf.streaming:
        return stream_rows(data_conf, preprocessor, tokenizer, rules, seed, max_length if sft_args.packing else None)
    prepared = parts.finish(prepare_rows(data_conf, preprocessor, tokenizer, rules))
    if not sft_args.packing:
        return prepared
    packed = pack_dataset(cast("datasets.Dataset", prepared.train), max_length)
    return replace(prepared, train=packed, fingerprint=prepared.fingerprint.with_rule("packed"))


@dataclass(frozen=True)
class _Parts:
    """What differs for models that take images."""

    make_processor: Callable[..., SFTProcessor] = SFTProcessor
    make_preferences: Callable[..., PreferenceProcessor] = PreferenceProcessor
    make_prompts: Callable[..., PromptProcessor] = PromptProcessor
    make_renderer: Callable[[PreTrainedTokenizerFast], TemplateRenderer] = TemplateRenderer
    take_images: TakeImages | str | None = None
    rules: Mapping[str, object] = field(default_factory=dict[str, object])
    finish: Callable[[PreparedData], PreparedData] = lambda prepared: prepared


def _parts_for(images: ImageTextProcessor | str | None) -> _Parts:
    if images is None or isinstance(images, str):
        return _Parts(take_images=images)
    from finetuning.data.images.prompts import image_preference_processor, image_prompt_processor
    from finetuning.data.images.rendering import ImageTemplateRenderer, image_sft_processor, without_empty_columns

    rules = {"images": images.digest}
    return _Parts(
        image_sft_processor(images),
        image_preference_processor(images),
        image_prompt_processor(images),
        ImageTemplateRenderer,
        images.take_images,
        rules,
        without_empty_columns,
    )


def _sft_rules(sft_args: SFTArgs, options: Options, stop_tokens: Sequence[str]) -> dict[str, object]:
    """The settings that the rows of sft depend on, in addition to those in `data_conf`."""
    return {
        "method": "sft",
        "sft_args.max_seq_length": sft_args.max_seq_length,
        "sft_args.length_handling": sft_args.length_handling,
        "sft_args.train_on": [options.chats, options.completions],
        "stop tokens": list(stop_tokens),
    }


def _turn_ends(tokenizer: PreTrainedTokenizerFast, stop_tokens: Sequence[str]) -> Sequence[str]:
    """The tokens that end a turn, in the chat template or by the generation config."""
    if not tokenizer.chat_template:  # pyright: ignore[reportUnknownMemberType]
        return stop_tokens
    return (*EndOfTurnFinder(TemplateRenderer(tokenizer), stop_tokens).stops, *stop_tokens)


def prepare_dpo(
    data_conf: DataConfig,
    max_length: int | None,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
    max_prompt_length: int | None = None,
    inspector: Inspector | None = None,
    images: ImageTextProcessor | str | None = None,
) -> PreparedData:
    """Prepare `prompt_ids`, `chosen_ids` and `rejected_ids` of the training and validation rows, for TRL's collator.

    Prompts lose their first tokens beyond `max_prompt_length`. Answers are truncated where prompt and answer are longer
    than `max_length`. The other arguments are those of `prepare_sft`.

    Raises:
        DataError: a file, a row or the template is invalid, or too few rows are left.
    """
    label_builder = _make_label_builder(tokenizer)
    parts = _parts_for(images)
    renderer, mask_builder = _make_mask_builder(data_conf, tokenizer, label_builder, stop_tokens, parts.make_renderer)
    processor = parts.make_preferences(renderer, mask_builder, label_builder, max_length, max_prompt_length)
    preprocessor = _preprocessor(
        "preference", processor, tokenizer, label_builder, max_length, num_workers, inspector, parts.take_images
    )
    rules = {**_rules("dpo", max_length, stop_tokens), **parts.rules}
    if max_prompt_length is not None:
        rules["max_prompt_length"] = max_prompt_length
    return parts.finish(prepare_rows(data_conf, preprocessor, tokenizer, rules))


def prepare_reward(
    data_conf: DataConfig,
    max_length: int | None,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
    inspector: Inspector | None = None,
) -> PreparedData:
    """Prepare the columns of `prepare_dpo`; pairs longer than `max_length` are dropped, not truncated.

    Raises:
        DataError: as `prepare_dpo`.
    """
    label_builder = _make_label_builder(tokenizer)
    renderer, mask_builder = _make_mask_builder(data_conf, tokenizer, label_builder, stop_tokens)
    processor = WholePairProcessor(PreferenceProcessor(renderer, mask_builder, label_builder, None), max_length)
    preprocessor = _preprocessor("preference", processor, tokenizer, label_builder, max_length, num_workers, inspector)
    return prepare_rows(data_conf, preprocessor, tokenizer, _rules("reward", max_length, stop_tokens))


def prepare_kto(
    data_conf: DataConfig,
    max_length: int | None,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
    inspector: Inspector | None = None,
) -> PreparedData:
    """Prepare `prompt_ids`, `completion_ids` and `label`, shuffled by the seed.

    KTO compares each prompt with the completion of another row of the batch. Without the shuffle that would often be
    the other answer to the same prompt, where a preference became two rows.

    Raises:
        DataError: as `prepare_dpo`.
    """
    label_builder = _make_label_builder(tokenizer)
    renderer, mask_builder = _make_mask_builder(data_conf, tokenizer, label_builder, stop_tokens)
    processor = UnpairedProcessor(renderer, mask_builder, label_builder, max_length)
    preprocessor = _preprocessor("unpaired", processor, tokenizer, label_builder, max_length, num_workers, inspector)
    prepared = prepare_rows(data_conf, preprocessor, tokenizer, _rules("kto", max_length, stop_tokens))
    _warn_of_single_class(prepared)
    return replace(
        prepared,
        train=_shuffle(cast("datasets.Dataset", prepared.train), seed),
        validation=None if prepared.validation is None else _shuffle(prepared.validation, seed),
        fingerprint=prepared.fingerprint.with_rule(f"shuffled by {seed}"),
    )


def _warn_of_single_class(prepared: PreparedData) -> None:
    """Note how many training rows there are of the only label, if there is only one."""
    table = cast("pa.Table", cast("datasets.Dataset", prepared.train).with_format("arrow")[:])
    labels = table["label"].unique()
    if len(labels) == 1 and isinstance(statistics := prepared.statistics, DatasetStatistics):
        label, missing = ("true", "false") if labels[0].as_py() else ("false", "true")
        warning = f"the label is {label}, and no row has the label {missing}: KTO learns from the contrast of both"
        statistics.splits[0].counts.warnings[warning] = table.num_rows


def prepare_prompts(
    data_conf: DataConfig,
    max_length: int | None,
    required_columns: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    inspector: Inspector | None = None,
    read_columns: Collection[str] | None = None,
    images: ImageTextProcessor | str | None = None,
) -> PreparedData:
    """Prepare `prompt_ids` and `row` of the prompts; those longer than `max_length` are dropped.

    `required_columns` maps columns that every row must have to what needs them, and `read_columns` are those that the
    rewards may read: the others are reported as unused. None if they may read any.

    Raises:
        DataError: as `prepare_dpo`.
    """
    label_builder = _make_label_builder(tokenizer)
    parts = _parts_for(images)
    processor = parts.make_prompts(
        parts.make_renderer(tokenizer), label_builder, max_length, required_columns, read_columns
    )
    preprocessor = _preprocessor(
        "prompt", processor, tokenizer, label_builder, max_length, num_workers, inspector, parts.take_images
    )
    rules = {**_rules("grpo", max_length, ()), **parts.rules, "columns": dict(required_columns)}
    rules["columns that rewards read"] = "all" if read_columns is None else sorted(read_columns)
    return parts.finish(prepare_rows(data_conf, preprocessor, tokenizer, rules))


def _shuffle(dataset: datasets.Dataset, seed: int) -> datasets.Dataset:
    # The order of `Dataset.shuffle`, without its table of indices: the rows are written in their new order.
    order = np.random.default_rng(seed).permutation(len(dataset))
    return as_dataset(take_rows(cast("pa.Table", dataset.with_format("arrow")[:]), order))


def _rules(method: str, max_length: int | None, stop_tokens: Sequence[str]) -> dict[str, object]:
    """The settings that the rows depend on, in addition to those in `data_conf`; they are part of the cache key."""
    return {"method": method, "max_length": max_length, "stop tokens": list(stop_tokens)}


def _preprocessor(
    kind: str,
    processor: Processor,
    tokenizer: PreTrainedTokenizerFast,
    label_builder: LabelBuilder,
    max_length: int | None,
    num_workers: int,
    inspector: Inspector | None,
    take_images: TakeImages | str | None = None,
) -> Preprocessor:
    options = options_for(None, tokenizer.special_tokens_map, take_images)
    return Preprocessor(kind, options, processor, label_builder, max_length, num_workers, inspector=inspector)


def _make_label_builder(tokenizer: PreTrainedTokenizerFast) -> LabelBuilder:
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, without character offsets: the loss mask cannot be verified")
    return LabelBuilder(tokenizer)


def _make_mask_builder(
    data_conf: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    label_builder: LabelBuilder,
    stop_tokens: Sequence[str],
    make_renderer: Callable[[PreTrainedTokenizerFast], TemplateRenderer] = TemplateRenderer,
) -> tuple[TemplateRenderer, AssistantMaskBuilder]:
    renderer = make_renderer(tokenizer)
    template = configured_template(data_conf, cast("object", tokenizer.chat_template))  # pyright: ignore[reportUnknownMemberType]
    ends = (template.end_of_turn,) if template and template.end_of_turn else ()
    return renderer, AssistantMaskBuilder(renderer, label_builder.split, (*stop_tokens, *ends))
