"""Whether the model has a position for every token of the longest row."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from finetuning.errors import ConfigError, Place

if TYPE_CHECKING:
    import datasets

    from finetuning.config.sections.experiment import Experiment
    from finetuning.data.prepared import PreparedData

_LEARNED = ("wpe", "embed_positions", "position_embeddings")


def check_positions(model: Any, experiment: Experiment, data: PreparedData) -> tuple[str, ...]:
    """Nothing where each token has a position that the model was made for; else a warning.

    Raises:
        ConfigError: the model has learned its positions, and has none for the end of a row.
    """
    key = "sft_args.max_seq_length" if hasattr(experiment, "sft_args") else "training_args.max_length"
    is_stream = not isinstance(data.train, Sized)
    longest = experiment.sft_args.max_seq_length if is_stream else _longest(data.train)
    if longest is None:
        return ()
    learned = _learned_positions(model)
    if learned is not None and longest > learned:
        has = "of a stream may have" if is_stream else "has"
        raise ConfigError(
            f"a row {has} {longest} tokens, and the model has learned {learned} positions",
            place=Place(key=key),
            hint=f"Set it to {learned} or less.",
        )
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if learned is None and not is_stream and isinstance(made_for, int) and longest > made_for:
        return (f"a row has {longest} tokens, more than the {made_for} positions that the model was made for ({key})",)
    return ()


def _longest(dataset: datasets.Dataset) -> int | None:
    """Most tokens of a row: of a prompt with its longer answer; None for rows without tokens of their own."""
    import numpy as np

    from finetuning.data.packed import row_lengths

    if "input_ids" in dataset.column_names:
        return int(row_lengths(dataset).max())
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in dataset.column_names]
    if not answers or "prompt_ids" not in dataset.column_names:
        return None
    longer = np.maximum.reduce([row_lengths(dataset, name) for name in answers])
    return int((row_lengths(dataset, "prompt_ids") + longer).max())


def _learned_positions(model: Any) -> int | None:
    from torch import nn

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _LEARNED and isinstance(module, nn.Embedding):
            return module.num_embeddings - getattr(module, "offset", 0)
    return None
