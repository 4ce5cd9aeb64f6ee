"""Resize the embeddings for new tokens, and initialize their rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.errors import Location, ModelError, read_json_object, reading
from finetuning.model.safetensors_io import ADDED_TOKENS_FILE, UNTRAINED_TOKENS_FILE

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class EmbeddingInfo:
    """The embeddings after `resize_embeddings`."""

    new_ids: tuple[int, ...]
    """Ids of the new tokens. Their rows are untrained, so an adapter has to train them too."""
    rows_before: int
    rows: int
    """Rows of the embeddings; at least as many as the tokenizer has tokens."""
    is_tied: bool
    """Whether the input and output embeddings share their weights."""

    @property
    def is_resized(self) -> bool:
        """Whether the base model on disk has too few rows, so that an adapter needs a new base model saved with it."""
        return self.rows > self.rows_before

    def write_added_tokens_info(self, folder: Path) -> None:
        """Write `added_tokens_info.json`, with the keys of fms-hf-tuning, if there are new tokens.

        `num_new_tokens` is the number of rows added, including those that round up the size. If the base had enough
        spare rows for the new tokens, it is the number of new tokens.
        """
        if not self.new_ids and not self.is_resized:
            return
        num_new = self.rows - self.rows_before if self.is_resized else len(self.new_ids)
        info = {"num_new_tokens": num_new, "new_embedding_size": self.rows}
        (folder / ADDED_TOKENS_FILE).write_text(json.dumps(info) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        if not self.new_ids:
            return f"{self.rows} rows, no new tokens"
        size = f"resized from {self.rows_before} to {self.rows} rows" if self.is_resized else f"{self.rows} rows"
        return f"{size}; {len(self.new_ids)} new tokens, initialized to the mean row"


def read_untrained_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that were added to an extended base model and never trained; none for any other model.

    Raises:
        ModelError: the file that lists them is damaged.
    """
    file = folder / UNTRAINED_TOKENS_FILE
    if not file.is_file():
        return []
    vocabulary = tokenizer.get_vocab()
    with reading(f"{file} cannot be read"):
        return [token for token in read_json_object(file)["tokens"] if token in vocabulary]


def resize_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str] = (),
    *,
    pad_to_multiple_of: int | None = None,
) -> EmbeddingInfo:
    """Make sure that every token has an embedding row, and initialize the rows of `new_tokens` to the mean row.

    The embeddings are resized only if the tokenizer has more tokens than they have rows. New tokens that fall on spare
    rows of the base (a vocabulary padded to a multiple of 64, say) are set to the mean as well, because spare rows are
    untrained noise. The mean is taken in float32 over the tokens that the tokenizer had before, without spare rows.
    Tied embeddings stay tied.

    By Jensen's inequality, exp of the mean of n logits is at most the mean of their exp. So each new token takes at
    most 1/n of the old tokens' total probability, and the model's predictions hardly change before the rows are
    trained. Unlike transformers' `mean_resizing`, this draws no noise: the result is deterministic.
    Source: Hewitt (2021), https://nlp.stanford.edu/~johnhew/vocab-expansion.html

    Raises:
        ModelError: the base is quantized and would have to be resized.
    """
    rows_before = _num_rows(input_weight(model))
    tied = _is_tied(model)
    vocabulary = tokenizer.get_vocab()
    ids = tuple(sorted(vocabulary[token] for token in new_tokens))
    # Ids may have gaps, so the largest one counts as well as their number.
    needed = max(len(tokenizer), max(vocabulary.values()) + 1)
    rows = rows_before
    if needed > rows_before:
        from finetuning.model.quantization import is_quantized

        if is_quantized(model):
            raise ModelError(
                f"{needed - rows_before} tokens have no embedding row, and a quantized model cannot be resized",
                location=Location(key="quant_conf"),
                hint="Choose a chat template whose tokens the tokenizer has, or run once without quantization and"
                " train on the extended base model that the run saves.",
            )
        rows = -(-needed // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        model.resize_token_embeddings(rows, mean_resizing=False)
    old_ids = sorted(set(vocabulary.values()) - set(ids))
    # Rows that only round up the size belong to no token. They are set to the mean too, so that no row is random.
    new_rows = sorted(set(ids) | set(range(rows_before, rows)))
    if new_rows:
        averaged = [row for row in old_ids if row < rows_before]
        for weight in _distinct_weights(model):
            _set_to_mean(weight, new_rows, averaged)
    return EmbeddingInfo(ids, rows_before, rows, tied)


def input_weight(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Return the weight of the input embeddings, (vocabulary, hidden)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _distinct_weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield the input embeddings, the output embeddings unless they are tied, and the output bias if there is one."""
    yield input_weight(model)
    output = model.get_output_embeddings()
    if output is None:
        return
    if output.weight is not input_weight(model):
        yield output.weight
    if getattr(output, "bias", None) is not None:
        yield output.bias


def _set_to_mean(weight: torch.Tensor, rows: Sequence[int], averaged: Sequence[int]) -> None:
    """Set `rows` of a weight, (vocabulary, hidden) or (vocabulary), to the mean of the `averaged` rows."""
    with torch.no_grad(), _gathered(weight):
        # In float32 whatever the weight's dtype, so that the result is rounded only once.
        mean = weight[torch.tensor(averaged, device=weight.device)].float().mean(dim=0)
        weight[torch.tensor(rows, device=weight.device)] = mean.to(weight.dtype)


def _is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is input_weight(model)


def _num_rows(weight: torch.Tensor) -> int:
    # Under ZeRO-3 a parameter is an empty placeholder, and DeepSpeed keeps its full shape in `ds_shape`.
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextmanager
def _gathered(weight: torch.Tensor) -> Iterator[None]:
    """Gather a weight that ZeRO-3 has sharded, for the length of the block; rank 0's changes are kept."""
    if not hasattr(weight, "ds_shape"):
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]  # an optional dependency

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        yield
