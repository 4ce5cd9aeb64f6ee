"""The folders that an export reads: a base model, an adapter, a tokenizer; here, or fetched from the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import ModelError
from finetuning.model.resolve import RepoKind, resolve_model
from finetuning.model.safetensors_io import TensorEntry, read_header, read_model_headers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTER = ("adapter_model.bin", "adapter_model.pt")
PICKLED_MODEL = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is stored: its config and the headers of its tensors."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    """Tensors by the names in the file; empty where the weights are pickled."""
    pickled: bool = False

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type", "")).upper()

    @property
    def task_type(self) -> str:
        return str(self.config.get("task_type") or "")


@dataclass(frozen=True)
class BaseModel:
    """A base model as it is stored: its config and the headers of its tensors."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    """Tensors by the names in the files; empty where the weights are pickled."""
    pickled: bool = False

    @property
    def num_bytes(self) -> int:
        if self.pickled:
            return sum(file.stat().st_size for file in self.folder.glob("pytorch_model*.bin"))
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that speaks of the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config


def resolve_folder(name: str, kind: RepoKind) -> Path:
    """The folder that holds the files of `name`; a hub id is downloaded into the hub's cache.

    Raises:
        ModelError: nothing is there.
    """
    location = resolve_model(name, kind)
    if location.folder is not None:
        return location.folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
    return Path(snapshot_download(location.name, allow_patterns=patterns, **location.hub_kwargs))


def read_adapter(name: str, *, allow_pickle: bool | None = None) -> Adapter:
    """The adapter in a folder or on the hub. `allow_pickle` is None where no option allows it.

    Raises:
        ModelError: it is missing, damaged, or pickled and that was not allowed.
    """
    folder = resolve_folder(name, "adapter")
    config = read_json(folder / ADAPTER_CONFIG)
    if not config.get("peft_type"):
        raise ModelError(f"{folder / ADAPTER_CONFIG} names no peft_type; it is no PEFT adapter")
    if (folder / ADAPTER_WEIGHTS).is_file():
        entries = read_header(folder / ADAPTER_WEIGHTS)
        # X-LoRA keeps its weights in files of other names.
        if not entries and str(config["peft_type"]).upper() != "XLORA":
            raise ModelError(f"{folder / ADAPTER_WEIGHTS} holds no tensor at all; the adapter was not saved whole")
        return Adapter(folder, config, entries)
    pickle = next((folder / name for name in PICKLED_ADAPTER if (folder / name).is_file()), None)
    if pickle is None:
        raise ModelError(f"{folder} holds {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
    _refuse_pickle(pickle, allow_pickle)
    return Adapter(folder, config, {}, pickled=True)


def read_base(name: str, *, allow_pickle: bool = False) -> BaseModel:
    """The base model in a folder or on the hub.

    Raises:
        ModelError: it is missing, a shard is missing or damaged, or it is pickled and that was not allowed.
    """
    folder = resolve_folder(name, "model")
    config = read_json(folder / "config.json")
    pickle = next((folder / name for name in PICKLED_MODEL if (folder / name).is_file()), None)
    if pickle is not None and not any(folder.glob("model*.safetensors*")):
        _refuse_pickle(pickle, allow_pickle)
        return BaseModel(folder, config, {}, pickled=True)
    return BaseModel(folder, config, read_model_headers(folder))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is no JSON object")
    return value


def _refuse_pickle(file: Path, allowed: bool | None) -> None:
    option = "say --allow-pickle" if allowed is not None else "load it with PEFT and save it again"
    if not allowed:
        raise ModelError(
            f"{file} is a pickle, which can run code when it is opened; only safetensors files are read.",
            hint=f"If you trust where it comes from, {option}.",
        )
