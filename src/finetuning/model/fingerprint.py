"""Which base model an adapter was trained on, recognised again whatever its folder is called."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import ModelError
from finetuning.model.safetensors_io import INDEX, SINGLE, TensorEntry, read_model_headers

FILE_NAME = "base_fingerprint.json"
_MAX_SAMPLES = 2048
_SAMPLE_BYTES = 4096
# Says how a model is stored or served, not what it computes.
_INCIDENTAL = (
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
    """Digests of a base model: SHA-256, the first 32 hex digits."""

    config: str
    """Of the fields of config.json that the computation depends on."""
    tensors: str
    """Of the names, number types and shapes of all tensors."""
    samples: str
    """Of 4 KiB out of the middle of each tensor, of 2048 tensors at most."""
    model_type: str
    num_tensors: int

    def __str__(self) -> str:
        return f"{self.model_type}, {self.num_tensors} tensors, {self.samples[:12]}"


def fingerprint(folder: Path) -> Fingerprint:
    """The fingerprint of a model's folder.

    Of the weights at most 8 MiB are read, whatever the model's size. Every matrix is looked into, because a model
    tuned from another one shares most of its tensors.

    Raises:
        ModelError: config.json or weights are missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
    essential = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    entries = read_model_headers(folder)
    shapes = [(name, entry.dtype, list(entry.shape)) for name, entry in sorted(entries.items())]
    samples = hashlib.sha256()
    for name in _sample(entries):
        samples.update(name.encode())
        samples.update(_middle(entries[name]))
    return Fingerprint(
        _digest(essential),
        _digest(shapes),
        samples.hexdigest()[:32],
        str(config.get("model_type", "unknown")),
        len(entries),
    )


def can_fingerprint(folder: Path) -> bool:
    """True for a folder with a config and safetensors weights."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (INDEX, SINGLE))


def difference(recorded: Fingerprint, found: Fingerprint) -> str | None:
    """In words, what sets two models apart; None when they are the same."""
    if recorded.model_type != found.model_type:
        return f"it was a {recorded.model_type}, this is a {found.model_type}"
    if recorded.num_tensors != found.num_tensors:
        return f"it had {recorded.num_tensors} tensors, this has {found.num_tensors}"
    if recorded.tensors != found.tensors:
        return "tensors have other names, types or shapes"
    if recorded.samples != found.samples:
        return "the shapes agree but the weights do not"
    if recorded.config != found.config:
        return "the weights agree but config.json computes something else"
    return None


def write(value: Fingerprint, folder: Path) -> Path:
    """The file, written beside an adapter."""
    path = folder / FILE_NAME
    path.write_text(json.dumps(asdict(value), indent=2) + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> Fingerprint | None:
    """The fingerprint that lies beside an adapter; None when there is none.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return Fingerprint(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}; remove it to go without this check") from error


def _sample(entries: dict[str, TensorEntry]) -> list[str]:
    names = sorted(entries)
    return names[:: -(-len(names) // _MAX_SAMPLES) or 1]


def _middle(entry: TensorEntry) -> bytes:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start + max(0, (entry.num_bytes - _SAMPLE_BYTES) // 2))
        return stream.read(min(entry.num_bytes, _SAMPLE_BYTES))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
