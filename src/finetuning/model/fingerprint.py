"""Fingerprint a base model, so that an adapter recognizes the base it was trained on under any folder name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from finetuning.errors import ModelError
from finetuning.model.safetensors_io import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    TensorEntry,
    read_model_headers,
)

FINGERPRINT_FILE = "base_fingerprint.json"
_MAX_SAMPLES = 2048
_SAMPLE_BYTES = 4096
# Fields of config.json that say how a model is stored or served, not what it computes.
_IGNORED_CONFIG_FIELDS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a base model: the first 32 hex digits of SHA-256."""

    config: str
    """Of the config.json fields that affect the computation."""
    tensors: str
    """Of the names, dtypes and shapes of all tensors."""
    samples: str
    """Of 4 KiB from the middle of each tensor, for at most 2048 tensors."""
    model_type: str
    num_tensors: int

    def __str__(self) -> str:
        return f"{self.model_type}, {self.num_tensors} tensors, {self.samples[:12]}"


def compute_fingerprint(folder: Path) -> Fingerprint:
    """Return the fingerprint of the model in a folder.

    At most 8 MiB of weights are read, whatever the size of the model. Every matrix is sampled rather than the first
    ones, because a model fine-tuned from another one may share most of its tensors, embeddings above all. The middle of
    a tensor is sampled because the first rows of an embedding matrix are often untrained special tokens.

    Raises:
        ModelError: config.json or weights are missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
    relevant = {key: value for key, value in config.items() if key not in _IGNORED_CONFIG_FIELDS}
    entries = read_model_headers(folder)
    shapes = [(name, entry.dtype, list(entry.shape)) for name, entry in sorted(entries.items())]
    samples = hashlib.sha256()
    for name in _sample_names(entries):
        samples.update(name.encode())
        samples.update(_read_middle(entries[name]))
    return Fingerprint(
        _digest(relevant),
        _digest(shapes),
        samples.hexdigest()[:32],
        str(config.get("model_type", "unknown")),
        len(entries),
    )


def can_fingerprint(folder: Path) -> bool:
    """Whether a folder has a config and safetensors weights."""
    has_weights = any((folder / name).is_file() for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    return has_weights and (folder / "config.json").is_file()


def describe_difference(recorded: Fingerprint, actual: Fingerprint) -> str | None:
    """Describe how two models differ; None if they are the same."""
    if recorded.model_type != actual.model_type:
        return f"the model type was {recorded.model_type} and is {actual.model_type}"
    if recorded.num_tensors != actual.num_tensors:
        return f"it had {recorded.num_tensors} tensors and has {actual.num_tensors}"
    if recorded.tensors != actual.tensors:
        return "names, dtypes or shapes of tensors differ"
    if recorded.samples != actual.samples:
        return "the shapes agree but the weights differ"
    if recorded.config != actual.config:
        return "the weights agree but config.json differs"
    return None


def write_fingerprint(value: Fingerprint, folder: Path) -> Path:
    """Write a fingerprint to an adapter's folder; return the path of the file."""
    path = folder / FINGERPRINT_FILE
    path.write_text(json.dumps(asdict(value), indent=2) + "\n", encoding="utf-8")
    return path


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """Read the base's fingerprint from an adapter's folder; None if there is none.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        return None
    try:
        return Fingerprint(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}; delete it to skip this check") from error


def _sample_names(entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return at most `_MAX_SAMPLES` names, at regular intervals."""
    names = sorted(entries)
    return names[:: -(-len(names) // _MAX_SAMPLES) or 1]


def _read_middle(entry: TensorEntry) -> bytes:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start + max(0, (entry.num_bytes - _SAMPLE_BYTES) // 2))
        return stream.read(min(entry.num_bytes, _SAMPLE_BYTES))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
