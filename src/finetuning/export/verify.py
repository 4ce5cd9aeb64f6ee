"""Verify a saved model or adapter: open it again, and check keys, shapes, values, training effect and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from finetuning.errors import FinetuningError, GuardStopped, Location, ModelError, Problem, first_line, parse_json
from finetuning.model.peft.adapter_files import tensor_digest
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS, TensorEntry, read_header, read_model_headers

_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class VerifiedModel:
    """A saved model or adapter that passed all checks."""

    folder: Path
    kind: str
    """`model` or `adapter`."""
    num_tensors: int
    num_bytes: int
    """Bytes of all tensors."""
    checks: tuple[str, ...]
    """Descriptions of the checks."""

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.folder}: {self.num_tensors} tensors, {self.num_bytes:,} bytes; {', '.join(self.checks)}"
        )


def verify_saved(
    folder: Path,
    *,
    expected: Mapping[str, Sequence[int]] | None = None,
    initial: Mapping[str, str] | None = None,
    is_trained: bool = True,
    sample_texts: Mapping[str, Sequence[int]] | None = None,
) -> VerifiedModel:
    """Check a saved model or adapter, one tensor in memory at a time; a model is also loaded on the meta device.

    Args:
        expected: shapes of the tensors by name.
        initial: digests of an adapter's tensors before training; at least one must have changed.
        is_trained: whether an adapter must have changed at all.
        sample_texts: texts, with the token ids that the tokenizer in memory encodes them to.

    Raises:
        GuardStopped: a check failed; the error lists all failures (keys, shapes, values that are not finite, an adapter
            that was not trained, a tokenizer that encodes a text differently).
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    try:
        entries = read_header(folder / ADAPTER_WEIGHTS) if is_adapter else read_model_headers(folder)
    except ModelError as error:
        raise _guard_stopped(folder, [str(error)]) from error
    failures: list[str] = []
    checks: list[str] = []
    if expected is not None:
        failures += _compare_shapes(entries, expected)
        checks.append("keys and shapes as expected")
    if not is_adapter:
        loading = _loading_failures(folder)
        failures += loading or []
        if loading is not None:
            checks.append("loads in plain transformers")
    failures += _not_finite(folder, entries)
    checks.append("all values finite")
    if is_adapter and is_trained:
        failures += _not_trained(entries, initial)
        if initial or _zero_initialized(entries):
            checks.append("adapter moved from its initial value")
    if sample_texts is not None:
        failures += _tokenizer_failures(folder, sample_texts)
        checks.append(f"tokenizer encodes {len(sample_texts)} text{'s' * (len(sample_texts) != 1)} as in training")
    if failures:
        raise _guard_stopped(folder, failures)
    num_bytes = sum(entry.num_bytes for entry in entries.values())
    return VerifiedModel(folder, "adapter" if is_adapter else "model", len(entries), num_bytes, tuple(checks))


def _guard_stopped(folder: Path, failures: Sequence[str]) -> FinetuningError:
    location = Location(file=str(folder))
    return GuardStopped([Problem(f"the saved model failed verification: {failure}", location) for failure in failures])


def _loading_failures(folder: Path) -> list[str] | None:
    """Return what is wrong when plain transformers loads the model on the meta device; None if that is impossible.

    Weights on the meta device have names and shapes but no memory. Comparing the names in the files instead would not
    do: transformers renames and fuses weights on loading (separate experts to one tensor, say). Quantized weights
    cannot be loaded on the meta device, and custom code is not executed here.
    """
    from finetuning.model.load import task_head_for

    try:
        raw = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in raw or "auto_map" in raw:
            return None
        _, loading_info = task_head_for(raw.get("architectures") or ()).auto_class.from_pretrained(
            folder,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        return [f"transformers cannot load it: {first_line(error)}"]
    return _name_failures(
        missing=sorted(loading_info["missing_keys"]),
        extra=sorted(loading_info["unexpected_keys"]),
        misshapen=sorted(str(item[0]) for item in loading_info["mismatched_keys"]),
    )


def _compare_shapes(entries: Mapping[str, TensorEntry], expected: Mapping[str, Sequence[int]]) -> list[str]:
    return _name_failures(
        missing=sorted(set(expected) - set(entries)),
        extra=sorted(set(entries) - set(expected)),
        misshapen=sorted(name for name in set(expected) & set(entries) if tuple(expected[name]) != entries[name].shape),
    )


def _name_failures(*, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]) -> list[str]:
    return [
        f"{len(names)} tensors {what}, such as {names[0]}"
        for names, what in ((missing, "are missing"), (extra, "are unexpected"), (misshapen, "have a wrong shape"))
        if names
    ]


def _not_finite(folder: Path, entries: Mapping[str, TensorEntry]) -> list[str]:
    bad: list[str] = []
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
        # isfinite is not implemented for float8.
        tensor = tensor.float()
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_CHUNK_ELEMENTS))


def _zero_initialized(entries: Mapping[str, TensorEntry]) -> list[str]:
    return [name for name in entries if ".lora_B" in name or ".lora_embedding_B" in name]


def _not_trained(entries: Mapping[str, TensorEntry], initial: Mapping[str, str] | None) -> list[str]:
    """Return a failure if no tensor changed in training: by digest, or without digests, if every lora_B is zero.

    LoRA initializes B to zero, so a B that is still zero was never updated.
    """
    if not entries:
        return ["the adapter contains no tensors"]
    file = next(iter(entries.values())).file
    with safe_open(file, framework="pt") as tensors:
        if initial:
            if any(tensor_digest(tensors.get_tensor(name)) != initial.get(name) for name in entries):
                return []
            return [f"none of the adapter's {len(entries)} tensors changed in training"]
        zero = _zero_initialized(entries)
        if zero and all(not tensors.get_tensor(name).any() for name in zero):
            return ["every lora_B of the adapter is zero: it was not trained"]
    return []


def _tokenizer_failures(folder: Path, sample_texts: Mapping[str, Sequence[int]]) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        return [f"its tokenizer cannot be loaded: {str(error).splitlines()[0]}"]
    for text, ids in sample_texts.items():
        encoded = list(tokenizer.encode(text, add_special_tokens=False))
        if encoded != list(ids):
            return [f"its tokenizer encodes {text[:40]!r} to {encoded[:8]}, in training it was {list(ids)[:8]}"]
    return []
