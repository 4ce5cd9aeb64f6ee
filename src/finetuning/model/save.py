"""A model or adapter as a folder that appears whole: weights, tokenizer, generation config, fingerprint."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.atomic_io import atomic_directory
from finetuning.errors import StorageError
from finetuning.model import fingerprint
from finetuning.model.embeddings import EmbeddingInfo
from finetuning.model.fingerprint import Fingerprint
from finetuning.model.safetensors_io import UNTRAINED_TOKENS, read_model_headers
from finetuning.model.stop_tokens import StopTokens, fix_sampling_config, save_tokenizer


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_tokens: StopTokens | None = None,
    base_fingerprint: Fingerprint | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    vocabulary: EmbeddingInfo | None = None,
    untrained: Sequence[str] = (),
) -> Path:
    """`folder`, holding the model or, of a PEFT model, its adapter.

    It appears under its name only when every file is flushed; a failure leaves nothing. One process calls this.
    `state_dict` holds the gathered weights of a sharded model; `vocabulary` tells of tokens that are new, `untrained`
    of those that the next training has to train.

    Raises:
        StorageError: the folder exists and is not empty, or cannot be written.
    """
    try:
        with atomic_directory(folder) as staging:
            write_model(model, staging, stop_tokens=stop_tokens, state_dict=state_dict)
            save_tokenizer(tokenizer, staging, stop_tokens)
            if base_fingerprint is not None:
                fingerprint.write(base_fingerprint, staging)
            if vocabulary is not None:
                vocabulary.write_added(staging)
            if untrained:
                (staging / UNTRAINED_TOKENS).write_text(
                    json.dumps({"tokens": list(untrained)}) + "\n", encoding="utf-8"
                )
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def write_model(
    model: Any,
    folder: Path,
    *,
    stop_tokens: StopTokens | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """The model's or adapter's own files, into a folder that is there. Only safetensors are written."""
    arguments = {} if state_dict is None else {"state_dict": _without_ties(model, state_dict)}
    if is_adapted(model):
        # The embeddings of a grown vocabulary are in the new base model; by itself PEFT would save them here as well.
        model.save_pretrained(folder, save_embedding_layers=False, **arguments)
        if stop_tokens is not None:
            stop_tokens.generation_config.save_pretrained(folder)
        return
    if not model.can_generate():
        model.save_pretrained(folder, **arguments)
        return
    own = model.generation_config
    written = stop_tokens.generation_config if stop_tokens is not None else copy.deepcopy(own)
    if written is not None:
        fix_sampling_config(written)
    model.generation_config = written
    try:
        model.save_pretrained(folder, **arguments)
    finally:
        model.generation_config = own


def _without_ties(model: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathered weights without those that are another's, such as a tied head: gathering makes a copy of each."""
    ties = {} if is_adapted(model) else getattr(model, "all_tied_weights_keys", {})
    return {name: tensor for name, tensor in state_dict.items() if ties.get(name) not in state_dict}


def save_grown_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, new_tokens: Sequence[str] = ()
) -> Path:
    """`folder`, holding a base model whose vocabulary has grown by `new_tokens`, with its tokenizer.

    Called before an adapter is put on, so that the adapter is trained on, and names, this model: from here on the
    model's `name_or_path` is the folder. The adapter and this folder load again; the adapter and the old base do not.
    """
    saved = save_model(model, tokenizer, folder, untrained=new_tokens)
    model.config.name_or_path = str(saved)
    model.name_or_path = str(saved)
    return saved


def has_grown_base(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True when a folder holds this very grown model: the same vocabulary, the same embeddings.

    A run that was cut short leaves one behind, which its successor goes on with.
    """
    if not (folder / "config.json").is_file():
        return False
    vocabulary = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    weight = model.get_input_embeddings().weight
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), None)
    entry = read_model_headers(folder).get(name or "")
    if vocabulary != tokenizer.get_vocab() or entry is None:
        return False
    with safe_open(entry.file, framework="pt") as tensors:
        saved = tensors.get_tensor(name)
    return torch.equal(saved, weight.detach().to("cpu", saved.dtype))


def is_adapted(model: Any) -> bool:
    """True for a model with a PEFT adapter on."""
    return hasattr(model, "peft_config") and hasattr(model, "active_peft_config")
