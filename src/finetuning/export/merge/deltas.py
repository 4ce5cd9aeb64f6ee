"""Derive what an adapter changes in each tensor of its base from names, shapes and config, without loading weights.

Only LoRA and whole trained tensors are understood. `NeedsPeft` names the reason for everything else, which PEFT merges
in memory (`with_peft.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from finetuning.errors import ModelError
from finetuning.export.inputs import Adapter
from finetuning.export.safetensors_writer import same_bytes
from finetuning.model.peft.lora_support import lora_init, used_options
from finetuning.model.safetensors_io import TensorEntry

_Number = TypeVar("_Number", int, float)

# Suffixes of tensor names: r rank, O out_features, I in_features, V vocabulary, H hidden.


@dataclass(frozen=True)
class ReplaceWeight:
    """Replace the tensor by the adapter's: modules_to_save, trained biases, saved embeddings."""

    value: TensorEntry


@dataclass(frozen=True)
class LowRankUpdate:
    """LoRA: add `scaling * B_Or @ A_rI`, transposed if the base stores the weight as (I, O) or (V, H)."""

    a: TensorEntry
    b: TensorEntry
    scaling: float
    transposed: bool
    magnitude: TensorEntry | None = None
    """DoRA's magnitude vector (O): the norm of each output feature after the merge."""
    is_embedding: bool = False


@dataclass(frozen=True)
class BiasUpdate:
    """Add `scaling * value` to a bias: the bias of LoRA's B."""

    value: TensorEntry
    scaling: float


@dataclass(frozen=True)
class ReplaceRows:
    """Replace the rows of some tokens by the adapter's."""

    value: TensorEntry
    rows: tuple[int, ...]


WeightDelta = ReplaceWeight | LowRankUpdate | BiasUpdate | ReplaceRows


@dataclass(frozen=True)
class NeedsPeft:
    """Why an adapter cannot be merged tensor by tensor."""

    reason: str

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"merging in memory with PEFT: {self.reason}",)


PREFIX = "base_model.model."
"""PEFT's prefix of tensor names."""
# Models with transformers' Conv1D layers, which store the weight as (in_features, out_features).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_LOW_RANK = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<kind>\.weight|)$")
_LOW_RANK_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias$")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?$")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")


def needs_peft(adapter: Adapter) -> NeedsPeft | None:
    """Return why PEFT must merge this adapter, judged by its config alone; None if it can be streamed."""
    config = adapter.config
    if adapter.pickled:
        return NeedsPeft("its weights are pickled")
    if adapter.peft_type != "LORA":
        return NeedsPeft(f"it is of type {adapter.peft_type}")
    for option in used_options(config):
        if not option.is_streamed:
            return NeedsPeft(f"it uses {option.label}")
    if lora_init(config).changes_base:
        init = config["init_lora_weights"]
        return NeedsPeft(f"init_lora_weights: {init} changes the base before the adapter is added")
    return None


def read_deltas(adapter: Adapter, model_type: str) -> dict[str, list[WeightDelta]] | NeedsPeft:
    """Return the deltas of each tensor in the order to apply them, by the tensor's name in the model.

    Raises:
        ModelError: half of a LoRA pair is missing, or a shape contradicts the config.
    """
    reason = needs_peft(adapter)
    if reason is not None:
        return reason
    parts: dict[str, dict[str, TensorEntry]] = {}
    deltas: dict[str, list[WeightDelta]] = {}
    for key, entry in adapter.entries.items():
        if not key.startswith(PREFIX):
            return NeedsPeft(f"the name of its tensor {key} does not follow PEFT's scheme")
        name = key.removeprefix(PREFIX)
        if match := _LOW_RANK.match(name):
            parts.setdefault(match["module"], {})[match["part"].replace("lora_embedding", "lora")] = entry
            if match["part"].startswith("lora_embedding"):
                parts[match["module"]]["embedding"] = entry
        elif match := _LOW_RANK_BIAS.match(name):
            parts.setdefault(match["module"], {})["bias"] = entry
        elif match := _MAGNITUDE.match(name):
            parts.setdefault(match["module"], {})["magnitude"] = entry
        elif match := _TOKENS.match(name):
            rows = _token_rows(adapter.config, match["module"], entry)
            deltas.setdefault(f"{match['module']}.weight", []).append(ReplaceRows(entry, rows))
        elif "lora_" in name or "trainable_tokens" in name:
            return NeedsPeft(f"its tensor {key} is of a kind that cannot be streamed")
        elif not _is_redundant(name, entry, adapter.entries):
            # First, so that a LoRA on the same tensor is added to the replaced weight.
            deltas.setdefault(unwrapped_name(name), []).insert(0, ReplaceWeight(entry))
    if any(
        len(part.shape) != 2 for pair in parts.values() for kind, part in pair.items() if kind in ("lora_A", "lora_B")
    ):
        return NeedsPeft("it adapts convolutions")
    _add_low_rank(adapter, model_type, parts, deltas)
    mixed = [n for n, items in deltas.items() if {ReplaceRows, LowRankUpdate} <= {type(item) for item in items}]
    return NeedsPeft(f"{mixed[0]} has both LoRA and trained tokens") if mixed else deltas


def unwrapped_name(name: str) -> str:
    """Return a tensor's name without the PEFT wrappers around its module."""
    for wrapper in (".token_adapter", ".base_layer", ".modules_to_save"):
        name = name.replace(f"{wrapper}.", ".")
    return name


def _is_redundant(name: str, entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether PEFT saved this tensor in addition to the trained one, as it does when the vocabulary was resized.

    That is the original tensor, and a second copy of the trained one.
    """
    if ".original_module." in name:
        return True
    copy = entries.get(PREFIX + unwrapped_name(name))
    return ".modules_to_save." in name and copy is not None and same_bytes(copy, entry)


def _add_low_rank(
    adapter: Adapter,
    model_type: str,
    parts: Mapping[str, Mapping[str, TensorEntry]],
    deltas: dict[str, list[WeightDelta]],
) -> None:
    for module, pair in parts.items():
        if "lora_A" not in pair or "lora_B" not in pair:
            present = next(iter(pair))
            raise ModelError(
                f"{adapter.folder}: {module} has {present} without its counterpart: it was not saved completely"
            )
        a, b = pair["lora_A"], pair["lora_B"]
        rank, scaling = scaling_of(adapter.config, module)
        if a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise ModelError(
                f"{adapter.folder}: {module} has A of shape {list(a.shape)} and B of shape {list(b.shape)},"
                f" which does not fit rank {rank} of its config"
            )
        is_embedding = "embedding" in pair
        transposed = is_embedding or bool(adapter.config.get("fan_in_fan_out")) or model_type in _CONV1D_MODELS
        update = LowRankUpdate(a, b, scaling, transposed, pair.get("magnitude"), is_embedding)
        deltas.setdefault(f"{module}.weight", []).append(update)
        if "bias" in pair:
            deltas.setdefault(f"{module}.bias", []).append(BiasUpdate(pair["bias"], scaling))


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return rank and scaling factor of a module, with its own rank and alpha if a pattern matches.

    The factor is alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (https://arxiv.org/abs/2312.03732). The first
    pattern that matches the end of the name wins. Source: peft 0.21, tuners/lora/model.py and layer.py.
    """
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _token_rows(config: Mapping[str, object], module: str, entry: TensorEntry) -> tuple[int, ...]:
    """Return the token ids of the rows in `entry`, in order.

    Raises:
        ModelError: the config does not list them, or lists another number.
    """
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((ids for key, ids in indices.items() if module == key or module.endswith(f".{key}")), None)
    if not isinstance(indices, Sequence) or len(indices) != entry.shape[0]:
        raise ModelError(f"the adapter's config does not list the tokens of the {entry.shape[0]} rows of {module}")
    return tuple(int(index) for index in indices)
