"""Files to datasets that a trainer takes as they are, with the ledger of what became of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.config.sections.data import DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.arrow import as_dataset, take_rows
from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer, chosen_template
from finetuning.data.open_dataset import options_for
from finetuning.data.packing import pack_dataset
from finetuning.data.prepared import PreparedData, prepare_rows
from finetuning.data.preprocessor import Preprocessor
from finetuning.data.processors.base import ChatProcessor, PreferenceProcessor
from finetuning.data.processors.prompt import PromptProcessor
from finetuning.data.processors.sft import SFTProcessor
from finetuning.data.processors.unpaired import UnpairedProcessor, WholePairProcessor
from finetuning.data.streaming.prepare import stream_rows
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast


def prepare_sft(
    data_conf: DataConfig,
    sft_args: SFTArgs,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
    seed: int = 0,
) -> PreparedData:
    """`input_ids` and `labels` of the training and validation rows.

    `tokenizer` has its chat template and special tokens already. `stop_tokens` are what the model may stop at besides
    the end-of-sequence token (its `generation_config`), which some templates end a tool call with. Of many rows,
    `num_workers` processes make a share each; how many they are does not change the rows. `seed` is that of the order
    of a stream.

    Raises:
        DataError: a file, a row or the template is wrong, or too few rows are left.
    """
    labeller = _labeller(tokenizer)
    options = options_for(sft_args, tokenizer.special_tokens_map)
    truncate = sft_args.length_handling == "truncate"

    def make_chats() -> ChatProcessor:
        renderer, masker = _proof(data_conf, tokenizer, labeller, stop_tokens)
        return ChatProcessor(renderer, masker, labeller, sft_args.max_seq_length, truncate, options.chats != "all")

    make = SFTProcessor(make_chats, labeller, tokenizer.eos_token, len(tokenizer), sft_args.max_seq_length, truncate)
    rules = {
        "method": "sft",
        "sft_args.max_seq_length": sft_args.max_seq_length,
        "sft_args.length_handling": sft_args.length_handling,
        "sft_args.train_on": [options.chats, options.completions],
        "stop tokens": list(stop_tokens),
    }
    divide = make.divide if sft_args.length_handling == "split" else None
    reading = Preprocessor("sft", options, make, labeller, sft_args.max_seq_length, num_workers, divide)
    if data_conf.streaming:
        capacity = sft_args.max_seq_length if sft_args.packing else None
        return stream_rows(data_conf, reading, tokenizer, rules, seed, capacity)
    prepared = prepare_rows(data_conf, reading, tokenizer, rules)
    if not sft_args.packing:
        return prepared
    packed = pack_dataset(prepared.train, sft_args.max_seq_length)
    return replace(prepared, train=packed, fingerprint=prepared.fingerprint.with_rule("packed"))


def prepare_dpo(
    data_conf: DataConfig,
    max_length: int | None,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of the training and validation rows, as TRL's collator takes them.

    Answers are cut where prompt and answer are longer than `max_length`. The arguments are those of `prepare_sft`.

    Raises:
        DataError: a file, a row or the template is wrong, or too few rows are left.
    """
    labeller = _labeller(tokenizer)
    renderer, masker = _proof(data_conf, tokenizer, labeller, stop_tokens)
    reading = Preprocessor(
        "preference",
        options_for(None, tokenizer.special_tokens_map),
        PreferenceProcessor(renderer, masker, labeller, max_length),
        labeller,
        max_length,
        num_workers,
    )
    return prepare_rows(data_conf, reading, tokenizer, _rules("dpo", max_length, stop_tokens))


def prepare_reward(
    data_conf: DataConfig,
    max_length: int | None,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """The columns of `prepare_dpo`, but pairs longer than `max_length` are left out, not cut.

    Raises:
        DataError: as `prepare_dpo`.
    """
    labeller = _labeller(tokenizer)
    renderer, masker = _proof(data_conf, tokenizer, labeller, stop_tokens)
    make = WholePairProcessor(PreferenceProcessor(renderer, masker, labeller, None), max_length)
    return prepare_rows(
        data_conf,
        Preprocessor(
            "preference", options_for(None, tokenizer.special_tokens_map), make, labeller, max_length, num_workers
        ),
        tokenizer,
        _rules("reward", max_length, stop_tokens),
    )


def prepare_kto(
    data_conf: DataConfig,
    max_length: int | None,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """`prompt_ids`, `completion_ids` and `label`, shuffled by the seed.

    KTO holds each prompt against the answer of a neighbour, which must not be another answer to the same prompt, as it
    would be where a preference became two rows.

    Raises:
        DataError: as `prepare_dpo`.
    """
    labeller = _labeller(tokenizer)
    renderer, masker = _proof(data_conf, tokenizer, labeller, stop_tokens)
    reading = Preprocessor(
        "unpaired",
        options_for(None, tokenizer.special_tokens_map),
        UnpairedProcessor(renderer, masker, labeller, max_length),
        labeller,
        max_length,
        num_workers,
    )
    prepared = prepare_rows(data_conf, reading, tokenizer, _rules("kto", max_length, stop_tokens))
    return replace(
        prepared,
        train=_shuffled(prepared.train, seed),
        validation=None if prepared.validation is None else _shuffled(prepared.validation, seed),
        fingerprint=prepared.fingerprint.with_rule(f"shuffled by {seed}"),
    )


def _shuffled(dataset: datasets.Dataset, seed: int) -> datasets.Dataset:
    """The rows in the order of `Dataset.shuffle`."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    return as_dataset(take_rows(dataset.with_format("arrow")[:], order))


def prepare_prompts(
    data_conf: DataConfig,
    max_length: int | None,
    needed: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
) -> PreparedData:
    """`prompt_ids` and `row` of the prompts; those longer than `max_length` are left out.

    `needed` names columns that every row must have, each with what needs it.

    Raises:
        DataError: as `prepare_dpo`.
    """
    labeller = _labeller(tokenizer)
    make = PromptProcessor(TemplateRenderer(tokenizer), labeller, max_length, needed)
    reading = Preprocessor(
        "prompt", options_for(None, tokenizer.special_tokens_map), make, labeller, max_length, num_workers
    )
    return prepare_rows(data_conf, reading, tokenizer, _rules("grpo", max_length, ()) | {"columns": dict(needed)})


def _rules(method: str, max_length: int | None, stop_tokens: Sequence[str]) -> dict[str, Any]:
    return {"method": method, "max_length": max_length, "stop tokens": list(stop_tokens)}


def _labeller(tokenizer: PreTrainedTokenizerFast) -> LabelBuilder:
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, without character offsets: a loss mask could not be proven")
    return LabelBuilder(tokenizer)


def _proof(
    data_conf: DataConfig, tokenizer: PreTrainedTokenizerFast, labeller: LabelBuilder, stop_tokens: Sequence[str]
) -> tuple[TemplateRenderer, AssistantMaskBuilder]:
    """What renders chats by the tokenizer's template, and shows which of the text is the assistant's."""
    renderer = TemplateRenderer(tokenizer)
    template = chosen_template(data_conf)
    ends = (template.end_of_turn,) if template and template.end_of_turn else ()
    return renderer, AssistantMaskBuilder(renderer, labeller.split, (*stop_tokens, *ends))
