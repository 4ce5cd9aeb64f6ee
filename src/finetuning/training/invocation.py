"""aLoRA: the text that switches an adapter on, as token ids that every row is shown to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import NewPeft
from finetuning.errors import ConfigError, DataError, Place

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from finetuning.data.pipeline import PreparedData

_KEY, _IDS = "peft_conf.alora_invocation_string", "alora_invocation_tokens"


def with_invocation(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Experiment:
    """The experiment with the ids of its invocation text among the adapter's arguments; itself, where it has no text.

    Raises:
        ConfigError: the text has no token, the ids are given, too, or the adapter is no LoRA.
    """
    conf = experiment.peft_conf
    if not isinstance(conf, NewPeft) or conf.alora_invocation_string is None:
        return experiment
    if conf.peft_type.upper() != "LORA":
        raise ConfigError(f"is for LORA, not for {conf.peft_type}", place=Place(key=_KEY))
    if _IDS in conf.peft_kwargs:
        raise ConfigError(f"excludes peft_kwargs.{_IDS}", place=Place(key=_KEY), hint="Remove one of them.")
    ids = tokenizer.encode(conf.alora_invocation_string, add_special_tokens=False)
    if not ids:
        raise ConfigError("has no token", place=Place(key=_KEY))
    conf = conf.model_copy(update={"peft_kwargs": {**conf.peft_kwargs, _IDS: ids}})
    return experiment.model_copy(update={"peft_conf": conf})


def check_invoked(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> None:
    """Nothing when each row holds the ids that switch the adapter on; without them it would learn nothing there.

    Raises:
        DataError: rows do not, with their number.
    """
    conf = with_invocation(experiment, tokenizer).peft_conf
    ids = conf.peft_kwargs.get(_IDS) if isinstance(conf, NewPeft) else None
    for rows in filter(None, (data.train, data.validation)) if ids else ():
        column = "input_ids" if "input_ids" in rows.column_names else "prompt_ids"
        missing = sum(not holds(row, ids) for row in _lists(rows, column))
        if missing:
            where = "the rows" if column == "input_ids" else "the prompts"
            raise DataError(
                f"{missing:,} of {len(rows):,} rows never switch the adapter on: {where} do not hold"
                f" {tokenizer.decode(ids)!r} as the tokens {ids}",
                place=Place(key=_KEY),
                hint="Take a text that begins and ends where tokens do, such as the chat template's start of an"
                " assistant's turn.",
            )


def _lists(rows: datasets.Dataset, column: str) -> list[list[int]]:
    return rows[column][:]


def holds(row: list[int], ids: list[int]) -> bool:
    """Whether the ids stand in the row, one after another."""
    if len(row) < len(ids):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(row), len(ids))
    return bool((windows == np.asarray(ids)).all(axis=1).any())
