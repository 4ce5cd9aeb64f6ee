"""Compare an adapter's tensors in memory and on disk: names, shapes, digests, and the base it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuning.errors import Location, ModelError
from finetuning.model.fingerprint import compute_fingerprint, describe_difference, read_fingerprint
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS, read_header

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# PEFT may save whole embeddings with an adapter when the vocabulary was resized.
EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def adapter_state_dict(
    model: PeftModel, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of the active adapter, by the names they are saved under.

    Args:
        state_dict: the gathered weights of a sharded model.
    """
    from peft import get_peft_model_state_dict

    gathered = None if state_dict is None else dict(state_dict)
    return get_peft_model_state_dict(
        model, gathered, adapter_name=model.active_adapters[0], save_embedding_layers=False
    )


def adapter_digests(model: PeftModel) -> dict[str, str]:
    """Return a digest of each tensor of the active adapter, by the name it is saved under; {} if they are sharded."""
    tensors = adapter_state_dict(model)
    if any(hasattr(tensor, "ds_shape") or tensor.is_meta for tensor in tensors.values()):
        return {}
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the first 16 hex digits of SHA-256 over the tensor's bytes."""
    # Viewed as bytes, because numpy has no bfloat16.
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()[:16]


def check_adapter_tensors(model: PeftModel, folder: Path, location: Location | None = None) -> None:
    """Check that the adapter on the model has the tensors of the adapter's file.

    PEFT loads a file with missing or extra tensors without an error, for example one trained on a model with another
    number of layers.

    Raises:
        ModelError: the file has missing or extra tensors, or other shapes.
    """
    stored = {name: entry.shape for name, entry in read_header(folder / ADAPTER_WEIGHTS).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
    missing = sorted(set(expected) - set(stored))
    extra = sorted(name for name in set(stored) - set(expected) if not any(part in name for part in EMBEDDING_NAMES))
    mismatched = sorted(name for name in set(stored) & set(expected) if stored[name] != expected[name])
    for names, what in (
        (missing, "does not have"),
        (extra, "has tensors that this model does not use:"),
        (mismatched, "has another shape for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the adapter {folder} {what} {', '.join(names[:3])}{more}; it was trained on another model",
                location=location,
            )


def check_adapter_base(model: PreTrainedModel, folder: Path, location: Location | None = None) -> None:
    """Check that the adapter in `folder` was trained on this base model, if it has a fingerprint of its base.

    Raises:
        ModelError: the fingerprint is that of another model.
    """
    base = Path(getattr(model.config, "_name_or_path", "") or "")
    recorded = read_fingerprint(folder)
    if recorded is None or not (base / "config.json").is_file():
        return
    difference = describe_difference(recorded, compute_fingerprint(base))
    if difference:
        raise ModelError(
            f"the adapter {folder} was trained on another base model than {base}: {difference}", location=location
        )
