"""A model's modules by the last part of their names, and what an adapter takes of them: no weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetuning.config.sections.model import NewPeft, RunConfig
from finetuning.errors import Location, ModelError
from finetuning.model.load import LANGUAGE, TaskHead, load_config
from finetuning.model.resolve import ModelLocation, resolve_model
from finetuning.model.safetensors_io import INDEX, SINGLE, read_model_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHERE = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only")
_NO_WEIGHTS_NEEDED = {"init_lora_weights": True, "init_weights": True}
"""Arguments of adapters that may read the weights to begin from; they change no shape."""


@dataclass(frozen=True)
class ModuleGroup:
    """The modules whose names end alike."""

    name: str
    """What `target_modules` calls them: the last part of their names."""
    kind: str
    """Their class, such as Linear."""
    count: int
    shapes: tuple[tuple[int, ...], ...]
    """The different shapes of their largest weights."""
    parameters: int
    """Of all of them together, each counted where it lies: tied weights once."""
    bytes: int | None
    """In the checkpoint's files; None where those are not at hand."""
    all_linear: bool
    """Whether `target_modules: all-linear` takes them."""
    adapted: int
    """How many of them the configured adapter takes."""
    trained: int
    """Weights that the configured adapter trains in them."""


@dataclass(frozen=True)
class ModuleSummary:
    """The groups in the model's order, and the whole."""

    model: str
    architecture: str
    parameters: int
    groups: tuple[ModuleGroup, ...]
    trained: int | None
    """Weights that the adapter trains, wherever they lie; None without a new adapter."""


def summarize_modules(run_conf: RunConfig, peft_conf: Any, *, head: TaskHead = LANGUAGE) -> ModuleSummary:
    """The modules of the model that `run_conf` names, and what a new adapter of `peft_conf` would train of them.

    Raises:
        ModelError: the model is not there, its class is unknown, or a target module is not in it.
    """
    args = run_conf.model_args
    token = args.token.get_secret_value() if args.token else None
    where = {name: getattr(args, name) for name in _WHERE}
    location = resolve_model(run_conf.model, "model", key="run_conf.model", token=token, **where)
    model = _empty_model(location, args, head)
    modules = {name: module for name, module in model.named_modules() if name}
    sizes = _sizes(location)
    linear = _taken(location, args, head, NewPeft(peft_type="LORA", peft_kwargs={"target_modules": "all-linear"}))
    trained = _taken(location, args, head, peft_conf) if isinstance(peft_conf, NewPeft) else None
    members: dict[tuple[str, str], list[str]] = {}
    seen: set[int] = set()
    own: dict[str, list[torch.nn.Parameter]] = {}
    for name, module in modules.items():
        weights = [weight for weight in module.parameters(recurse=False) if id(weight) not in seen]
        seen.update(id(weight) for weight in weights)
        own[name] = weights
        if weights or next(module.parameters(recurse=False), None) is not None or name in (trained or {}):
            members.setdefault((name.rpartition(".")[2], type(module).__name__), []).append(name)
    groups = tuple(
        ModuleGroup(
            name=suffix,
            kind=kind,
            count=len(names),
            shapes=_shapes(modules[name] for name in names),
            parameters=sum(weight.numel() for name in names for weight in own[name]),
            bytes=_bytes(names, sizes),
            all_linear=all(name in linear for name in names),
            adapted=sum(name in (trained or {}) for name in names),
            trained=sum((trained or {}).get(name, 0) for name in names),
        )
        for (suffix, kind), names in members.items()
    )
    return ModuleSummary(
        model=str(location),
        architecture=type(model).__name__,
        parameters=sum(weight.numel() for weight in model.parameters()),
        groups=groups,
        trained=None if trained is None else sum(trained.values()),
    )


def _empty_model(location: ModelLocation, args: Any, head: TaskHead) -> PreTrainedModel:
    """The model without numbers in its weights."""
    config, _ = load_config(location, args)
    config.update(dict(head.fields))
    try:
        with torch.device("meta"):
            return head.loader.from_config(config, trust_remote_code=args.trust_remote_code)
    except (ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0]
        raise ModelError(f"{location} cannot be laid out: {text}", place=Location(key="run_conf.model")) from error


def _taken(location: ModelLocation, args: Any, head: TaskHead, conf: NewPeft) -> dict[str, int]:
    """The modules that an adapter takes, with the number of weights that it trains in each."""
    from peft import get_peft_model

    from finetuning.model.peft.adapters import make_peft_config

    model = _empty_model(location, args, head)
    names = [name for name, _ in model.named_modules() if name]
    kwargs = {key: _NO_WEIGHTS_NEEDED.get(key, value) for key, value in conf.peft_kwargs.items()}
    config = make_peft_config(model, conf.model_copy(update={"peft_kwargs": kwargs}), total_steps=1)
    try:
        with torch.device("meta"):
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError) as error:
        text = str(error).strip().splitlines()[0]
        raise ModelError(
            f"what {conf.peft_type} trains cannot be told without the weights: {text}", place=Location(key="peft_conf")
        ) from error
    taken: dict[str, int] = {}
    known = set(names)
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad:
            owner = _owner(name, known)
            taken[owner] = taken.get(owner, 0) + weight.numel()
    return taken


def _owner(parameter: str, modules: set[str]) -> str:
    """The module of the bare model that a weight of the wrapped one lies in; the adapter itself for any other."""
    parts = re.sub(r"\bbase_layer\.", "", parameter.removeprefix("base_model.model.")).split(".")
    for length in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:length])) in modules:
            return name
    return ""


def _shapes(modules: Iterable[torch.nn.Module]) -> tuple[tuple[int, ...], ...]:
    largest = [
        max((tuple(w.shape) for w in module.parameters(recurse=False)), key=_size, default=()) for module in modules
    ]
    return tuple(dict.fromkeys(shape for shape in largest if shape))


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _sizes(location: ModelLocation) -> dict[str, int]:
    """Bytes of each tensor in the checkpoint's files; empty where they are not at hand."""
    folder = location.folder
    if folder is None or not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        return {}
    return {name: entry.num_bytes for name, entry in read_model_headers(folder).items()}


def _bytes(names: list[str], sizes: dict[str, int]) -> int | None:
    found = [size for name in names for tensor, size in sizes.items() if tensor.rpartition(".")[0] == name]
    return sum(found) if found else None
