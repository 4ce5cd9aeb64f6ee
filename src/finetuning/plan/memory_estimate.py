"""Estimate the memory of weights, gradients and optimizer states from safetensors headers, without loading weights."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from finetuning.config.pretrained_config import find_excessive_size, left_out_of_all_linear, read_pretrained_config
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import BitsAndBytes, Dtype, NewPeft, NoPeft, TorchAO
from finetuning.errors import Location, ModelError, reading

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MODULE_KEYS = (
    "target_modules", "target_parameters", "modules_to_save", "exclude_modules", "feedforward_modules",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip
_DIFFERENT_MODULES = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "text_config", "vision_config",
)  # fmt: skip
"""Fields of a model's config that mean that its modules and the tensors of its checkpoint have different names."""
_ADAPTER_BYTES = 4
"""PEFT creates adapter weights in float32 even if the base model is in half precision."""
_PACKED = (".qweight", ".qzeros", ".g_idx")
_NO_LINEAR_LAYER = re.compile(r"embed|norm|conv1d|\bwte\b|\bwpe\b|a_log")
_HEADS = ("lm_head", "score", "classifier", "embed_out")
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device of weights, gradients and optimizer states, without activations and sharding.

    `parameters` and `trainable` are numbers of parameters. `trainable` is None if the size of the adapter cannot be
    computed from its config; gradients and optimizer states are then 0.
    """

    parameters: int
    trainable: int | None
    weights: int
    gradients: int
    optimizer: int

    def with_adapter(self, trainable: int) -> MemoryEstimate:
        """Return the estimate with an adapter of this many parameters, in float32."""
        size = trainable * _ADAPTER_BYTES
        weights = self.weights - (self.trainable or 0) * _ADAPTER_BYTES + size
        states = self.optimizer // self.gradients if self.gradients else 2
        return replace(self, trainable=trainable, weights=weights, gradients=size, optimizer=size * states)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def trained_bytes(self) -> int:
        """Bytes of the saved trainable weights; 0 if unknown."""
        return self.gradients

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: trainable weights and optimizer states; 0 if unknown."""
        return self.gradients + self.optimizer


Shapes = dict[str, tuple[list[int], int]]
"""Shape and bytes per element by tensor name."""


def read_shapes(folder: Path) -> Shapes:
    """Return shape and bytes per element of every tensor in the safetensors files of a folder; empty if unreadable.

    A safetensors file starts with the size of its JSON header as a little-endian 64-bit integer.
    """
    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < size <= _MAX_HEADER:
                return {}
            try:
                with reading(f"{file} cannot be read"):
                    header = json.loads(stream.read(size))
                    for name, entry in header.items():
                        if name != "__metadata__":
                            shapes[name] = ([int(size) for size in entry["shape"]], _BYTES.get(entry["dtype"], 2))
            except ModelError:
                return {}
    return shapes


def estimate_memory(experiment: Experiment, dtype: Dtype | None = None) -> MemoryEstimate | None:
    """Return the estimate for a model in a local folder; None for any other.

    Args:
        dtype: dtype to load the model in; that of the config by default.

    Raises:
        ModelError: its config.json asks for a model that no machine could build.
    """
    folder = Path(experiment.run_conf.model)
    shapes = read_shapes(folder) if folder.is_dir() else {}
    excess = find_excessive_size(read_pretrained_config(str(folder)) or {}, len(shapes) or None)
    if excess:
        raise ModelError(f"{folder / 'config.json'} cannot be right: {excess}", location=Location(key="run_conf.model"))
    if not shapes:
        return None
    forced = _DTYPE_BYTES.get(dtype or experiment.run_conf.model_args.dtype)
    counts = {
        name: (math.prod(shape), size if name.endswith(_PACKED) else forced or size)
        for name, (shape, size) in shapes.items()
    }
    parameters = sum(count for count, _ in counts.values())
    bits = _quantized_bits(experiment)
    weights = sum(
        count * bits // 8 if bits and len(shapes[name][0]) == 2 and "embed" not in name else count * size
        for name, (count, size) in counts.items()
    )
    trainable, trainable_size = _trainable(experiment, shapes, counts)
    states = 2 if "adam" in experiment.training_args.optim else 1
    return MemoryEstimate(
        parameters=parameters,
        trainable=trainable,
        weights=weights + (trainable or 0) * trainable_size * (not isinstance(experiment.peft_conf, NoPeft)),
        gradients=(trainable or 0) * trainable_size,
        optimizer=(trainable or 0) * trainable_size * states,
    )


def has_adapter_modules(experiment: Experiment) -> bool:
    """Return whether the headers of the checkpoint show that each module in `peft_kwargs` exists.

    False does not mean that one is missing: patterns, layer indices, and models whose modules differ from their tensors
    (mixtures of experts, which transformers fuses, and multimodal models) need the model itself.
    """
    conf = experiment.peft_conf
    if not isinstance(conf, NewPeft) or not any(key in conf.peft_kwargs for key in _MODULE_KEYS):
        return True
    requested: set[str] = set()
    for key in _MODULE_KEYS:
        value = conf.peft_kwargs.get(key)
        if value is not None and key not in ("target_modules", "modules_to_save"):
            return False
        if isinstance(value, str) and value != "all-linear":
            return False
        if isinstance(value, list):
            requested |= {str(name) for name in cast("list[object]", value)} - {"all-linear"}
    if not (read_pretrained_config(experiment.run_conf.model) or {}).keys().isdisjoint(_DIFFERENT_MODULES):
        return False
    if not requested:
        return True
    tensors = read_shapes(Path(experiment.run_conf.model))
    return requested <= {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in tensors}


def _quantized_bits(experiment: Experiment) -> int | None:
    if isinstance(experiment.quant_conf, TorchAO):
        return 8
    if not isinstance(experiment.quant_conf, BitsAndBytes):
        return None
    return 4 if experiment.quant_conf.load_in_4bit else 8


def _trainable(experiment: Experiment, shapes: Shapes, counts: Mapping[str, tuple[int, int]]) -> tuple[int | None, int]:
    """Return the number of trainable parameters and the bytes per parameter."""
    if isinstance(experiment.peft_conf, NoPeft):
        return sum(count for count, _ in counts.values()), max(size for _, size in counts.values())
    if not (isinstance(experiment.peft_conf, NewPeft) and experiment.peft_conf.peft_type == "LORA"):
        return None, _ADAPTER_BYTES
    kwargs = experiment.peft_conf.peft_kwargs
    targets, rank = kwargs.get("target_modules"), int(kwargs.get("r", 8))
    if isinstance(targets, list) and "all-linear" in targets:
        targets = "all-linear"
    total = 0
    has_experts = any("experts" in name.split(".") for name in shapes)
    if has_experts and targets == "all-linear":
        # Which of the experts' matrices are adapted, and with which rank, depends on how the model class fuses them.
        return None, _ADAPTER_BYTES
    for name, (shape, _) in shapes.items():
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        linear = len(shape) == 2 and name.endswith(".weight") and not _NO_LINEAR_LAYER.search(name.lower())
        if targets == "all-linear":
            chosen = module not in _HEADS and left_out_of_all_linear(name, has_experts=False) is None
        else:
            chosen = isinstance(targets, list) and module in targets
        if linear and chosen:
            total += rank * sum(shape)
    return total or None, _ADAPTER_BYTES
