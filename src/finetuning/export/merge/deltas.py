"""What an adapter does to each tensor of its base, read from names, shapes and configs; no weight is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetuning.errors import ModelError
from finetuning.export.inputs import Adapter
from finetuning.export.safetensors_writer import same_bytes
from finetuning.model.safetensors_io import TensorEntry

# r rank, O out_features, I in_features, V vocabulary, H hidden


@dataclass(frozen=True)
class ReplaceWeight:
    """The tensor becomes that of the adapter: modules_to_save, trained biases, saved embeddings."""

    value: TensorEntry


@dataclass(frozen=True)
class LowRankUpdate:
    """LoRA: `scaling * B_Or @ A_rI` is added; transposed where the base stores its weight as (I, O) or (V, H)."""

    a: TensorEntry
    b: TensorEntry
    scaling: float
    transposed: bool
    magnitude: TensorEntry | None = None
    """DoRA's vector, to whose length each output is brought."""
    is_embedding: bool = False


@dataclass(frozen=True)
class BiasUpdate:
    """`scaling * value` is added: the bias of LoRA's B."""

    value: TensorEntry
    scaling: float


@dataclass(frozen=True)
class ReplaceRows:
    """The rows of some tokens become those of the adapter."""

    value: TensorEntry
    rows: tuple[int, ...]


WeightDelta = ReplaceWeight | LowRankUpdate | BiasUpdate | ReplaceRows


@dataclass(frozen=True)
class NeedsPeft:
    """Why an adapter is not merged by streaming."""

    reason: str

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"merging in memory with PEFT: {self.reason}",)


PREFIX = "base_model.model."
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
VARIANTS = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapted parameters (fused experts)",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_LOW_RANK = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<kind>\.weight|)$")
_LOW_RANK_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias$")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?$")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")


def needs_peft(adapter: Adapter) -> NeedsPeft | None:
    """Why this adapter's kind must be merged by PEFT, from its config alone; None for what streaming knows."""
    config = adapter.config
    if adapter.pickled:
        return NeedsPeft("its weights are pickled")
    if adapter.peft_type != "LORA":
        return NeedsPeft(f"it is of type {adapter.peft_type}")
    for field, label in VARIANTS.items():
        if config.get(field):
            return NeedsPeft(f"it uses {label}")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        return NeedsPeft(f"init_lora_weights: {init} changes the base before the adapter is added")
    return None


def read_deltas(adapter: Adapter, model_type: str) -> dict[str, list[WeightDelta]] | NeedsPeft:
    """The edits of each tensor, by the tensor's name in the model (without PEFT's prefix), in the order of doing.

    Raises:
        ModelError: half of a pair is missing, or a shape contradicts the config.
    """
    reason = needs_peft(adapter)
    if reason is not None:
        return reason
    parts: dict[str, dict[str, TensorEntry]] = {}
    edits: dict[str, list[WeightDelta]] = {}
    for key, entry in adapter.entries.items():
        if not key.startswith(PREFIX):
            return NeedsPeft(f"its tensor {key} does not have PEFT's usual name")
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
            edits.setdefault(f"{match['module']}.weight", []).append(ReplaceRows(entry, rows))
        elif "lora_" in name or "trainable_tokens" in name:
            return NeedsPeft(f"its tensor {key} is of a kind that streaming does not know")
        elif not _is_repeated(name, entry, adapter.entries):
            edits.setdefault(unwrapped_name(name), []).insert(0, ReplaceWeight(entry))
    if any(
        len(part.shape) != 2 for pair in parts.values() for kind, part in pair.items() if kind in ("lora_A", "lora_B")
    ):
        return NeedsPeft("it adapts convolutions")
    _add_low_rank(adapter, model_type, parts, edits)
    mixed = [name for name, todo in edits.items() if {ReplaceRows, LowRankUpdate} <= {type(edit) for edit in todo}]
    return NeedsPeft(f"{mixed[0]} has both LoRA and trained tokens") if mixed else edits


def unwrapped_name(name: str) -> str:
    """The name of a whole tensor without the wrappers that PEFT puts round the module that holds it."""
    for wrapper in (".token_adapter", ".base_layer", ".modules_to_save"):
        name = name.replace(f"{wrapper}.", ".")
    return name


def _is_repeated(name: str, entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> bool:
    """True for what PEFT saves beside the trained tensor when the vocabulary has grown: what it was, and it again."""
    if ".original_module." in name:
        return True
    again = entries.get(PREFIX + unwrapped_name(name))
    return ".modules_to_save." in name and again is not None and same_bytes(again, entry)


def _add_low_rank(
    adapter: Adapter,
    model_type: str,
    parts: Mapping[str, Mapping[str, TensorEntry]],
    edits: dict[str, list[WeightDelta]],
) -> None:
    for module, pair in parts.items():
        if "lora_A" not in pair or "lora_B" not in pair:
            present = next(iter(pair))
            raise ModelError(
                f"{adapter.folder}: {module} has {present} without its counterpart; it was not saved whole"
            )
        a, b = pair["lora_A"], pair["lora_B"]
        rank, scaling = scaling_of(adapter.config, module)
        if a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise ModelError(
                f"{adapter.folder}: {module} has A of {list(a.shape)} and B of {list(b.shape)},"
                f" which does not fit rank {rank} of its config"
            )
        is_embedding = "embedding" in pair
        transposed = is_embedding or bool(adapter.config.get("fan_in_fan_out")) or model_type in _CONV1D_MODELS
        edit = LowRankUpdate(a, b, scaling, transposed, pair.get("magnitude"), is_embedding)
        edits.setdefault(f"{module}.weight", []).append(edit)
        if "bias" in pair:
            edits.setdefault(f"{module}.bias", []).append(BiasUpdate(pair["bias"], scaling))


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and factor of one module, with the patterns that give single modules their own.

    Source: peft@0.21 tuners/lora/model.py and layer.py: the first pattern that ends the name wins.
    """
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _token_rows(config: Mapping[str, Any], module: str, entry: TensorEntry) -> tuple[int, ...]:
    """The token ids whose rows `entry` holds, in its order.

    Raises:
        ModelError: the config does not say which, or says another number of them.
    """
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((ids for key, ids in indices.items() if module == key or module.endswith(f".{key}")), None)
    if not isinstance(indices, Sequence) or len(indices) != entry.shape[0]:
        raise ModelError(f"the adapter's config does not say which tokens the {entry.shape[0]} rows of {module} are")
    return tuple(int(index) for index in indices)
