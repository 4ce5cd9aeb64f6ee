"""An adapter's tensors, in memory and on disk, compared by name, shape and digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from finetuning.errors import Location, ModelError
from finetuning.model import fingerprint
from finetuning.model.safetensors_io import read_header

WEIGHTS = "adapter_model.safetensors"
# PEFT may put whole embeddings into an adapter's file when the vocabulary had grown.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of the active adapter by the names that they are saved under."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def digests(model: Any) -> dict[str, str]:
    """A digest of each tensor of the active adapter by the name that it is saved under; {} where they are sharded."""
    tensors = saved_tensors(model)
    if any(hasattr(tensor, "ds_shape") or tensor.is_meta for tensor in tensors.values()):
        return {}
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: torch.Tensor) -> str:
    """16 hex digits of SHA-256 over the tensor's bytes."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()[:16]


def check_same_tensors(model: Any, folder: Path, place: Location | None = None) -> None:
    """Nothing when the adapter's file and the adapter on the model hold the same tensors.

    Raises:
        ModelError: the file lacks tensors or has some to spare: it was trained on another model, with more layers or
            fewer, say. PEFT loads such a file without a word.
    """
    stored = {name: entry.shape for name, entry in read_header(folder / WEIGHTS).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
    missing = sorted(set(wanted) - set(stored))
    extra = sorted(name for name in set(stored) - set(wanted) if not any(part in name for part in _EMBEDDINGS))
    other = sorted(name for name in set(stored) & set(wanted) if stored[name] != wanted[name])
    for names, what in ((missing, "lacks"), (extra, "has no place in this model for"), (other, "has another shape of")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the adapter {folder} {what} {', '.join(names[:3])}{more}: it was trained on another model",
                place=place,
            )


def check_same_base(model: Any, folder: Path, place: Location | None = None) -> None:
    """Nothing when the adapter was trained on this model, or does not say on which.

    Raises:
        ModelError: the fingerprint in the adapter's folder is another model's.
    """
    base = Path(getattr(model.config, "_name_or_path", "") or "")
    recorded = fingerprint.read(folder)
    if recorded is None or not (base / "config.json").is_file():
        return
    difference = fingerprint.difference(recorded, fingerprint.fingerprint(base))
    if difference:
        raise ModelError(
            f"the adapter {folder} was trained on another base model than {base}: {difference}", place=place
        )
