"""Merge in memory with PEFT what cannot be streamed: other adapter types, quantized bases, fused experts.

Also loads base and adapter for verification.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.pretrained_config import find_excessive_size
from finetuning.errors import ModelError, reading
from finetuning.export.inputs import Adapter, BaseModel
from finetuning.export.merge.apply import ChangedElements, is_rounded
from finetuning.export.merge.deltas import unwrapped_name
from finetuning.export.merge.merge_plan import is_embedding_weight
from finetuning.model.peft.adapter_files import check_mergeable, lora_biases, restore_lora_tensors, unmergeable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finetuning.model.load import TaskHead

DeviceMap = str | dict[str, int | str] | None
_HEAD_WEIGHTS = ("score.weight", "classifier.weight")


def task_head_for_merge(base: BaseModel, adapters: Sequence[Adapter]) -> TaskHead:
    """Return the task head of the merged model; a reward model's adapter has its own."""
    from finetuning.model.load import SEQUENCE_CLASSIFICATION, task_head_for

    if any(adapter.task_type == "SEQ_CLS" for adapter in adapters):
        return SEQUENCE_CLASSIFICATION
    return task_head_for(base.config.get("architectures") or ())


def load_base(
    base: BaseModel,
    adapters: Sequence[Adapter] = (),
    *,
    device_map: DeviceMap = None,
    quantization: Mapping[str, object] | None = None,
    dequantize: bool = True,
) -> PreTrainedModel:
    """Load the base in the dtype of its files, dequantized, with the task head that the adapters need.

    Args:
        quantization: how to quantize a base whose files are not quantized, as in a `config.json`.
        dequantize: whether to dequantize it again; otherwise it computes as in training.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    from finetuning.model.embeddings import input_weight
    from finetuning.model.quantization import prepare_quantized_model
    from finetuning.model.saved_weights import restore_padding_rows

    head = task_head_for_merge(base, adapters)
    heads = [entry for adapter in adapters for name, entry in adapter.entries.items() if name.endswith(_HEAD_WEIGHTS)]
    fields = {"num_labels": heads[-1].shape[0]} if "num_labels" in head.config_fields and heads else {}
    excess = find_excessive_size(base.config, len(base.entries) or None)
    if excess:
        raise ModelError(f"{base.folder / 'config.json'} cannot be right: {excess}")
    with reading(f"{base.folder} cannot be loaded"):
        options: dict[str, object] = {**fields, **_bias_fields(base.folder, head, adapters)}
        if quantization is not None:
            options["quantization_config"] = AutoQuantizationConfig.from_dict(dict(quantization))
        model = head.auto_class.from_pretrained(
            base.folder, dtype="auto", device_map=device_map, use_safetensors=not base.pickled, **options
        )
    if not base.pickled:
        restore_padding_rows(model, base.folder)
    config = quantization or base.config.get("quantization_config")
    if config and not dequantize:
        model = prepare_quantized_model(model)
    elif config:
        try:
            model = _without_quantizer(model.dequantize())
        except (NotImplementedError, ValueError) as error:
            method = config.get("quant_method", "its method")
            reason = "" if isinstance(error, NotImplementedError) else f": {_first_two_lines(error)}"
            raise ModelError(
                f"{base.folder} is quantized with {method}, which cannot be dequantized{reason}",
                hint="Merge into the unquantized base model.",
            ) from error
    rows = _max_embedding_rows(adapters)
    if rows > input_weight(model).shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def _bias_fields(folder: Path, head: TaskHead, adapters: Sequence[Adapter]) -> dict[str, bool]:
    """Return the config fields that give a base the biases, of zeros, to which adapters add their own (`lora_bias`)."""
    biased = lora_biases(name for adapter in adapters for name in adapter.entries)
    if not biased:
        return {}
    import torch
    from transformers import AutoConfig

    from finetuning.model.peft.module_names import fields_that_add_biases

    with torch.device("meta"):
        model = head.auto_class.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return fields_that_add_biases(model, biased) or {}


def _max_embedding_rows(adapters: Sequence[Adapter]) -> int:
    """Return the largest number of rows of whole embeddings in the adapters; 0 if they contain none."""
    return max(
        (
            entry.shape[0]
            for adapter in adapters
            for name, entry in adapter.entries.items()
            if name.endswith(".weight") and is_embedding_weight(unwrapped_name(name)) and len(entry.shape) == 2
        ),
        default=0,
    )


def _without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Return a new model with the same weights: transformers saves a model that was loaded quantized only as such."""
    config = copy.deepcopy(model.config)
    plain = type(model)._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def load_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Return the model with the adapter on it, unmerged, in evaluation mode.

    Raises:
        ModelError: the adapter does not fit this model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    hint = "Is this the base model that it was trained on?"
    with reading(f"the adapter {adapter.folder} does not fit the base", hint=hint):
        adapted = PeftModel.from_pretrained(model, str(adapter.folder))
    if adapter.entries:
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        missing = sorted(expected - set(adapter.entries))
        if missing and len(missing) == len(expected):
            raise ModelError(f"the adapter {adapter.folder} does not fit this base: it has none of its tensors")
        if missing:
            raise ModelError(
                f"the adapter {adapter.folder} has no tensors for {missing[0]} and {len(missing) - 1} more of the base"
            )
    restore_lora_tensors(adapted, adapter.folder)
    return adapted.eval()


def merge_in_memory(
    model: PreTrainedModel, adapters: Sequence[Adapter], elements: ChangedElements | None = None
) -> PreTrainedModel:
    """Return the model with all adapters merged, one after the other.

    Args:
        elements: counts what rounding loses.

    Raises:
        ModelError: an adapter does not fit or cannot be merged.
    """
    for adapter in adapters:
        adapted = load_adapter(model, adapter)
        try:
            if elements is not None:
                _count_changed_elements(adapted, elements)
            model = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError, RuntimeError, TypeError) as error:
            raise unmergeable(adapter.peft_type, _first_two_lines(error), "into this base") from error
    return model


def _count_changed_elements(adapted: PeftModel, elements: ChangedElements) -> None:
    """Count what the merge changes by merging a copy of each layer in float32, one at a time."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in adapted.modules():
        if not isinstance(layer, BaseTunerLayer) or not isinstance(layer, torch.nn.Module):
            continue
        weights = {
            name: weight
            for name, weight in layer.get_base_layer().named_parameters()
            if is_rounded(weight.dtype) and "lora_" not in name
        }
        if not weights:
            continue
        exact: Any = copy.deepcopy(layer).float()
        exact.merge(safe_merge=True)
        merged = dict(exact.get_base_layer().named_parameters())
        for name, weight in weights.items():
            changed = merged[name] != weight.float()
            elements.count(changed, weight, merged[name].to(weight.dtype))


def merge_with_peft(
    base: BaseModel,
    adapters: Sequence[Adapter],
    folder: Path,
    tokenizer: Path | None = None,
    device_map: DeviceMap = None,
    quantization: Mapping[str, object] | None = None,
) -> tuple[int, ChangedElements]:
    """Merge in memory, and save weights and config to `folder`.

    Args:
        quantization: how the base is quantized, and dequantized again, before it is merged into.

    Returns:
        The rows of the input embeddings; how many elements change, and how many of the changes survive rounding.
    """
    from finetuning.model.embeddings import input_weight

    for adapter in adapters:
        check_mergeable(adapter.folder, adapter.config)
    elements = ChangedElements()
    model = load_base(base, adapters, device_map=device_map, quantization=quantization)
    model = merge_in_memory(model, adapters, elements)
    if not model.can_generate() and tokenizer is not None and model.config.pad_token_id is None:
        from transformers import AutoTokenizer

        # transformers takes the score at the last token that is not padding, so the config must name the padding id.
        model.config.pad_token_id = AutoTokenizer.from_pretrained(tokenizer).pad_token_id
    model.save_pretrained(folder)
    return input_weight(model).shape[0], elements


def _first_two_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
