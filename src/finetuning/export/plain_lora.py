"""Write a LoRA whose initialization changed the base model as one that belongs to the unchanged base.

PiSSA and the like subtract the initial adapter A_0, B_0 from the base's weights W. The trained model is

    W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0],

which is a plain LoRA of twice the rank with the same scaling factor s. PEFT converts likewise
(`path_initial_model_for_weight_conversion`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import ModelError, reading
from finetuning.export.inputs import Adapter, BaseModel, read_adapter
from finetuning.export.merge.deltas import scaling_of
from finetuning.model.peft.lora_support import lora_init
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS, read_header

if TYPE_CHECKING:
    import torch


def convert_to_plain_lora(adapter: Adapter, initial: Mapping[str, torch.Tensor], folder: Path) -> Adapter:
    """Return the adapter as a plain LoRA, with its tensors in a file in `folder`.

    Args:
        initial: the tensors of the adapter before training.

    Raises:
        ModelError: `initial` has other tensors, or no single config describes the result.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = dict(adapter.config)
    if config.get("use_rslora") and (config.get("rank_pattern") or config.get("alpha_pattern")):
        raise ModelError(
            f"{adapter.folder} has use_rslora with rank_pattern or alpha_pattern: no plain LoRA has the same factors"
        )
    trained = load_file(adapter.folder / ADAPTER_WEIGHTS)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in trained.items():
        if ".lora_embedding_" in name:
            raise ModelError(f"{adapter.folder} adapts embeddings ({name}), which cannot be converted")
        if ".lora_A." not in name and ".lora_B." not in name:
            tensors[name] = tensor
            continue
        start = initial.get(name)
        if start is None or start.shape != tensor.shape:
            problem = "no such tensor" if start is None else f"shape {list(start.shape)}"
            raise ModelError(
                f"the initial adapter does not belong to {adapter.folder}: for {name} of shape {list(tensor.shape)} it"
                f" has {problem}"
            )
        start = start.to(tensor.dtype)
        tensors[name] = torch.cat([tensor, start], 0) if ".lora_A." in name else torch.cat([tensor, -start], 1)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)
    rank, factor = scaling_of({**config, "rank_pattern": {}, "alpha_pattern": {}}, "")
    alpha = factor * 2 * rank
    config |= {
        "init_lora_weights": True,
        "use_rslora": False,
        "r": 2 * rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
    }
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field)
        if isinstance(patterns, Mapping):
            config[field] = {name: 2 * value for name, value in patterns.items()}
    return replace(adapter, config=config, entries=read_header(folder / ADAPTER_WEIGHTS))


def find_initial_adapter(
    adapter: Adapter, base: BaseModel | None, initial_name: str | None
) -> Mapping[str, torch.Tensor] | None:
    """Return the tensors of the adapter before training; None if they are not known.

    Args:
        base: the base model. PiSSA and OLoRA are computed from its weights alone, as they are when PEFT loads the
            adapter.
        initial_name: the initial adapter, saved before training.

    Raises:
        ModelError: the initial adapter is missing or damaged, or the adapter does not fit the base.
    """
    if initial_name is not None:
        from safetensors.torch import load_file

        saved = read_adapter(initial_name)
        return load_file(saved.folder / ADAPTER_WEIGHTS)
    init = lora_init(adapter.config)
    if base is None or not (init.is_repeated and init.is_convertible):
        return None
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    from finetuning.export.merge.with_peft import load_base

    with reading(f"the adapter {adapter.folder} does not fit the base"):
        config = PeftConfig.from_pretrained(str(adapter.folder))
        model = get_peft_model(load_base(base, [adapter]), config)
    return {
        name: tensor.detach().cpu()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
