"""The merge of what only PEFT knows how to merge: other types, quantised bases, fused experts, renamed weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.errors import ConfigError, ModelError
from finetuning.export.inputs import Adapter, BaseModel
from finetuning.export.merge.deltas import unwrapped_name
from finetuning.export.merge.merge_plan import is_embedding_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuning.model.load import TaskHead

DeviceMap = str | dict[str, Any] | None
_MADE_ANEW = {
    "LILY": "a router chooses its weights anew for each token",
    "POLY": "its weights are mixed anew for the task of each row",
    "SHADOW": "what it adds to a layer is computed anew from each input",
    "XLORA": "it mixes several adapters anew for each token",
}
_PLACED_BY_SIZE = (None, "auto", "balanced", "balanced_low_0", "sequential", "disk")
_HEAD_WEIGHTS = ("score.weight", "classifier.weight")


def check_device_map(device_map: DeviceMap) -> None:
    """Nothing, or a ConfigError when a device is none of this machine's."""
    import torch

    for device in device_map.values() if isinstance(device_map, dict) else [device_map]:
        if device in _PLACED_BY_SIZE:
            continue
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"--device_map: nothing can be put on {device!r}: {_first_line(error)}",
                hint="Say cpu, auto, or the name of a device that is here, such as cuda:0.",
            ) from error


def check_mergeable(adapter: Adapter) -> None:
    """Nothing, or a ModelError when adapters of this type cannot become part of a model's weights."""
    if adapter.peft_type in _MADE_ANEW:
        raise _unmergeable(adapter, _MADE_ANEW[adapter.peft_type])
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(adapter.peft_type)
    if kind is None:
        raise ModelError(f"{adapter.folder} is of type {adapter.peft_type}, which the installed PEFT does not know")
    config = PeftConfig.from_pretrained(str(adapter.folder))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(adapter.peft_type)
    if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise _unmergeable(adapter, "it adds to the input or the layers, not to the weights")
    if getattr(config, "alora_invocation_tokens", None):
        raise _unmergeable(adapter, "activated LoRA is switched on by tokens at run time")


def task_head_for_merge(base: BaseModel, adapters: Sequence[Adapter]) -> TaskHead:
    """The head of the merged model: an adapter for a reward model brings its own."""
    from finetuning.model.load import SEQUENCE_CLASSIFICATION, task_head_for

    if any(adapter.task_type == "SEQ_CLS" for adapter in adapters):
        return SEQUENCE_CLASSIFICATION
    return task_head_for(base.config.get("architectures") or ())


def load_base(base: BaseModel, adapters: Sequence[Adapter] = (), *, device_map: DeviceMap = None) -> PreTrainedModel:
    """The base model in the dtype of its files, with the head that the adapters need; a quantised one dequantised."""
    head = task_head_for_merge(base, adapters)
    heads = [entry for adapter in adapters for name, entry in adapter.entries.items() if name.endswith(_HEAD_WEIGHTS)]
    fields = {"num_labels": heads[-1].shape[0]} if "num_labels" in head.config_fields and heads else {}
    model = head.auto_class.from_pretrained(
        base.folder, dtype="auto", device_map=device_map, use_safetensors=not base.pickled, **fields
    )
    if base.config.get("quantization_config"):
        try:
            model = _as_if_never_quantised(model.dequantize())
        except (NotImplementedError, ValueError) as error:
            method = base.config["quantization_config"].get("quant_method", "its quantisation")
            why = "" if isinstance(error, NotImplementedError) else f": {_first_line(error)}"
            raise ModelError(
                f"{base.folder} is quantised by {method}, which cannot be dequantised{why}",
                hint="Merge into the unquantised base model.",
            ) from error
    rows = _grown_rows(adapters)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def _grown_rows(adapters: Sequence[Adapter]) -> int:
    """The most rows of whole embeddings that the adapters hold; 0 where they hold none."""
    return max(
        (
            entry.shape[0]
            for adapter in adapters
            for name, entry in adapter.entries.items()
            if name.endswith(".weight") and is_embedding_weight(unwrapped_name(name)) and len(entry.shape) == 2
        ),
        default=0,
    )


def _as_if_never_quantised(model: PreTrainedModel) -> PreTrainedModel:
    """A new model with the same weights: one that was loaded quantised cannot be saved as anything else."""
    config = copy.deepcopy(model.config)
    plain = type(model)._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def load_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with the adapter on top, not merged.

    Raises:
        ModelError: the adapter does not fit this model: a name or a shape.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        tuned = PeftModel.from_pretrained(model, str(adapter.folder))
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"the adapter {adapter.folder} does not fit the base: {_first_line(error)}.",
            hint="Is this the base model that it was trained on?",
        ) from error
    if adapter.entries:
        expected = {name for name in get_peft_model_state_dict(tuned, save_embedding_layers=False)}
        missing = sorted(expected - set(adapter.entries))
        if missing and len(missing) == len(expected):
            raise ModelError(f"the adapter {adapter.folder} has nothing for this base: none of its tensors has a place")
        if missing:
            raise ModelError(
                f"the adapter {adapter.folder} leaves out {missing[0]} and {len(missing) - 1} more of the base"
            )
    return tuned.eval()


def merge_in_memory(model: Any, adapters: Sequence[Adapter]) -> Any:
    """The model with all adapters merged, one after the other.

    Raises:
        ModelError: an adapter does not fit or cannot be merged.
    """
    for adapter in adapters:
        tuned = load_adapter(model, adapter)
        try:
            model = tuned.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError, RuntimeError, TypeError) as error:
            raise _unmergeable(adapter, _first_line(error), "into this base") from error
    return model


def merge_with_peft(
    base: BaseModel,
    adapters: Sequence[Adapter],
    folder: Path,
    tokenizer: Path | None = None,
    device_map: DeviceMap = None,
) -> int:
    """Writes the merged weights and config; returns the rows of the input embeddings."""
    for adapter in adapters:
        check_mergeable(adapter)
    model = merge_in_memory(load_base(base, adapters, device_map=device_map), adapters)
    if not model.can_generate() and tokenizer is not None and model.config.pad_token_id is None:
        from transformers import AutoTokenizer

        # A score is read at the last token that is no padding.
        model.config.pad_token_id = AutoTokenizer.from_pretrained(tokenizer).pad_token_id
    model.save_pretrained(folder)
    return model.get_input_embeddings().weight.shape[0]


def _unmergeable(adapter: Adapter, why: str, where: str = "") -> ModelError:
    return ModelError(
        f"an adapter of type {adapter.peft_type} cannot be merged{where and ' ' + where}: {why.rstrip('.')}.",
        hint="Serve it as it is, with PEFT: base model and adapter side by side.",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
