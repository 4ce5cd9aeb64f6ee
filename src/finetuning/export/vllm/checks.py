"""Check whether vLLM can serve an adapter, by names, shapes and bytes, without torch.

Source: vllm 0.32, vllm/lora/peft_helper.py (config), lora_model.py and utils.py (names), vllm/config/lora.py (ranks).
What each option of LoRA means is in `model/peft/lora_support.py`. Fields that vLLM does not read are silently lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetuning.export.inputs import Adapter, BaseModel
from finetuning.export.merge.deltas import PREFIX, scaling_of
from finetuning.export.merge.merge_plan import has_tied_embeddings
from finetuning.export.safetensors_writer import read_chunks, same_bytes
from finetuning.model.peft.lora_support import VLLM_VERSION, lora_init, unservable_modules, used_options
from finetuning.model.safetensors_io import TensorEntry

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` accepts."""

# Prefixes that torch.compile, FSDP and activation checkpointing add to module names.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<end>\.weight|)$")
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""The end of the name under which PEFT saves the trained rows of an embedding."""


@dataclass
class VllmCheck:
    """The result of the check: what to serve, and what prevents it."""

    kept: dict[str, TensorEntry] = field(default_factory=dict)
    """Tensors to serve, by the names that vLLM expects."""
    dropped: list[str] = field(default_factory=list)
    """Tensors that are bit-identical to the base's."""
    config: dict[str, object] = field(default_factory=dict)
    """The adapter config for vLLM."""
    rank: int = 0
    blockers: list[str] = field(default_factory=list)
    """Reasons why it cannot be served as an adapter without loss."""
    notes: list[str] = field(default_factory=list)

    @property
    def max_lora_rank(self) -> int:
        return next(rank for rank in MAX_LORA_RANKS if rank >= self.rank)

    def is_unchanged(self, adapter: Adapter) -> bool:
        """Whether the adapter can be served unchanged."""
        return dict(self.kept) == dict(adapter.entries) and self.config == dict(adapter.config)


def check_for_vllm(adapter: Adapter, base: BaseModel | None) -> VllmCheck:
    """Return which tensors vLLM can serve, which equal the base's and can be dropped, and what prevents serving."""
    check = VllmCheck(config=dict(adapter.config))
    if adapter.peft_type != "LORA":
        check.blockers.append(f"vLLM serves only LoRA, and this is {adapter.peft_type}")
        return check
    config = adapter.config
    options = used_options(config)
    check.blockers += [f"vLLM does not support {option.label}" for option in options if option.vllm == "no"]
    init = lora_init(config)
    if init.changes_base:
        check.blockers.append(
            f"it belongs to a base whose weights its initialization changed"
            f" (init_lora_weights: {config.get('init_lora_weights')}), which vLLM does not do"
        )
    modules: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in adapter.entries.items():
        _sort_tensor(check, key, entry, config, base, modules)
    if not modules and not check.blockers:
        check.blockers.append("it contains no LoRA tensors")
    _check_ranks(check, modules)
    _check_embeddings(check, modules, base)
    if not check.blockers:
        check.config |= {option.field: option.unused for option in options if option.vllm == "if equal"}
    return check


def _sort_tensor(
    check: VllmCheck,
    key: str,
    entry: TensorEntry,
    config: Mapping[str, object],
    base: BaseModel | None,
    modules: dict[str, dict[str, TensorEntry]],
) -> None:
    """Sort a tensor into the kept or the dropped ones, or add a blocker."""
    name = key
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    # PEFT saves tensors without the adapter's name; files by other tools may contain it.
    name = re.sub(r"\.(lora_[AB]|lora_embedding_[AB])\.default(\.weight|)$", r".\1\2", name)
    if not name.startswith(PREFIX):
        name = PREFIX + name.removeprefix("base_model.").removeprefix("module.")
    if name in check.kept:
        check.blockers.append(f"{key} and another tensor both map to {name}")
    if match := _LORA.match(name):
        modules.setdefault(match["module"].removeprefix(PREFIX), {})[match["part"]] = entry
        check.kept[name] = entry
    elif ".lora_magnitude_vector" in name:
        if not config.get("use_dora"):
            check.blockers.append(f"{key} belongs to DoRA, which vLLM does not support")
    elif ".lora_B.bias" in name:
        check.blockers.append(f"vLLM does not support a bias in LoRA: {key}")
    elif base is None:
        check.blockers.append(f"{key} is not a LoRA tensor, and without the base it cannot be compared with the base's")
    elif _equals_base(name.removeprefix(PREFIX), entry, config, base):
        check.dropped.append(key)
    else:
        check.blockers.append(f"{key} is not a LoRA tensor and differs from the base's")


def _equals_base(name: str, entry: TensorEntry, config: Mapping[str, object], base: BaseModel) -> bool:
    if name.endswith(TOKEN_ROWS):
        indices = config.get("trainable_token_indices")
        rows = next(iter(indices.values())) if isinstance(indices, Mapping) else indices
        tensor = base_tensor(base, name.removesuffix(TOKEN_ROWS) + ".weight")
        if (
            tensor is None
            or not isinstance(rows, Sequence)
            or not rows
            or len(rows) != entry.shape[0]
            or tensor.dtype != entry.dtype
        ):
            return False
        return b"".join(_row(tensor, row) for row in rows) == b"".join(bytes(part) for part in read_chunks(entry))
    tensor = base_tensor(base, name.replace(".base_layer.", "."))
    return tensor is not None and same_bytes(tensor, entry)


def base_tensor(base: BaseModel, name: str) -> TensorEntry | None:
    """Return the base's tensor of that name; for a tied output head, the input embeddings."""
    entry = base.entries.get(name) or base.entries.get(name.partition(".")[2])
    if entry is None and name.startswith("lm_head.") and has_tied_embeddings(base):
        entry = next((e for n, e in base.entries.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    return entry


def first_rows_equal(longer: TensorEntry, shorter: TensorEntry) -> bool:
    """Whether the first rows of `longer` are bit-identical to all rows of `shorter`."""
    if longer.dtype != shorter.dtype or longer.shape[1:] != shorter.shape[1:] or longer.shape[0] < shorter.shape[0]:
        return False
    head = TensorEntry(longer.file, longer.dtype, shorter.shape, longer.start, longer.start + shorter.num_bytes)
    return all(left == right for left, right in zip(read_chunks(head), read_chunks(shorter), strict=True))


def _row(entry: TensorEntry, row: int) -> bytes:
    size = entry.num_bytes // entry.shape[0]
    start = entry.start + row * size
    return b"".join(bytes(part) for part in read_chunks(TensorEntry(entry.file, entry.dtype, (), start, start + size)))


def _check_ranks(check: VllmCheck, modules: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Check ranks and scaling factors. Releases before 0.32 may compute one factor from r and lora_alpha alone."""
    config = check.config
    factors: dict[float, str] = {}
    for module, parts in modules.items():
        a = parts.get("lora_A") or parts.get("lora_embedding_A")
        b = parts.get("lora_B") or parts.get("lora_embedding_B")
        if a is None or b is None:
            check.blockers.append(f"{module} has only one of lora_A and lora_B")
            continue
        if len(a.shape) != 2 or len(b.shape) != 2:
            check.blockers.append(f"{module} is not a linear layer")
            continue
        rank, factor = scaling_of(config, module)
        if a.shape[0] != rank or b.shape[1] != rank:
            check.blockers.append(f"{module} has rank {a.shape[0]}, but rank {rank} in its config")
        check.rank = max(check.rank, rank)
        factors.setdefault(factor, module)
    patterns = [pattern for pattern in (config.get("rank_pattern"), config.get("alpha_pattern")) if pattern]
    if patterns and len(factors) > 1:
        # vLLM compares every rank that the config names with its maximum, whether a module has it or not.
        ranks = config.get("rank_pattern")
        named = [config.get("r", 8), *(ranks.values() if isinstance(ranks, Mapping) else ())]
        check.rank = max(check.rank, *(rank for rank in named if isinstance(rank, int)))
        check.notes.append(
            f"modules have different scaling factors: vLLM {VLLM_VERSION} serves them, older releases may apply one"
            " factor to all and give wrong text without an error"
        )
    elif patterns and factors:
        _replace_patterns(check, next(iter(factors)))
    if check.rank > MAX_LORA_RANKS[-1]:
        check.blockers.append(f"its rank is {check.rank}, and vLLM's maximum is {MAX_LORA_RANKS[-1]}")
        check.rank = MAX_LORA_RANKS[-1]


def _replace_patterns(check: VllmCheck, factor: float) -> None:
    """Replace patterns by one rank and one alpha, if these give exactly the same scaling factor."""
    alpha = factor * check.rank
    if alpha / check.rank != factor:
        check.blockers.append(f"the scaling factor {factor!r} is not exactly alpha / {check.rank} for any alpha")
        return
    plain = int(alpha) if float(alpha).is_integer() else alpha
    check.config |= {"r": check.rank, "lora_alpha": plain, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    check.notes.append(
        f"rank_pattern and alpha_pattern are replaced by r {check.rank} and lora_alpha {plain}: the same factor"
    )


def _check_embeddings(
    check: VllmCheck, modules: Mapping[str, Mapping[str, TensorEntry]], base: BaseModel | None
) -> None:
    rows = base.text_config.get("vocab_size") if base is not None else None
    adapted: list[str] = []
    for module, parts in modules.items():
        a = parts.get("lora_embedding_A")
        if a is not None and rows is not None and a.shape[-1] != rows:
            check.blockers.append(
                f"{module} has {a.shape[-1]} tokens and the base {rows}: vLLM does not support extra vocabulary"
            )
        if a is not None or module.endswith("lm_head"):
            adapted.append(module)
    if base is not None:
        check.blockers += unservable_modules(adapted, base.config)
        return
    check.notes += [f"{module} is adapted: vLLM supports that only for some architectures" for module in adapted]
