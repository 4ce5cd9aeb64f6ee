"""What vLLM of today loads as an adapter, checked on names, shapes and bytes; no torch, no model.

Source: vllm 0.27, vllm/lora/peft_helper.py (config), lora_model.py and utils.py (names), vllm/config/lora.py (rank
steps). vLLM reads r, lora_alpha, use_rslora, use_dora, bias and modules_to_save and nothing else of the config, so what
other fields change (patterns, variants, trained tokens) would be lost there without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuning.export.inputs import Adapter, BaseModel
from finetuning.export.merge.deltas import PREFIX, VARIANTS, scaling_of
from finetuning.export.merge.merge_plan import has_tied_embeddings
from finetuning.export.safetensors_writer import read_chunks, same_bytes
from finetuning.model.safetensors_io import TensorEntry

RANK_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` takes."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<end>\.weight|)$")
_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass
class VllmCheck:
    """What stands between an adapter and vLLM."""

    kept: dict[str, TensorEntry] = field(default_factory=dict)
    """Tensors to be served, by the name that they must have."""
    dropped: list[str] = field(default_factory=list)
    """Tensors that say what the base says already, bit by bit."""
    config: dict[str, Any] = field(default_factory=dict)
    """The config that vLLM must read."""
    rank: int = 0
    blockers: list[str] = field(default_factory=list)
    """Why it cannot be served as an adapter without losing something."""
    notes: list[str] = field(default_factory=list)

    @property
    def max_lora_rank(self) -> int:
        return next(step for step in RANK_STEPS if step >= self.rank)

    def is_unchanged(self, adapter: Adapter) -> bool:
        """True when the adapter is served as it is."""
        return dict(self.kept) == dict(adapter.entries) and self.config == dict(adapter.config)


def check_for_vllm(adapter: Adapter, base: BaseModel | None) -> VllmCheck:
    """What of the adapter vLLM takes, what may be dropped because it equals the base, and what stands in the way."""
    check = VllmCheck(config=dict(adapter.config))
    if adapter.peft_type != "LORA":
        check.blockers.append(f"vLLM serves LoRA, and this is {adapter.peft_type}")
        return check
    config = adapter.config
    check.blockers += [f"vLLM does not know {label}" for name, label in VARIANTS.items() if config.get(name)]
    if config.get("use_dora"):
        check.blockers.append("vLLM does not serve DoRA")
    modules: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in adapter.entries.items():
        _sort_tensor(check, key, entry, config, base, modules)
    if not modules and not check.blockers:
        check.blockers.append("it holds no LoRA tensors")
    _check_ranks(check, modules)
    _check_embeddings(check, modules, base)
    if not check.blockers:
        for name, plain in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
            if check.config.get(name) not in (None, plain, []):
                check.config[name] = plain
    return check


def _sort_tensor(
    check: VllmCheck,
    key: str,
    entry: TensorEntry,
    config: Mapping[str, Any],
    base: BaseModel | None,
    modules: dict[str, dict[str, TensorEntry]],
) -> None:
    """Puts one tensor among the kept, the dropped or the blockers."""
    name = key
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    # A saved adapter's names hold no adapter name; files of other makers do.
    name = re.sub(r"\.(lora_[AB]|lora_embedding_[AB])\.default(\.weight|)$", r".\1\2", name)
    if not name.startswith(PREFIX):
        name = PREFIX + name.removeprefix("base_model.").removeprefix("module.")
    if name in check.kept:
        check.blockers.append(f"{key} and another tensor are both {name}")
    if match := _LORA.match(name):
        modules.setdefault(match["module"].removeprefix(PREFIX), {})[match["part"]] = entry
        check.kept[name] = entry
    elif ".lora_magnitude_vector" in name:
        if not config.get("use_dora"):
            check.blockers.append(f"{key} belongs to DoRA, which vLLM does not serve")
    elif ".lora_B.bias" in name:
        check.blockers.append(f"vLLM has no bias in LoRA: {key}")
    elif base is None:
        check.blockers.append(f"{key} is no LoRA tensor, and without the base it cannot be shown to equal the base's")
    elif _equals_base(name.removeprefix(PREFIX), entry, config, base):
        check.dropped.append(key)
    else:
        check.blockers.append(f"{key} is no LoRA tensor and differs from the base's")


def _equals_base(name: str, entry: TensorEntry, config: Mapping[str, Any], base: BaseModel) -> bool:
    if name.endswith(_ROWS):
        indices = config.get("trainable_token_indices")
        rows = next(iter(indices.values())) if isinstance(indices, Mapping) else indices
        whole = base_tensor(base, name.removesuffix(_ROWS) + ".weight")
        if whole is None or not rows or len(rows) != entry.shape[0] or whole.dtype != entry.dtype:
            return False
        return b"".join(_row(whole, row) for row in rows) == b"".join(bytes(part) for part in read_chunks(entry))
    whole = base_tensor(base, name.replace(".base_layer.", "."))
    return whole is not None and same_bytes(whole, entry)


def base_tensor(base: BaseModel, name: str) -> TensorEntry | None:
    """The base's tensor of that name; the input embeddings for an output head that is tied to them."""
    entry = base.entries.get(name) or base.entries.get(name.partition(".")[2])
    if entry is None and name.startswith("lm_head.") and has_tied_embeddings(base):
        entry = next((e for n, e in base.entries.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    return entry


def first_rows_equal(longer: TensorEntry, shorter: TensorEntry) -> bool:
    """True when `longer` begins with all rows of `shorter`."""
    if longer.dtype != shorter.dtype or longer.shape[1:] != shorter.shape[1:] or longer.shape[0] < shorter.shape[0]:
        return False
    head = TensorEntry(longer.file, longer.dtype, shorter.shape, longer.start, longer.start + shorter.num_bytes)
    return all(mine == theirs for mine, theirs in zip(read_chunks(head), read_chunks(shorter), strict=True))


def _row(entry: TensorEntry, row: int) -> bytes:
    size = entry.num_bytes // entry.shape[0]
    start = entry.start + row * size
    return b"".join(bytes(part) for part in read_chunks(TensorEntry(entry.file, entry.dtype, (), start, start + size)))


def _check_ranks(check: VllmCheck, modules: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Ranks that fit, and one factor for all modules: vLLM computes it from r and lora_alpha alone."""
    config = check.config
    factors: dict[float, str] = {}
    for module, parts in modules.items():
        a = parts.get("lora_A") or parts.get("lora_embedding_A")
        b = parts.get("lora_B") or parts.get("lora_embedding_B")
        if a is None or b is None:
            check.blockers.append(f"{module} has only half of its LoRA pair")
            continue
        if len(a.shape) != 2 or len(b.shape) != 2:
            check.blockers.append(f"{module} is no linear layer")
            continue
        rank, factor = scaling_of(config, module)
        if a.shape[0] != rank or b.shape[1] != rank:
            check.blockers.append(f"{module} has rank {a.shape[0]} and its config says {rank}")
        check.rank = max(check.rank, rank)
        factors.setdefault(factor, module)
    if check.rank > RANK_STEPS[-1]:
        check.blockers.append(f"its rank is {check.rank}, and vLLM's largest is {RANK_STEPS[-1]}")
        check.rank = RANK_STEPS[-1]
    if len(factors) > 1:
        one, other, *_ = factors.items()
        check.blockers.append(
            f"vLLM scales all modules alike, and {one[1]} has the factor {one[0]:g} but {other[1]} {other[0]:g}"
        )
    elif factors and (config.get("rank_pattern") or config.get("alpha_pattern")):
        _without_patterns(check, next(iter(factors)))


def _without_patterns(check: VllmCheck, factor: float) -> None:
    """Writes rank and alpha as one number each, where that is the same factor to the last bit."""
    alpha = factor * check.rank
    if alpha / check.rank != factor:
        check.blockers.append(f"the factor {factor!r} cannot be written as alpha over rank {check.rank}")
        return
    plain = int(alpha) if float(alpha).is_integer() else alpha
    check.config |= {"r": check.rank, "lora_alpha": plain, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    check.notes.append(f"rank_pattern and alpha_pattern become r {check.rank} and lora_alpha {plain}: the same factor")


def _check_embeddings(
    check: VllmCheck, modules: Mapping[str, Mapping[str, TensorEntry]], base: BaseModel | None
) -> None:
    rows = base.text_config.get("vocab_size") if base is not None else None
    for module, parts in modules.items():
        a = parts.get("lora_embedding_A")
        if a is not None and rows is not None and a.shape[-1] != rows:
            check.blockers.append(f"{module} is for {a.shape[-1]} tokens and the base has {rows}: extra vocabulary")
        if a is not None or module.endswith("lm_head"):
            check.notes.append(f"{module} is adapted: vLLM serves that for architectures that declare it")
