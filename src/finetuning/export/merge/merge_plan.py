"""The plan of a merge: which tensor of the base gets which edits, under which name, and what the config must say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetuning.errors import ModelError, Problem
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

_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_SHOWN = 3


@dataclass(frozen=True)
class MergePlan:
    """What is done to the tensors of a base model; names are those of its files."""

    edits: Mapping[str, tuple[WeightDelta, ...]]
    added: Mapping[str, str] = field(default_factory=dict)
    """New tensors, each a copy of the one named, made before that one is edited."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the tensors that change theirs."""
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_merge(base: BaseModel, adapters: Sequence[Adapter], *, force: bool = False) -> MergePlan | NeedsPeft:
    """The plan of merging the adapters one after the other, or why PEFT must do it.

    Raises:
        ModelError: an adapter does not fit the base: a name it lacks, another shape, layers left out (a note, not an
            error, with `force`).
    """
    if base.config.get("quantization_config"):
        return NeedsPeft("the base is stored quantised; it is merged into the dequantised weights")
    if base.pickled:
        return NeedsPeft("the base's weights are pickled")
    scores = any(name.endswith("ForSequenceClassification") for name in _architectures(base))
    if not scores and any(adapter.task_type == "SEQ_CLS" for adapter in adapters):
        return NeedsPeft("the adapter brings a head of its own, which takes the place of the base's")
    edits: dict[str, tuple[WeightDelta, ...]] = {}
    shapes = {name: entry.shape for name, entry in base.entries.items()}
    notes: list[str] = []
    for adapter in adapters:
        found = read_deltas(adapter, str(base.config.get("model_type", "")))
        if isinstance(found, NeedsPeft):
            return found
        names = _checkpoint_names(base, found)
        if isinstance(names, NeedsPeft):
            return names
        if adapter.config.get("ensure_weight_tying") and has_tied_embeddings(base):
            return NeedsPeft("ensure_weight_tying ties what the adapter trains to a tensor that the file does not hold")
        notes += _check_coverage(base, adapter, found, names, force)
        for name, todo in found.items():
            target = names[name]
            shape = shapes.get(target) or shapes[_embedding_name(base)]
            for edit in todo:
                fitted = _fit_to_shape(edit, name, shape, adapter)
                shape = fitted.value.shape if isinstance(fitted, ReplaceWeight) else shape
                edits[target] = (*edits.get(target, ()), fitted)
            shapes[target] = shape
    changed_shapes = {n: s for n, s in shapes.items() if n not in base.entries or s != base.entries[n].shape}
    return _resolve_embeddings(base, MergePlan(edits, {}, changed_shapes, {}, tuple(notes)))


def has_tied_embeddings(base: BaseModel) -> bool:
    """True when input and output embeddings are one tensor."""
    said = base.text_config.get("tie_word_embeddings", base.config.get("tie_word_embeddings"))
    return bool(said) if said is not None else _head_name(base.entries) is None


def _architectures(base: BaseModel) -> list[str]:
    return base.config.get("architectures") or []


def _checkpoint_names(base: BaseModel, found: Mapping[str, Sequence[WeightDelta]]) -> dict[str, str] | NeedsPeft:
    """The name in the base's files of each edited tensor, where that is one and the same tensor.

    Raises:
        ModelError: the base has no such tensors under any name.
    """
    converted = _converted_name(base, found)
    if converted is not None:
        return NeedsPeft(f"transformers rewrites {converted} of this architecture between file and model")
    # A checkpoint of the bare model, as GPT-2's on the hub, leaves out the first part of each name.
    for cut in (0, 1):
        names = {name: ".".join(name.split(".")[cut if not _is_head(name) else 0 :]) for name in found}
        missing = [name for name, stored in names.items() if stored not in base.entries and not _is_head(name)]
        if not missing and len(set(names.values())) == len(names):
            absent_head = [n for n in found if _is_head(n) and names[n] not in base.entries]
            if absent_head and not has_tied_embeddings(base):
                missing = absent_head
            else:
                return names
    missing = [name for name in found if name not in base.entries]
    raise ModelError(
        f"the adapter does not fit the base {base.folder}: it changes {_name_some(missing)},"
        " which the base does not have.",
        hint="Is this the base model that it was trained on?",
    )


def _converted_name(base: BaseModel, names: Iterable[str]) -> str | None:
    """The first of the names that transformers renames, splits or permutes when it loads this architecture."""
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


def _fit_to_shape(edit: WeightDelta, name: str, shape: tuple[int, ...], adapter: Adapter) -> WeightDelta:
    """The edit with its orientation settled by the base's shape.

    Raises:
        ModelError: the shapes do not fit.
    """
    wrong = None
    if isinstance(edit, LowRankUpdate):
        delta = (edit.b.shape[0], edit.a.shape[1])
        if edit.is_embedding or delta[0] != delta[1]:
            transposed = edit.is_embedding or (delta != shape and delta[::-1] == shape)
            edit = replace(edit, transposed=transposed)
        if (delta[::-1] if edit.transposed else delta) != shape:
            wrong = delta
    elif isinstance(edit, ReplaceWeight):
        # More rows than the base has is a grown vocabulary.
        if edit.value.shape != shape and not (
            is_embedding_weight(name) and edit.value.shape[1:] == shape[1:] and edit.value.shape[0] > shape[0]
        ):
            wrong = edit.value.shape
    elif isinstance(edit, BiasUpdate):
        wrong = edit.value.shape if edit.value.shape != shape else None
    elif edit.value.shape[1:] != shape[1:] or max(edit.rows) >= shape[0]:
        wrong = edit.value.shape
    if wrong is not None:
        raise ModelError(
            f"the adapter {adapter.folder} does not fit the base: {name} is {list(shape)} there"
            f" and {list(wrong)} in the adapter.",
            hint="Is this the base model that it was trained on?",
        )
    return edit


def _check_coverage(
    base: BaseModel, adapter: Adapter, found: Mapping[str, Sequence[WeightDelta]], names: Mapping[str, str], force: bool
) -> list[str]:
    """Notes about layers of the base that the adapter should have changed by its config and does not.

    Raises:
        ModelError: there are such layers, and `force` is off.
    """
    config = adapter.config
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return []
    adapted = {names[name] for name, todo in found.items() if any(isinstance(edit, LowRankUpdate) for edit in todo)}
    kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in adapted}
    left_out = sorted(n for n in base.entries if n not in adapted and re.sub(r"\.\d+\.", ".*.", n) in kinds)
    if not left_out:
        return []
    text = f"the adapter {adapter.folder} leaves out {_name_some(left_out)} of the base, which its target_modules name."
    if not force:
        raise ModelError(
            [Problem(text, hint="Is this the base model that it was trained on? --force merges it anyway.")]
        )
    return [text]


def _resolve_embeddings(base: BaseModel, plan: MergePlan) -> MergePlan:
    """The plan with tied embeddings kept or untied, and the config's vocabulary as large as the tensors.

    Raises:
        ModelError: only one side of untied embeddings grew.
    """
    added, changes, edits = dict(plan.added), dict(plan.config_changes), dict(plan.edits)
    notes = list(plan.notes)
    embedding, head = _embedding_name(base), _head_name(base.entries) or _head_name(edits)
    if has_tied_embeddings(base) and embedding is not None:
        head = head or "lm_head.weight"
        if _stay_tied(edits.get(embedding, ()), edits.get(head, ()), grown=embedding in plan.shapes):
            edits.pop(head, None)
            if head in base.entries and embedding in edits:
                edits[head] = edits[embedding]
        else:
            if head not in base.entries:
                added[head] = embedding
            changes["tie_word_embeddings"] = False
            notes.append("input and output embeddings differ after the merge: tie_word_embeddings is now false")
    shapes = {name: shape for name, shape in plan.shapes.items() if name in base.entries or name in added}
    if embedding is not None and embedding in shapes:
        rows = shapes[embedding][0]
        if head in {*base.entries, *added} and (shapes.get(head) or base.entries[head].shape)[0] != rows:
            raise ModelError(f"the adapter grows {embedding} to {rows} rows but not {head}; both must grow together")
        changes["vocab_size"] = rows
        notes.append(f"the vocabulary grows to {rows} rows")
    return MergePlan(edits, added, shapes, changes, tuple(notes))


def _stay_tied(embedding: Sequence[WeightDelta], head: Sequence[WeightDelta], *, grown: bool) -> bool:
    """True when both sides are one tensor after the merge as before it."""
    if not embedding and not head:
        return True
    if not head:
        return grown or all(isinstance(edit, ReplaceRows) for edit in embedding)
    return len(embedding) == len(head) and all(map(_is_same, embedding, head))


def _is_same(one: WeightDelta, other: WeightDelta) -> bool:
    """True when both put the same values into the same rows."""
    if isinstance(one, ReplaceWeight) and isinstance(other, ReplaceWeight):
        return same_bytes(one.value, other.value)
    if isinstance(one, ReplaceRows) and isinstance(other, ReplaceRows):
        return one.rows == other.rows and same_bytes(one.value, other.value)
    return False


def _is_head(name: str) -> bool:
    return name in {f"{head}.weight" for head in _HEADS}


def is_embedding_weight(name: str) -> bool:
    """True for a tensor of the input or output embeddings."""
    return any(module in (*_HEADS, *_EMBEDDINGS) for module in name.split(".")[-2:-1])


def _head_name(names: Iterable[str]) -> str | None:
    return next((name for name in names if _is_head(name)), None)


def _embedding_name(base: BaseModel) -> str | None:
    return next((n for n in base.entries if n.endswith(".weight") and n.split(".")[-2] in _EMBEDDINGS), None)


def _name_some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
