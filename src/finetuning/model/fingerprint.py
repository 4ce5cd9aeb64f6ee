"""Fingerprints of models and adapters.

That of a base model lets an adapter recognize the base it was trained on under any folder name. That of an adapter
shows that its weights and settings are those that were saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from finetuning.atomic_io import block_sums
from finetuning.errors import ModelError, parse_json, read_json_object, reading
from finetuning.model.safetensors_io import (
    ADAPTER_WEIGHTS,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    TensorEntry,
    read_header,
    read_model_headers,
)

logger = logging.getLogger(__name__)

FINGERPRINT_FILE = "base_fingerprint.json"
ADAPTER_FINGERPRINT_FILE = "adapter_fingerprint.json"
_MAX_SAMPLES = 2048
_SAMPLE_BYTES = 4096
_MAX_HASHED_BYTES = 2**28
"""Models up to this size are hashed completely; of larger ones, samples and sums."""
_SAMPLES_PER_TENSOR = 16
_BUFFER_BYTES = 2**22
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
    content: str = ""
    """Of the bytes of all tensors: `sha256:` of every byte, or `sums:` of samples and sums; see `content_digest`."""
    quantization: dict[str, object] | None = None
    """The quantization with which training loaded the base (as in a `config.json`); None if it did not quantize it."""

    def loaded_as(self, model: object) -> Fingerprint:
        """Return this fingerprint with the quantization with which a model was loaded from files without one."""
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is None or quantizer.pre_quantized:
            return self
        return replace(self, quantization=json.loads(json.dumps(quantizer.quantization_config.to_dict())))

    def __str__(self) -> str:
        return f"{self.model_type}, {self.num_tensors} tensors, {self.samples[:12]}"


def fingerprint_if_possible(folder: Path) -> Fingerprint | None:
    """Return the fingerprint of the weights in a folder; None where it cannot be taken."""
    return compute_fingerprint(folder) if can_fingerprint(folder) else None


def compute_fingerprint(folder: Path) -> Fingerprint:
    """Return the fingerprint of the model in a folder. Every byte of its weights is read.

    `samples` is what earlier versions recorded: every matrix is sampled rather than the first ones, because a model
    fine-tuned from another one may share most of its tensors, embeddings above all, and in the middle, because the
    first rows of an embedding matrix are often untrained special tokens.

    Raises:
        ModelError: config.json or weights are missing or damaged.
    """
    with reading(f"{folder / 'config.json'} cannot be read"):
        config = read_json_object(folder / "config.json")
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
        content_digest(entries),
    )


def content_digest(entries: Mapping[str, TensorEntry]) -> str:
    """Return a digest of the bytes of tensors, by name; in which files they are makes no difference.

    Up to 256 MiB in total, it is the SHA-256 of every byte. Above, it covers 16 samples of 4 KiB at equal distances in
    each tensor, both ends included, and the sum of each MiB. One changed value changes it; values that swap places
    within a MiB, outside of the samples, do not. The sums take a quarter of the time of SHA-256.
    """
    is_hashed = sum(entry.num_bytes for entry in entries.values()) <= _MAX_HASHED_BYTES
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(name.encode())
        if is_hashed:
            _update_with_bytes(digest, entry)
            continue
        with entry.file.open("rb") as stream:
            for index in range(_SAMPLES_PER_TENSOR):
                last = max(entry.num_bytes - _SAMPLE_BYTES, 0)
                stream.seek(entry.start + last * index // (_SAMPLES_PER_TENSOR - 1))
                digest.update(stream.read(min(entry.num_bytes, _SAMPLE_BYTES)))
        digest.update(block_sums(entry.file, entry.start, entry.stop))
    return f"{'sha256' if is_hashed else 'sums'}:{digest.hexdigest()[:32]}"


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
    if recorded.samples != actual.samples or _contents_differ(recorded.content, actual.content):
        return "the shapes agree but the weights differ"
    if recorded.config != actual.config:
        return "the weights agree but config.json differs"
    return None


def _contents_differ(recorded: str, actual: str) -> bool:
    """Whether two digests of one kind differ. Earlier versions recorded none."""
    return recorded.partition(":")[0] == actual.partition(":")[0] and recorded != actual


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
    with reading(f"{path} cannot be read", hint="Delete it to skip this check."):
        values = read_json_object(path)
        kinds = {"num_tensors": int, "quantization": dict | None}
        if not all(isinstance(value, kinds.get(key, str)) for key, value in values.items()):
            raise ValueError("a value has a wrong type")
        return Fingerprint(**values)


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


def _update_with_bytes(digest: hashlib._Hash, entry: TensorEntry) -> None:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        remaining = entry.num_bytes
        while remaining and (data := stream.read(min(remaining, _BUFFER_BYTES))):
            digest.update(data)
            remaining -= len(data)


# Fields of adapter_config.json that name files or are set on loading, and do not change what the adapter computes.
_IGNORED_ADAPTER_FIELDS = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


def write_adapter_fingerprint(folder: Path) -> None:
    """Write the fingerprint of the adapter in a folder into it: a digest of its config, and one of each tensor."""
    values = {"config": _adapter_config_digest(folder), "tensors": _tensor_digests(folder)}
    (folder / ADAPTER_FINGERPRINT_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def check_adapter_fingerprint(folder: Path) -> bool:
    """Compare the adapter in a folder with the fingerprint that was written when it was saved.

    Returns:
        Whether there is a fingerprint; adapters of other programs and of earlier versions have none.

    Raises:
        ModelError: weights or config are not those that were saved.
    """
    path = folder / ADAPTER_FINGERPRINT_FILE
    hint = f"Copy the adapter again. If you changed it on purpose, delete {ADAPTER_FINGERPRINT_FILE}."
    try:
        recorded = parse_json(path.read_text(encoding="utf-8"))
        config, tensors = str(recorded["config"]), dict(recorded["tensors"])
    except FileNotFoundError:
        if (folder / FINGERPRINT_FILE).is_file():
            # Only this engine writes that file, and writes the other one with it.
            logger.warning("%s is missing: the adapter was not compared with what was saved", path)
        return False
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=hint) from error
    actual = _tensor_digests(folder)
    changed = sorted(name for name in {*tensors, *actual} if tensors.get(name) != actual.get(name))
    if changed:
        more = f" and {len(changed) - 1} more tensors" if len(changed) > 1 else ""
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is not what was saved: {changed[0]}{more} differ", hint=hint)
    if _adapter_config_digest(folder) != config:
        raise ModelError(f"{folder / 'adapter_config.json'} is not what was saved", hint=hint)
    return True


def _adapter_config_digest(folder: Path) -> str:
    path = folder / "adapter_config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        relevant = {key: value for key, value in config.items() if key not in _IGNORED_ADAPTER_FIELDS}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return _digest(relevant)


def _tensor_digests(folder: Path) -> dict[str, str]:
    return {
        name: content_digest({name: entry}) for name, entry in sorted(read_header(folder / ADAPTER_WEIGHTS).items())
    }
