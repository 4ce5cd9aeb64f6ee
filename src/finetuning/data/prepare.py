"""Files to datasets that a trainer takes as they are, with the ledger of what became of each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetuning.config.data import Concatenation, DataConfig, DatasetSource, WeightedMix
from finetuning.config.training import SFTArgs
from finetuning.data import mixing
from finetuning.data.arranging import arrange, used_datasets
from finetuning.data.examples import DPOMaker, SFTMaker
from finetuning.data.labelling import Labeller
from finetuning.data.ledger import Ledger, raise_bad_rows
from finetuning.data.loading import options_for
from finetuning.data.masking import Masker
from finetuning.data.packed import pack_dataset
from finetuning.data.preview import PreviewRow
from finetuning.data.prompts import PromptMaker
from finetuning.data.reading import Reading, to_dataset
from finetuning.data.rendering import Renderer
from finetuning.data.sources import find_shards
from finetuning.data.supervised import SupervisedMaker
from finetuning.data.templates import chosen_template
from finetuning.data.unpaired import UnpairedMaker, WholePairMaker
from finetuning.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

RULES = "1"
"""Changes whenever the same rows would be rendered, masked, cut or mixed in another way."""


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of each thing that the prepared rows depend on, in hexadecimal."""

    data: str
    template: str
    tokenizer: str
    rules: str

    @property
    def digest(self) -> str:
        """One SHA-256 over all of them."""
        return _sha256(f"{self.data} {self.template} {self.tokenizer} {self.rules}")


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows. SFT: `input_ids` and `labels`, with `lengths` where rows are packed; preferences: `prompt_ids`,
    `chosen_ids`, `rejected_ids`; KTO: `prompt_ids`, `completion_ids`, `label`; GRPO: `prompt_ids` and `row`, what
    rewards are told as JSON."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    ledger: Ledger
    preview: list[PreviewRow]
    fingerprint: Fingerprint


def prepare_sft(
    data_conf: DataConfig,
    sft_args: SFTArgs,
    tokenizer: PreTrainedTokenizerFast,
    num_workers: int = 1,
    *,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """`input_ids` and `labels` of the training and validation rows.

    `tokenizer` has its chat template and special tokens already. `stop_tokens` are what the model may stop at besides
    the end-of-sequence token (its `generation_config`), which some templates end a tool call with. Preparation runs on
    the tokenizer's own threads, whatever `num_workers` says.

    Raises:
        DataError: a file, a row or the template is wrong, or too few rows are left.
    """
    labeller = _labeller(tokenizer)
    options = options_for(sft_args, tokenizer.special_tokens_map)
    truncate = sft_args.length_handling == "truncate"

    def make_chats() -> SFTMaker:
        renderer = Renderer(tokenizer)
        masker = Masker(renderer, labeller.split, _stops(data_conf, stop_tokens))
        return SFTMaker(renderer, masker, labeller, sft_args.max_seq_length, truncate, options.chats != "all")

    make = SupervisedMaker(make_chats, labeller, tokenizer.eos_token, len(tokenizer), sft_args.max_seq_length, truncate)
    rules = ["sft", sft_args.max_seq_length, sft_args.length_handling, options.chats, options.completions]
    reading = Reading("sft", options, make, labeller, sft_args.max_seq_length)
    prepared = _prepare(data_conf, reading, tokenizer, [*rules, sft_args.packing])
    if not sft_args.packing:
        return prepared
    return replace(prepared, train=pack_dataset(prepared.train, sft_args.max_seq_length))


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
    renderer = Renderer(tokenizer)
    masker = Masker(renderer, labeller.split, _stops(data_conf, stop_tokens))
    reading = Reading(
        "preference",
        options_for(None, tokenizer.special_tokens_map),
        DPOMaker(renderer, masker, labeller, max_length),
        labeller,
        max_length,
    )
    return _prepare(data_conf, reading, tokenizer, ["dpo", max_length])


def prepare_reward(
    data_conf: DataConfig,
    max_length: int | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """The columns of `prepare_dpo`, but pairs longer than `max_length` are left out, not cut.

    Raises:
        DataError: as `prepare_dpo`.
    """
    labeller = _labeller(tokenizer)
    renderer = Renderer(tokenizer)
    masker = Masker(renderer, labeller.split, _stops(data_conf, stop_tokens))
    make = WholePairMaker(DPOMaker(renderer, masker, labeller, None), max_length)
    return _prepare(
        data_conf,
        Reading("preference", options_for(None, tokenizer.special_tokens_map), make, labeller, max_length),
        tokenizer,
        ["reward", max_length],
    )


def prepare_kto(
    data_conf: DataConfig,
    max_length: int | None,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
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
    renderer = Renderer(tokenizer)
    masker = Masker(renderer, labeller.split, _stops(data_conf, stop_tokens))
    reading = Reading(
        "unpaired",
        options_for(None, tokenizer.special_tokens_map),
        UnpairedMaker(renderer, masker, labeller, max_length),
        labeller,
        max_length,
    )
    prepared = _prepare(data_conf, reading, tokenizer, ["kto", max_length, seed])
    return replace(
        prepared,
        train=_shuffled(prepared.train, seed),
        validation=None if prepared.validation is None else _shuffled(prepared.validation, seed),
    )


def _shuffled(dataset: datasets.Dataset, seed: int) -> datasets.Dataset:
    return dataset.shuffle(seed=seed, keep_in_memory=True).flatten_indices(keep_in_memory=True)


def prepare_prompts(
    data_conf: DataConfig, max_length: int | None, needed: Mapping[str, str], tokenizer: PreTrainedTokenizerFast
) -> PreparedData:
    """`prompt_ids` and `row` of the prompts; those longer than `max_length` are left out.

    `needed` names columns that every row must have, each with what needs it.

    Raises:
        DataError: as `prepare_dpo`.
    """
    labeller = _labeller(tokenizer)
    make = PromptMaker(Renderer(tokenizer), labeller, max_length, needed)
    reading = Reading("prompt", options_for(None, tokenizer.special_tokens_map), make, labeller, max_length)
    return _prepare(data_conf, reading, tokenizer, ["prompt", max_length])


def _labeller(tokenizer: PreTrainedTokenizerFast) -> Labeller:
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is a slow one, without character offsets: a loss mask could not be proven")
    return Labeller(tokenizer)


def _stops(data_conf: DataConfig, stop_tokens: Sequence[str]) -> tuple[str, ...]:
    template = chosen_template(data_conf)
    return (*stop_tokens, *([template.end_of_turn] if template and template.end_of_turn else ()))


def _prepare(
    data_conf: DataConfig, reading: Reading, tokenizer: PreTrainedTokenizerFast, rules: list[Any]
) -> PreparedData:
    training, validation = data_conf.training_data, data_conf.validation_data
    sources = _sources(training, "data_conf.training_data")
    other = _sources(validation, "data_conf.validation_data") if isinstance(validation, Concatenation) else []
    part, ledger = reading.read(sources, "training")
    parts, ledgers = [part], [ledger]
    if other:
        part, ledger = reading.read(other, "validation")
        parts.append(part)
        ledgers.append(ledger)
    if data_conf.on_bad_row == "error":
        raise_bad_rows(reading.problems)
    report = Ledger(tuple(ledgers))
    report.check(data_conf.max_lost_fraction)
    train, held_out = arrange(training, validation, parts[0].lengths)
    return PreparedData(
        train=to_dataset(parts[0], train, "training"),
        validation=(
            to_dataset(parts[0], held_out, "validation")
            if held_out is not None
            else to_dataset(parts[1], mixing.concatenate(parts[1].lengths), "validation")
            if other
            else None
        ),
        ledger=report,
        preview=[row for rows in reading.preview for row in rows],
        fingerprint=Fingerprint(
            data=reading.digest.hexdigest(),
            template=_sha256(json.dumps(tokenizer.chat_template)),
            tokenizer=_sha256(tokenizer.backend_tokenizer.to_str()),
            rules=_sha256(json.dumps([RULES, *rules, data_conf.model_dump(mode="json")])),
        ),
    )


def _sources(data: Concatenation | WeightedMix, key: str) -> list[tuple[str, DatasetSource]]:
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
