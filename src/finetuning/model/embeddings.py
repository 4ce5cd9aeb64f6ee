"""New tokens: rows for them in the embeddings, and a base model to ship with an adapter when there were none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.errors import Location, ModelError
from finetuning.model.quantization import is_quantized
from finetuning.model.safetensors_io import ADDED_TOKENS, UNTRAINED_TOKENS


@dataclass(frozen=True)
class EmbeddingInfo:
    """What became of the embeddings."""

    new_ids: tuple[int, ...]
    """Ids of the tokens whose rows are untrained: the ones that an adapter has to train with it."""
    rows_before: int
    rows: int
    """Rows of the embeddings; at least as many as the tokenizer has tokens."""
    is_tied: bool
    """Whether input and output embeddings are the same weights."""

    @property
    def has_grown(self) -> bool:
        """True when the base model on disk has too few rows: an adapter needs a new base model beside it."""
        return self.rows > self.rows_before

    def write_added(self, folder: Path) -> None:
        """Writes `added_tokens_info.json`, by the names of fms-hf-tuning, where tokens are new; nothing otherwise.

        `num_new_tokens` counts the rows that were added, those of a rounded size too, or where the base had spare rows
        for all new tokens, the tokens.
        """
        if not self.new_ids and not self.has_grown:
            return
        num_new = self.rows - self.rows_before if self.has_grown else len(self.new_ids)
        told = {"num_new_tokens": num_new, "new_embedding_size": self.rows}
        (folder / ADDED_TOKENS).write_text(json.dumps(told) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        if not self.new_ids:
            return f"{self.rows} rows, no new tokens"
        how = f"grown from {self.rows_before} to {self.rows} rows" if self.has_grown else f"{self.rows} rows, as before"
        return f"{how}; {len(self.new_ids)} new tokens begin at the mean of the others"


def untrained_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that a base model was grown by, and that nothing has trained; none for any other model.

    Raises:
        ModelError: the file that names them is damaged.
    """
    file = folder / UNTRAINED_TOKENS
    if not file.is_file():
        return []
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    known = tokenizer.get_vocab()
    return [token for token in tokens if token in known]


def resize_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str] = (),
    *,
    pad_to_multiple_of: int | None = None,
) -> EmbeddingInfo:
    """Rows for every token of the tokenizer; those of `new_tokens` start as the mean row of the tokens in use.

    The embeddings grow only when the tokenizer has more tokens than they have rows. New tokens that fit into rows
    which the base model keeps to spare get the mean too: those rows are noise that was never trained. The mean is
    taken over the tokens that the tokenizer had before, in float32, without spare rows; nothing random is added.
    Input and output embeddings stay tied if they were.

    Raises:
        ModelError: the base is quantised and would have to grow.
    """
    embeddings = model.get_input_embeddings()
    rows_before = _num_rows(embeddings.weight)
    tied = _is_tied(model)
    ids = tuple(sorted(tokenizer.convert_tokens_to_ids(list(new_tokens))))
    vocabulary = tokenizer.get_vocab()
    needed = max(len(tokenizer), max(vocabulary.values()) + 1)
    rows = rows_before
    if needed > rows_before:
        if is_quantized(model):
            raise ModelError(
                f"{needed - rows_before} tokens have no row in the embeddings, and a quantised model cannot grow",
                place=Location(key="quant_conf"),
                hint="Choose a chat template whose tokens the tokenizer already has, or let the base grow once without"
                " quantisation and train the new base model that this saves.",
            )
        rows = -(-needed // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        model.resize_token_embeddings(rows, mean_resizing=False)
    in_use = sorted(set(vocabulary.values()) - set(ids))
    # Rows beyond the old ones that no token stands for, because the size was rounded up, get the mean as well.
    fresh = sorted(set(ids) | set(range(rows_before, rows)))
    if fresh:
        averaged = [row for row in in_use if row < rows_before]
        for weight in _distinct_weights(model):
            _set_to_mean(weight, fresh, averaged)
    return EmbeddingInfo(ids, rows_before, rows, tied)


def _distinct_weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """The input embeddings, the output embeddings if they are other weights, and the latter's bias."""
    yield model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    if output is None:
        return
    if output.weight is not model.get_input_embeddings().weight:
        yield output.weight
    if getattr(output, "bias", None) is not None:
        yield output.bias


def _set_to_mean(weight: torch.Tensor, rows: Sequence[int], averaged: Sequence[int]) -> None:
    with torch.no_grad(), _whole(weight):
        mean = weight[torch.tensor(averaged, device=weight.device)].float().mean(dim=0)
        weight[torch.tensor(rows, device=weight.device)] = mean.to(weight.dtype)


def _is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _num_rows(weight: Any) -> int:
    # Under ZeRO-3 a parameter is an empty shard whose full shape DeepSpeed keeps beside it.
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextmanager
def _whole(weight: torch.Tensor) -> Iterator[None]:
    """The weight with all its rows in this process, for the length of the block."""
    if not hasattr(weight, "ds_shape"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        yield
