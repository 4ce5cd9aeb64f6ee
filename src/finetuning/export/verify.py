"""What was saved, opened again and compared with what it ought to be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetuning.errors import FinetuningError, GuardStopped, Location, ModelError, Problem
from finetuning.model.peft.adapter_files import ADAPTER_WEIGHTS, tensor_digest
from finetuning.model.safetensors_io import TensorEntry, read_header, read_model_headers

_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class VerifiedModel:
    """A saved model or adapter that holds what it should."""

    folder: Path
    kind: str
    """`model` or `adapter`."""
    num_tensors: int
    num_bytes: int
    """Bytes of all tensors."""
    checks: tuple[str, ...]
    """What was looked at, in words."""

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.folder}: {self.num_tensors} tensors, {self.num_bytes:,} bytes; {', '.join(self.checks)}"
        )


def verify_saved(
    folder: Path,
    *,
    expected: Mapping[str, Sequence[int]] | None = None,
    initial: Mapping[str, str] | None = None,
    sample_texts: Mapping[str, Sequence[int]] | None = None,
) -> VerifiedModel:
    """What a saved model or adapter holds, when all of it is as it should be. Memory: one tensor's slice at a time.

    `expected` are the shapes of the tensors by name. A model is also loaded by plain transformers, without memory.
    `initial` are the digests of an adapter's tensors before training: at least one must have changed.
    `sample_texts` maps texts to the token ids that the tokenizer in use makes of them.

    Raises:
        GuardStopped: with every fault: keys, shapes, values that are not finite, an adapter that was not trained, a
            tokenizer that reads a text otherwise.
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    try:
        entries = read_header(folder / ADAPTER_WEIGHTS) if is_adapter else read_model_headers(folder)
    except ModelError as error:
        raise _stopped(folder, [str(error)]) from error
    faults: list[str] = []
    checks: list[str] = []
    if expected is not None:
        faults += _compare_shapes(entries, expected)
        checks.append("keys and shapes as expected")
    if not is_adapter:
        loading = _loading_faults(folder)
        faults += loading or []
        if loading is not None:
            checks.append("loads in plain transformers")
    faults += _not_finite(folder, entries)
    checks.append("all values finite")
    if is_adapter:
        faults += _not_trained(entries, initial)
        if initial or _zero_at_first(entries):
            checks.append("adapter moved from its initial value")
    if sample_texts is not None:
        faults += _tokenizer_faults(folder, sample_texts)
        checks.append(f"tokenizer reads {len(sample_texts)} texts as in training")
    if faults:
        raise _stopped(folder, faults)
    num_bytes = sum(entry.num_bytes for entry in entries.values())
    return VerifiedModel(folder, "adapter" if is_adapter else "model", len(entries), num_bytes, tuple(checks))


def _stopped(folder: Path, faults: Sequence[str]) -> FinetuningError:
    place = Location(file=str(folder))
    return GuardStopped([Problem(f"what was saved is not sound: {fault}", place) for fault in faults])


def _loading_faults(folder: Path) -> list[str] | None:
    """What plain transformers finds wrong when it loads the model without memory; None where that cannot be tried.

    Weights on the meta device have names and shapes only. Names that a model joins or renames on loading (experts,
    say) are told apart from wrong ones, which a comparison of names cannot do. Quantized weights cannot be loaded
    so, and code of the model's own is not run.
    """
    from finetuning.model.load import task_head_for

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in raw or "auto_map" in raw:
            return None
        _, found = task_head_for(raw.get("architectures") or ()).auto_class.from_pretrained(
            folder,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        return [f"transformers cannot load it: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"]
    return _name_faults(
        missing=sorted(found["missing_keys"]),
        extra=sorted(found["unexpected_keys"]),
        misshapen=sorted(str(item[0]) for item in found["mismatched_keys"]),
    )


def _compare_shapes(entries: Mapping[str, TensorEntry], wanted: Mapping[str, Sequence[int]]) -> list[str]:
    return _name_faults(
        missing=sorted(set(wanted) - set(entries)),
        extra=sorted(set(entries) - set(wanted)),
        misshapen=sorted(name for name in set(wanted) & set(entries) if tuple(wanted[name]) != entries[name].shape),
    )


def _name_faults(*, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]) -> list[str]:
    return [
        f"{len(names)} tensors {what}, such as {names[0]}"
        for names, what in ((missing, "are missing"), (extra, "do not belong in it"), (misshapen, "have a wrong shape"))
        if names
    ]


def _not_finite(folder: Path, entries: Mapping[str, TensorEntry]) -> list[str]:
    bad = []
    for file in sorted({entry.file for entry in entries.values()}):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not _is_finite(tensor):
                        bad.append(name)
        except (SafetensorError, OSError) as error:
            return [f"{file.name} cannot be read: {error}"]
    if not bad:
        return []
    return [f"{len(bad)} of {len(entries)} tensors hold values that are not finite, such as {bad[0]}"]


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.element_size() == 1:
        # float8: too narrow a type for isfinite.
        tensor = tensor.float()
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_CHUNK_ELEMENTS))


def _zero_at_first(entries: Mapping[str, TensorEntry]) -> list[str]:
    return [name for name in entries if ".lora_B" in name or ".lora_embedding_B" in name]


def _not_trained(entries: Mapping[str, TensorEntry], initial: Mapping[str, str] | None) -> list[str]:
    """A fault when every tensor is what it was at the start: by digest, or, of a plain LoRA, when B is still zero."""
    if not entries:
        return ["the adapter holds no tensor"]
    file = next(iter(entries.values())).file
    with safe_open(file, framework="pt") as tensors:
        if initial:
            if any(tensor_digest(tensors.get_tensor(name)) != initial.get(name) for name in entries):
                return []
            return [f"none of the adapter's {len(entries)} tensors changed in training"]
        zero = _zero_at_first(entries)
        if zero and all(not tensors.get_tensor(name).any() for name in zero):
            return ["every lora_B of the adapter is zero: it was not trained"]
    return []


def _tokenizer_faults(folder: Path, sample_texts: Mapping[str, Sequence[int]]) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        return [f"its tokenizer cannot be loaded: {str(error).splitlines()[0]}"]
    for text, ids in sample_texts.items():
        found = tokenizer.encode(text, add_special_tokens=False)
        if list(found) != list(ids):
            return [f"its tokenizer reads {text[:40]!r} as {found[:8]}, it was {list(ids)[:8]} in training"]
    return []
