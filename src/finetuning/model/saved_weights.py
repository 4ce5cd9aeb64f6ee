"""Load saved weights into a model in memory, and compare the two value by value.

transformers renames and fuses weights when it loads a model (the experts of a layer become one tensor, say), and
reverts that when it saves. Names in memory and in the file are therefore different for many architectures. Loading goes
through `from_pretrained`, comparing through the conversion of `save_pretrained`: each is the other's check.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from finetuning.errors import CheckpointError
from finetuning.model.peft.adapter_files import EMBEDDING_NAMES, adapter_state_dict
from finetuning.model.safetensors_io import (
    ADAPTER_WEIGHTS,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    TensorEntry,
    read_header,
    read_model_headers,
)
from finetuning.model.save import is_peft_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_CHUNK_ELEMENTS = 1 << 22


def load_saved_weights(model: PreTrainedModel, folder: Path) -> None:
    """Replace all weights of a model by those in a folder that `save_pretrained` wrote for it.

    The weights are read on the CPU, and stay in the dtype and on the device that they have in the model.

    Raises:
        CheckpointError: the folder does not have each weight of the model, or has others.
    """
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    result: object = type(model).from_pretrained(
        folder,
        config=model.config,
        # float32 holds the values of every smaller dtype, so a model of several dtypes gets them all unchanged.
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        local_files_only=True,
        output_loading_info=True,
    )
    assert isinstance(result, tuple)
    loaded, info = result
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(key):
            first = sorted(str(name) for name in info[key])[0]
            raise CheckpointError(f"cannot load {folder}: {len(info[key])} {key.replace('_', ' ')}, such as {first}")
    model.load_state_dict(loaded.state_dict(), strict=True)


def tensors_as_saved(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a model or of its adapter under the names, and in the form, that they are saved in."""
    if is_peft_model(model):
        return adapter_state_dict(model)
    # Functions that `save_pretrained` calls in the same order. Both may change the dictionary they are given.
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(weights, model))


def has_safetensors(folder: Path) -> bool:
    """Return whether the weights of a checkpoint are in safetensors files, and can be compared with memory."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_WEIGHTS))


def compare_with_files(model: PreTrainedModel | PeftModel, folder: Path) -> list[str]:
    """Return how the weights in memory differ from those in a folder; [] if every name, dtype and value is equal.

    Reads one tensor at a time.

    Raises:
        ModelError: a safetensors file is missing or damaged.
    """
    adapter = is_peft_model(model)
    entries = read_header(folder / ADAPTER_WEIGHTS) if adapter else read_model_headers(folder)
    expected = tensors_as_saved(model)
    # PEFT may save whole embeddings with an adapter; they are the base model's, which is verified by its fingerprint.
    extra = [
        name
        for name in entries.keys() - expected.keys()
        if not (adapter and any(part in name for part in EMBEDDING_NAMES))
    ]
    differing = _differing(expected, entries)
    return [
        f"{len(names)} of {len(expected)} tensors {what}, such as {sorted(names)[0]}"
        for names, what in (
            (expected.keys() - entries.keys(), "are missing"),
            (extra, "are not the model's"),
            (differing, "differ from those in memory"),
        )
        if names
    ]


def _differing(expected: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return the names in both whose dtype, shape or values are not equal."""
    differing = []
    for file in sorted({entry.file for entry in entries.values()}):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in expected and not _equal(expected[name], tensors.get_tensor(name)):
                    differing.append(name)
    return differing


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits: NaN equals NaN, and 0.0 differs from -0.0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    # Compared as integers, and in pieces so that a tensor on a GPU is not copied as a whole.
    pieces = zip(_bits(first).split(_CHUNK_ELEMENTS), _bits(second).split(_CHUNK_ELEMENTS), strict=True)
    return all(torch.equal(left.to(right.device), right) for left, right in pieces)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
