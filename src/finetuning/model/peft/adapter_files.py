"""Check saved adapters: their tensors against those in memory, their base model, and whether they can be merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuning.errors import Location, ModelError, read_json_object, reading
from finetuning.model.fingerprint import (
    check_adapter_fingerprint,
    compute_fingerprint,
    describe_difference,
    read_fingerprint,
)
from finetuning.model.peft.lora_support import OPTIONS, TURNED_OFF, WITHOUT_LORA, lora_init, unservable_modules
from finetuning.model.safetensors_io import (
    ADAPTER_WEIGHTS,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    read_header,
    read_model_headers,
    shared_by_layers,
)

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
_PREFIX = "base_model.model."
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


def live_lora_tensors(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Return the LoRA tensors on the model itself, by the names they are saved under; {} for other adapters.

    Read from the model's parameters rather than by PEFT's function, which wrote the file: a tensor that it leaves out
    or takes for another one differs from the file here.
    """
    if str(getattr(model.peft_config[adapter].peft_type, "value", "")) != "LORA":
        return {}
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        module, _, part = name.rpartition(".lora_")
        words = part.split(".")
        if words[1:2] != [adapter]:
            continue
        words.remove(adapter)
        if words == ["magnitude_vector", "weight"]:
            # PEFT's file format keeps the name that DoRA's vector had before it became a module.
            words.pop()
        tensors[f"{module}.lora_{'.'.join(words)}"] = weight
    return tensors


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
    """Check that the adapter on the model has the tensors of the adapter's file, and their values.

    PEFT loads a file with missing or extra tensors without an error, for example one trained on a model with another
    number of layers.

    Raises:
        ModelError: the file has missing or extra tensors, or other shapes; or a value was not loaded.
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
    restore_lora_tensors(model, folder, location)


def restore_lora_tensors(model: PeftModel, folder: Path, location: Location | None = None) -> None:
    """Copy the LoRA tensors that PEFT left at their initial values from the adapter's file, and compare all of them.

    On loading, PEFT renames tensors by transformers' conversion of the architecture. For some classes (Laguna,
    Inkling 2) that gives names which the model does not have, and PEFT drops these tensors without an error.

    Raises:
        ModelError: a tensor in memory differs from the file's.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return
    from safetensors.torch import load_file

    stored = {name: tensor for name, tensor in load_file(file).items() if ".lora_" in name}
    with torch.no_grad():
        for name, tensor in _differing(model, stored).items():
            # The tensors of a state dict share the memory of the model's.
            tensor.copy_(stored[name])
    remaining = sorted(_differing(model, stored))
    if remaining:
        raise ModelError(
            f"PEFT does not load {remaining[0]} of the adapter {folder} onto this model ({len(remaining)} tensors)",
            location=location,
        )


def _differing(model: PeftModel, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors in memory that differ from the stored ones of the same name and shape."""
    return {
        name: tensor
        for name, tensor in adapter_state_dict(model).items()
        if name in stored
        and tensor.shape == stored[name].shape
        and not (tensor.is_meta or hasattr(tensor, "ds_shape"))
        and not torch.equal(tensor.cpu(), stored[name].to(tensor.dtype))
    }


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


def mergeable_type(folder: Path, base: Path | None = None) -> str | None:
    """Return the PEFT type of a saved adapter that can be merged into its base model; None for other adapters.

    Args:
        base: the base model's folder. If it has no weights here, whether the adapter fits it is not checked.
    """
    config = _read_adapter_config(folder)
    peft_type = str(config.get("peft_type")).upper()
    try:
        check_mergeable(folder, config)
    except ModelError:
        return None
    if base is not None and _has_weights(base):
        names, stored = read_header(folder / ADAPTER_WEIGHTS), read_model_headers(base)
        modules = [(name.removeprefix(_PREFIX).rpartition(".lora_")[0], name) for name in names if ".lora_" in name]
        beft = [name.removeprefix(_PREFIX).removesuffix(".beft_bias") for name in names if name.endswith(".beft_bias")]
        # A bias is added to the base's, which has to have one, or to be built with one.
        with_bias = [name.removesuffix(".bias") for name in stored if name.endswith(".bias")]
        if not all(any(module.endswith(layer) for layer in with_bias) for module in beft):
            return None
        biased = lora_biases(names)
        lacking = [module for module in biased if not any(module.endswith(layer) for layer in with_bias)]
        if lacking and not _can_have_biases(base, lacking):
            return None
        if shared_by_layers((f"{module}.weight" for module, _ in modules), stored):
            return None
    return peft_type


def lora_biases(names: Iterable[str]) -> list[str]:
    """Return the modules to which tensors of an adapter, by their names, add a bias of LoRA."""
    end = ".lora_B.bias"
    return [name.removeprefix(_PREFIX).removesuffix(end) for name in names if name.endswith(end)]


def _can_have_biases(base: Path, modules: Sequence[str]) -> bool:
    """Whether a base model can be built so that these modules have a bias."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetuning.model.peft.module_names import fields_that_add_biases

    with reading(f"{base / 'config.json'} cannot be read"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    return fields_that_add_biases(model, modules) is not None


def is_servable(folder: Path, base: Path) -> bool:
    """Whether vLLM serves a trained adapter, converted if need be, by its config and the names of its tensors.

    The conversion compares values as well: an untrained tensor that is the base's is dropped.
    """
    config = _read_adapter_config(folder)
    if str(config.get("peft_type")).upper() != "LORA":
        return False
    if config.get("init_lora_weights", True) is not True:
        init = lora_init(config)
        if init.changes_base and not (init.is_convertible and init.is_repeated and _has_weights(base)):
            return False
    unsupported = (option for option in OPTIONS if option.vllm != "yes")
    is_plain = all(config.get(option.field) in (*TURNED_OFF, option.unused) for option in unsupported)
    names = read_header(folder / ADAPTER_WEIGHTS)
    if not is_plain or not all(".lora_" in name for name in names):
        return False
    if not (base / "config.json").is_file():
        return True
    embeddings = [name.partition(".lora_")[0] for name in names if ".lora_embedding_A" in name or "lm_head." in name]
    with reading(f"{base / 'config.json'} cannot be read"):
        base_config = read_json_object(base / "config.json")
        architectures = base_config.get("architectures") or [""]
        # Only embeddings and output heads depend on what vLLM declares for the architecture.
        if not embeddings and str(architectures[0]).removesuffix("ForCausalLM") not in WITHOUT_LORA:
            return True
        return not unservable_modules(embeddings, base_config)


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    with reading(f"{folder / 'adapter_config.json'} cannot be read"):
        return read_json_object(folder / "adapter_config.json")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
