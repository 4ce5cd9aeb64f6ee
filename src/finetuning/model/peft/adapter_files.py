"""Check saved adapters: their tensors against those in memory, their base model, and whether they can be merged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuning.errors import Location, ModelError, read_json_object, reading
from finetuning.model.fingerprint import (
    check_adapter_fingerprint,
    compute_fingerprint,
    describe_difference,
    read_fingerprint,
)
from finetuning.model.peft.lora_support import lora_init
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS, read_header

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs

# Adapters whose change of the weights depends on the input, so that no fixed weights are equivalent.
_INPUT_DEPENDENT = {
    "LILY": "a router chooses its weights for each token",
    "POLY": "its weights are mixed for the task of each row",
    "SHADOW": "what it adds to a layer is computed from each input",
    "XLORA": "it mixes several adapters for each token",
}
# PEFT may save whole embeddings with an adapter when the vocabulary was resized.
EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def is_peft_model(model: object) -> TypeIs[PeftModel]:
    """Whether a model has a PEFT adapter; by its attributes, so that PEFT need not be imported."""
    return hasattr(model, "peft_config") and hasattr(model, "active_peft_config")


def adapter_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *,
    adapter: str | None = None,
    embeddings: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter, by the names they are saved under.

    Args:
        state_dict: the gathered weights of a sharded model; the model's own by default.
        adapter: name of the adapter; the active one by default.
        embeddings: whether to include the whole embeddings, which PEFT saves with some adapters.
    """
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(
        model,
        state_dict=None if state_dict is None else dict(state_dict),
        adapter_name=adapter or model.active_adapters[0],
        save_embedding_layers=embeddings,
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
    """Check that the adapter in `folder` is the one that was saved, and was trained on this base model.

    Both only as far as the adapter has a fingerprint of itself and of its base.

    Raises:
        ModelError: a fingerprint is another one.
    """
    check_adapter_fingerprint(folder)
    base = Path(getattr(model.config, "_name_or_path", "") or "")
    recorded = read_fingerprint(folder)
    if recorded is None or not (base / "config.json").is_file():
        return
    difference = describe_difference(recorded, compute_fingerprint(base))
    if difference:
        raise ModelError(
            f"the adapter {folder} was trained on another base model than {base}: {difference}", location=location
        )


def check_mergeable(folder: Path, config: Mapping[str, object]) -> None:
    """Raise ModelError if the adapter in `folder`, with this `adapter_config.json`, cannot be merged into weights."""
    peft_type = str(config.get("peft_type", "")).upper()
    if peft_type in _INPUT_DEPENDENT:
        raise unmergeable(peft_type, _INPUT_DEPENDENT[peft_type])
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    known_type = PeftType.__members__.get(peft_type)
    if known_type is None or known_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(f"{folder} is of type {peft_type}, which the installed PEFT does not support")
    with reading(f"{folder / 'adapter_config.json'} cannot be read"):
        peft_config = PeftConfig.from_pretrained(str(folder))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(known_type)
    if peft_config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise unmergeable(peft_type, "it changes the input or the layers, not the weights")
    if getattr(peft_config, "alora_invocation_tokens", None):
        raise unmergeable(peft_type, "activated LoRA is switched on by tokens at run time")
    if peft_type != "LORA" or config.get("init_lora_weights", True) is True:
        return
    init = lora_init(config)
    if init.changes_base and not init.is_repeated:
        raise ModelError(
            f"{folder} cannot be merged: {init.label} changed the base's weights in training, and loading the"
            " adapter does not repeat the change.",
            hint="Convert it first, with the initial adapter that was saved before training:"
            f" create_vllm_compatible_adapter {folder} --initial-adapter INITIAL --output OUT.",
        )


def unmergeable(peft_type: str, reason: str, target: str = "") -> ModelError:
    """Return the error for an adapter that cannot be merged."""
    return ModelError(
        f"an adapter of type {peft_type} cannot be merged{target and ' ' + target}: {reason.rstrip('.')}.",
        hint="Serve base model and adapter unmerged, with PEFT.",
    )


def mergeable_type(folder: Path) -> str | None:
    """Return the PEFT type of a saved adapter that can be merged into its base model; None for other adapters."""
    with reading(f"{folder / 'adapter_config.json'} cannot be read"):
        config = read_json_object(folder / "adapter_config.json")
    try:
        check_mergeable(folder, config)
    except ModelError:
        return None
    return str(config.get("peft_type")).upper()
