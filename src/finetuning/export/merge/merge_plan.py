"""Plan a merge: which deltas apply to which tensor of the base, under which name, and how the config changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from finetuning.errors import ModelError
from finetuning.export.inputs import Adapter, BaseModel
from finetuning.export.merge.deltas import (
    BiasUpdate,
    LowRankUpdate,
    NeedsPeft,
    ReplaceRows,
    ReplaceWeight,
    WeightDelta,
    read_deltas,
)
from finetuning.export.safetensors_writer import same_bytes
from finetuning.model.safetensors_io import shared_by_layers

_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_SHOWN = 3


@dataclass(frozen=True)
class MergePlan:
    """The changes to the tensors of a base model, by their names in its files."""

    deltas: Mapping[str, tuple[WeightDelta, ...]]
    added: Mapping[str, str] = field(default_factory=dict)
    """New tensors, each with the existing tensor that it starts as a copy of."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The new shapes of tensors that are resized."""
    config_changes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_merge(base: BaseModel, adapters: Sequence[Adapter], *, force: bool = False) -> MergePlan | NeedsPeft:
    """Return the plan for merging the adapters one after the other, or why PEFT must merge them in memory.

    Raises:
        ModelError: an adapter does not fit the base: unknown names, other shapes, or layers that it leaves out (only a
            note with `force`).
    """
    if base.config.get("quantization_config"):
        return NeedsPeft("the base is quantized; the adapter is merged into its dequantized weights")
    if base.pickled:
        return NeedsPeft("the base's weights are pickled")
    is_classifier = any(name.endswith("ForSequenceClassification") for name in _architectures(base))
    if not is_classifier and any(adapter.task_type == "SEQ_CLS" for adapter in adapters):
        return NeedsPeft("the adapter has its own task head, which replaces the base's")
    planned: dict[str, tuple[WeightDelta, ...]] = {}
    shapes = {name: entry.shape for name, entry in base.entries.items()}
    notes: list[str] = []
    for adapter in adapters:
        deltas = read_deltas(adapter, str(base.config.get("model_type", "")))
        if isinstance(deltas, NeedsPeft):
            return deltas
        names = _checkpoint_names(base, deltas)
        if isinstance(names, NeedsPeft):
            return names
        if adapter.config.get("ensure_weight_tying") and has_tied_embeddings(base):
            return NeedsPeft("ensure_weight_tying ties a trained tensor to one that the adapter file does not contain")
        notes += _check_coverage(base, adapter, deltas, names, force)
        for name, items in deltas.items():
            target = names[name]
            # A tied output head is not in the files; it has the shape of the input embeddings.
            shape = shapes.get(target) or shapes[_embedding_name(base) or ""]
            for item in items:
                delta = _fit_to_shape(item, name, shape, adapter)
                shape = delta.value.shape if isinstance(delta, ReplaceWeight) else shape
                planned[target] = (*planned.get(target, ()), delta)
            shapes[target] = shape
    resized = {n: shape for n, shape in shapes.items() if n not in base.entries or shape != base.entries[n].shape}
    return _resolve_embeddings(base, MergePlan(planned, {}, resized, {}, tuple(notes)))


def has_tied_embeddings(base: BaseModel) -> bool:
    """Whether input and output embeddings are one tensor."""
    setting = base.text_config.get("tie_word_embeddings", base.config.get("tie_word_embeddings"))
    return bool(setting) if setting is not None else _head_name(base.entries) is None


def _architectures(base: BaseModel) -> list[str]:
    return base.config.get("architectures") or []


def _checkpoint_names(base: BaseModel, deltas: Mapping[str, Sequence[WeightDelta]]) -> dict[str, str] | NeedsPeft:
    """Map the names of changed tensors in the model to those in the base's files.

    Raises:
        ModelError: the base does not have the tensors under any name.
    """
    # Some architectures have other tensors in memory than in their files, such as Mixtral's experts, which
    # transformers fuses when it loads them. A delta for such a tensor fits no single tensor of the files.
    converted = _converted_name(base, deltas)
    if converted is not None:
        return NeedsPeft(f"transformers converts {converted} of this architecture when it loads the file")
    # A checkpoint of the model without a head, such as GPT-2's on the hub, lacks the first part of each name.
    for cut in (0, 1):
        names = {name: ".".join(name.split(".")[cut if not _is_head(name) else 0 :]) for name in deltas}
        missing = [name for name, stored in names.items() if stored not in base.entries and not _is_head(name)]
        if not missing and len(set(names.values())) == len(names):
            absent_head = [n for n in deltas if _is_head(n) and names[n] not in base.entries]
            if absent_head and not has_tied_embeddings(base):
                missing = absent_head
            else:
                return names
    shared = shared_by_layers(deltas, base.entries)
    if shared:
        raise ModelError(
            f"the adapter cannot be merged: its layers change {_name_some(shared)} each in their own way, and the base"
            f" {base.folder} stores one tensor for all of them.",
            hint="Serve base model and adapter unmerged, with PEFT.",
        )
    missing = [name for name in deltas if name not in base.entries]
    if all(isinstance(delta, BiasUpdate) for name in missing for delta in deltas[name]):
        return NeedsPeft("the adapter has biases for layers of the base that have none")
    raise ModelError(
        f"the adapter does not fit the base {base.folder}: it changes {_name_some(missing)},"
        " which the base does not have.",
        hint="Is this the base model that it was trained on?",
    )


def _converted_name(base: BaseModel, names: Iterable[str]) -> str | None:
    """Return the first name that transformers renames, splits or permutes when it loads this architecture."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    keys = [
        base.config.get("model_type"),
        base.text_config.get("model_type"),
        *_architectures(base),
    ]
    patterns = [
        pattern
        for key in dict.fromkeys(key for key in keys if key)
        for transform in get_checkpoint_conversion_mapping(key) or ()
        for pattern in transform.target_patterns
    ]
    regexes = [re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\^", "^")) for pattern in patterns]
    return next((name for name in names if any(regex.search(name) for regex in regexes)), None)


def _fit_to_shape(delta: WeightDelta, name: str, shape: tuple[int, ...], adapter: Adapter) -> WeightDelta:
    """Return the delta with its orientation determined by the base's shape.

    Raises:
        ModelError: the shapes do not fit.
    """
    wrong = None
    if isinstance(delta, LowRankUpdate):
        product = (delta.b.shape[0], delta.a.shape[1])
        # The shape of a square weight does not determine its orientation; `read_deltas` has set it by model type.
        if delta.is_embedding or product[0] != product[1]:
            transposed = delta.is_embedding or (product != shape and product[::-1] == shape)
            delta = replace(delta, transposed=transposed)
        if (product[::-1] if delta.transposed else product) != shape:
            wrong = product
    elif isinstance(delta, ReplaceWeight):
        # Embeddings with more rows than the base's belong to a resized vocabulary.
        if delta.value.shape != shape and not (
            is_embedding_weight(name) and delta.value.shape[1:] == shape[1:] and delta.value.shape[0] > shape[0]
        ):
            wrong = delta.value.shape
    elif isinstance(delta, BiasUpdate):
        wrong = delta.value.shape if delta.value.shape != shape else None
    elif delta.value.shape[1:] != shape[1:] or max(delta.rows) >= shape[0]:
        wrong = delta.value.shape
    if wrong is not None:
        raise ModelError(
            f"the adapter {adapter.folder} does not fit the base: {name} has shape {list(shape)} in the base"
            f" and {list(wrong)} in the adapter.",
            hint="Is this the base model that it was trained on?",
        )
    return delta


def _check_coverage(
    base: BaseModel,
    adapter: Adapter,
    deltas: Mapping[str, Sequence[WeightDelta]],
    names: Mapping[str, str],
    force: bool,
) -> list[str]:
    """Return notes on layers that the adapter should change according to its config, but does not.

    An adapter trained on a model with fewer layers fits by name and shape, and would leave the other layers unchanged.

    Raises:
        ModelError: there are such layers, and `force` is off.
    """
    config = adapter.config
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return []
    adapted = {names[name] for name, items in deltas.items() if any(isinstance(d, LowRankUpdate) for d in items)}
    kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in adapted}
    left_out = sorted(n for n in base.entries if n not in adapted and re.sub(r"\.\d+\.", ".*.", n) in kinds)
    if not left_out:
        return []
    message = f"the adapter {adapter.folder} leaves out {_name_some(left_out)} of the base, which match target_modules."
    if not force:
        raise ModelError(message, hint="Is this the base model that it was trained on? --force merges it anyway.")
    return [message]


def _resolve_embeddings(base: BaseModel, plan: MergePlan) -> MergePlan:
    """Return the plan with tied embeddings kept or untied, and `vocab_size` set to the rows of the embeddings.

    Embeddings stay tied if both sides get the same values. Otherwise they are untied: the output head becomes a tensor
    of its own, because the shared tensor cannot have both deltas.

    Raises:
        ModelError: only one of two untied embeddings was resized.
    """
    added, changes, deltas = dict(plan.added), dict(plan.config_changes), dict(plan.deltas)
    notes = list(plan.notes)
    embedding, head = _embedding_name(base), _head_name(base.entries) or _head_name(deltas)
    if has_tied_embeddings(base) and embedding is not None:
        head = head or "lm_head.weight"
        if _stay_tied(deltas.get(embedding, ()), deltas.get(head, ()), is_resized=embedding in plan.shapes):
            deltas.pop(head, None)
            # Some checkpoints store a tied head a second time.
            if head in base.entries and embedding in deltas:
                deltas[head] = deltas[embedding]
        else:
            if head not in base.entries:
                added[head] = embedding
            changes["tie_word_embeddings"] = False
            notes.append("input and output embeddings differ after the merge: tie_word_embeddings is set to false")
    shapes = {name: shape for name, shape in plan.shapes.items() if name in base.entries or name in added}
    if embedding is not None and embedding in shapes:
        rows = shapes[embedding][0]
        if head in {*base.entries, *added} and (shapes.get(head) or base.entries[head].shape)[0] != rows:
            raise ModelError(
                f"the adapter resizes {embedding} to {rows} rows, but not {head}; both must have the same size"
            )
        changes["vocab_size"] = rows
        notes.append(f"the vocabulary is resized to {rows} rows")
    return MergePlan(deltas, added, shapes, changes, tuple(notes))


def _stay_tied(embedding: Sequence[WeightDelta], head: Sequence[WeightDelta], *, is_resized: bool) -> bool:
    """Whether both sides are still one tensor after the merge."""
    if not embedding and not head:
        return True
    if not head:
        return is_resized or all(isinstance(delta, ReplaceRows) for delta in embedding)
    return len(embedding) == len(head) and all(map(_is_same, embedding, head))


def _is_same(first: WeightDelta, second: WeightDelta) -> bool:
    """Whether both replace the same rows by the same values."""
    if isinstance(first, ReplaceWeight) and isinstance(second, ReplaceWeight):
        return same_bytes(first.value, second.value)
    if isinstance(first, ReplaceRows) and isinstance(second, ReplaceRows):
        return first.rows == second.rows and same_bytes(first.value, second.value)
    return False


def _is_head(name: str) -> bool:
    return name in {f"{head}.weight" for head in _HEADS}


def is_embedding_weight(name: str) -> bool:
    """Whether a tensor belongs to the input or output embeddings."""
    return any(module in (*_HEADS, *_EMBEDDINGS) for module in name.split(".")[-2:-1])


def _head_name(names: Iterable[str]) -> str | None:
    return next((name for name in names if _is_head(name)), None)


def _embedding_name(base: BaseModel) -> str | None:
    return next((n for n in base.entries if n.endswith(".weight") and n.split(".")[-2] in _EMBEDDINGS), None)


def _name_some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
