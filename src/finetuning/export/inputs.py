"""Read the inputs of an export from a folder or the hub: base model, adapter and tokenizer, by their headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.distributed import announce_wait
from finetuning.errors import ModelError, read_json_object, reading
from finetuning.model.fingerprint import check_adapter_fingerprint
from finetuning.model.resolve import RepoKind, resolve_model
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS, TensorEntry, read_header, read_model_headers

ADAPTER_CONFIG = "adapter_config.json"
PICKLED_ADAPTER = ("adapter_model.bin", "adapter_model.pt")
PICKLED_MODEL = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: its config and the headers of its tensors."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    """Tensors by their names in the file; empty if the weights are pickled."""
    pickled: bool = False
    has_fingerprint: bool = False
    """Whether weights and config were compared with the fingerprint that was written when they were saved."""

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type", "")).upper()

    @property
    def task_type(self) -> str:
        return str(self.config.get("task_type") or "")


@dataclass(frozen=True)
class BaseModel:
    """A saved base model: its config and the headers of its tensors."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    """Tensors by their names in the files; empty if the weights are pickled."""
    pickled: bool = False

    @property
    def num_bytes(self) -> int:
        if self.pickled:
            return sum(file.stat().st_size for file in self.folder.glob("pytorch_model*.bin"))
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config of a multimodal model; else the whole config."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config


def resolve_folder(name: str, kind: RepoKind) -> Path:
    """Return the folder with the files of `name`; a hub id is downloaded to the hub's cache first.

    Raises:
        ModelError: there is no such folder or repository.
    """
    location = resolve_model(name, kind)
    if location.folder is not None:
        return location.folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
    with announce_wait(f"the download of {location}"):
        return Path(snapshot_download(location.name, allow_patterns=patterns, **location.hub_kwargs))


def read_adapter(name: str, *, allow_pickle: bool | None = None) -> Adapter:
    """Read the adapter in a folder or on the hub.

    Args:
        allow_pickle: whether pickled weights are accepted; None for commands without the option --allow-pickle.

    Raises:
        ModelError: it is missing or damaged, differs from its fingerprint, or is pickled although that is not allowed.
    """
    folder = resolve_folder(name, "adapter")
    config = read_json(folder / ADAPTER_CONFIG)
    if not config.get("peft_type"):
        raise ModelError(f"{folder / ADAPTER_CONFIG} has no peft_type: this is not a PEFT adapter")
    if (folder / ADAPTER_WEIGHTS).is_file():
        entries = read_header(folder / ADAPTER_WEIGHTS)
        # X-LoRA saves its weights under other file names.
        if not entries and str(config["peft_type"]).upper() != "XLORA":
            raise ModelError(f"{folder / ADAPTER_WEIGHTS} contains no tensors: the adapter was not saved completely")
        return Adapter(folder, config, entries, has_fingerprint=check_adapter_fingerprint(folder))
    pickle = next((folder / name for name in PICKLED_ADAPTER if (folder / name).is_file()), None)
    if pickle is None:
        raise ModelError(f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
    _refuse_pickle(pickle, allow_pickle)
    return Adapter(folder, config, {}, pickled=True)


def read_base(name: str, *, allow_pickle: bool = False) -> BaseModel:
    """Read the base model in a folder or on the hub.

    Raises:
        ModelError: it or one of its shards is missing or damaged, or it is pickled although that is not allowed.
    """
    folder = resolve_folder(name, "model")
    config = read_json(folder / "config.json")
    pickle = next((folder / name for name in PICKLED_MODEL if (folder / name).is_file()), None)
    if pickle is not None and not any(folder.glob("model*.safetensors*")):
        _refuse_pickle(pickle, allow_pickle)
        return BaseModel(folder, config, {}, pickled=True)
    return BaseModel(folder, config, read_model_headers(folder))


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelError: the file is missing, or is not a JSON object.
    """
    if not file.is_file():
        raise ModelError(f"{file} is missing")
    with reading(f"{file} cannot be read"):
        return read_json_object(file)


def _refuse_pickle(file: Path, allowed: bool | None) -> None:
    remedy = "use --allow-pickle" if allowed is not None else "load it with PEFT and save it as safetensors"
    if not allowed:
        raise ModelError(
            f"{file} is a pickle file, which can execute code when it is loaded; only safetensors files are read.",
            hint=f"If you trust its source, {remedy}.",
        )
