"""Summarize a model's modules by name suffix, and what an adapter would train, without loading weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from finetuning.config.sections.model import ModelArgs, ModelPart, NewPeft, NoPeft, PretrainedPeft, RunConfig
from finetuning.errors import Location, Problem, reading
from finetuning.model.embeddings import EmbeddingInfo
from finetuning.model.load import CAUSAL_LM, TaskHead, load_pretrained_config
from finetuning.model.resolve import ModelLocation, resolve_model
from finetuning.model.safetensors_io import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, read_model_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_ARGUMENTS = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only")
# Initializations such as PiSSA and EVA need the weights. They do not change which modules are adapted nor any shape.
_WEIGHT_FREE_INIT = {"init_lora_weights": True, "init_weights": True}


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that share the last part of their names."""

    name: str
    """The name for `target_modules`: the last part of the modules' names."""
    kind: str
    """Their class, such as Linear."""
    count: int
    shapes: tuple[tuple[int, ...], ...]
    """The distinct shapes of their largest weights."""
    parameters: int
    """Number of parameters in the group; tied weights count once, in the module that comes first."""
    bytes: int | None
    """Size in the checkpoint's files; None if those are not local."""
    all_linear: bool
    """Whether `target_modules: all-linear` selects them."""
    adapted: int
    """How many of them the configured adapter changes."""
    trained: int
    """Number of parameters that the configured adapter trains in them."""


@dataclass(frozen=True)
class ModuleSummary:
    """A model's module groups in the order of the model, and totals."""

    model: str
    architecture: str
    parameters: int
    groups: tuple[ModuleGroup, ...]
    trained: int | None
    """Number of parameters that the adapter trains; None without a new adapter."""


def summarize_modules(
    run_conf: RunConfig, peft_conf: NoPeft | PretrainedPeft | NewPeft, *, head: TaskHead = CAUSAL_LM
) -> ModuleSummary:
    """Summarize the model that `run_conf` names, and what a new adapter of `peft_conf` would train.

    Raises:
        ModelError: the model does not exist, its class is unknown, or it lacks a target module.
    """
    args = run_conf.model_args
    source = _resolve(run_conf.model, args)
    model = build_on_meta(source, args, head)
    modules = {name: module for name, module in model.named_modules() if name}
    tensor_sizes = _tensor_sizes(source)
    all_linear = NewPeft(peft_type="LORA", peft_kwargs={"target_modules": "all-linear"})
    count = partial(_trained_by_module, source, args, head, run_conf.train_parts)
    linear = count(all_linear)
    trained = count(peft_conf) if isinstance(peft_conf, NewPeft) else {}
    members: dict[tuple[str, str], list[str]] = {}
    seen: set[int] = set()
    parameters: dict[str, list[torch.nn.Parameter]] = {}
    for name, module in modules.items():
        parameters[name] = [weight for weight in module.parameters(recurse=False) if id(weight) not in seen]
        seen.update(id(weight) for weight in parameters[name])
        # A module whose only weights are tied to an earlier one's is listed too, with no parameters of its own.
        if next(module.parameters(recurse=False), None) is not None or name in trained:
            members.setdefault((name.rpartition(".")[2], type(module).__name__), []).append(name)
    groups = tuple(
        ModuleGroup(
            name=suffix,
            kind=kind,
            count=len(names),
            shapes=_shapes(modules[name] for name in names),
            parameters=sum(weight.numel() for name in names for weight in parameters[name]),
            bytes=_num_bytes(names, tensor_sizes),
            all_linear=all(name in linear for name in names),
            adapted=sum(name in trained for name in names),
            trained=sum(trained.get(name, 0) for name in names),
        )
        for (suffix, kind), names in members.items()
    )
    return ModuleSummary(
        model=str(source),
        architecture=type(model).__name__,
        parameters=sum(weight.numel() for weight in model.parameters()),
        groups=groups,
        trained=sum(trained.values()) if isinstance(peft_conf, NewPeft) else None,
    )


@dataclass(frozen=True)
class ModuleLookup:
    """What the module names in an adapter's config match."""

    warnings: tuple[Problem, ...]
    """One for each name that matches nothing and is ignored."""
    notes: tuple[str, ...]
    """What is trained."""
    trained: int | None = None
    """The number of trained parameters; None if they are not counted."""
    trained_rows: tuple[str, ...] = ()
    """Names of the embeddings of which the adapter trains the rows of new tokens only."""


def look_up_modules(
    run_conf: RunConfig, conf: NewPeft, *, head: TaskHead = CAUSAL_LM, new_ids: Sequence[int] = ()
) -> ModuleLookup:
    """Check the module names of a new adapter on the model without weights.

    Args:
        new_ids: ids of new tokens, which the adapter has to train.

    Raises:
        ModelError: no target exists, PEFT rejects the adapter, or the model's class cannot be built.
    """
    from peft import get_peft_model

    from finetuning.model.peft import adapters
    from finetuning.model.peft.module_names import check_module_names

    args = run_conf.model_args
    args = args.model_copy(update={"local_files_only": True})
    source = _resolve(run_conf.model, args)
    model = build_on_meta(source, args, head)
    conf = _without_weight_based_init(conf)
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    embeddings = EmbeddingInfo(tuple(new_ids), 0, 0, is_tied)
    config = adapters.make_peft_config(
        model, conf, embeddings=embeddings, total_steps=1, check_names=False, parts=run_conf.train_parts
    )
    trained_rows = tuple(getattr(config, "trainable_token_indices", None) or ()) if new_ids else ()
    warnings = [*check_module_names(model, config), *adapters.unused_settings(conf, config)]
    if trained_rows or adapters.peft_type_of(config) != "LORA":
        return ModuleLookup(tuple(warnings), (), None, trained_rows)
    targets = adapters.target_names(config)
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError) as error:
        raise adapters.rejected_by_peft(error, conf.peft_type) from error
    parameters = sum(weight.numel() for weight in adapted.parameters())
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    notes = [f"{trained:,} of {parameters:,} parameters ({100 * trained / max(parameters, 1):.3g} %)"]
    notes += adapters.fused_targets_note(targets, adapters.target_names(config))
    return ModuleLookup(tuple(warnings), tuple(notes), trained, trained_rows)


def _resolve(model: str, args: ModelArgs) -> ModelLocation:
    token = args.token.get_secret_value() if args.token else None
    hub_arguments = {name: getattr(args, name) for name in _HUB_ARGUMENTS}
    return resolve_model(model, "model", key="run_conf.model", token=token, **hub_arguments)


def _without_weight_based_init(conf: NewPeft) -> NewPeft:
    kwargs = {key: _WEIGHT_FREE_INIT.get(key, value) for key, value in conf.peft_kwargs.items()}
    return conf.model_copy(update={"peft_kwargs": kwargs})


def build_on_meta(source: ModelLocation, args: ModelArgs, head: TaskHead) -> PreTrainedModel:
    """Build the model on the meta device: names and shapes, no memory."""
    config, _ = load_pretrained_config(source, args)
    config.update(dict(head.config_fields))
    location = Location(key="run_conf.model")
    with reading(f"the model class of {source} cannot be built", location=location), torch.device("meta"):
        return head.for_config(config).auto_class.from_config(config, trust_remote_code=args.trust_remote_code)


def _trained_by_module(
    source: ModelLocation, args: ModelArgs, head: TaskHead, parts: Sequence[ModelPart], conf: NewPeft
) -> dict[str, int]:
    """Return the number of parameters that an adapter trains, by module of the base model.

    Raises:
        ModelError: the adapter does not fit the model, or cannot be built without weights.
    """
    from peft import get_peft_model

    from finetuning.model.peft.adapters import make_peft_config

    model = build_on_meta(source, args, head)
    module_names = {name for name, _ in model.named_modules() if name}
    config = make_peft_config(model, _without_weight_based_init(conf), total_steps=1, parts=parts)
    problem = f"cannot determine what {conf.peft_type} trains without loading the weights"
    with reading(problem, location=Location(key="peft_conf")), torch.device("meta"):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained: dict[str, int] = {}
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            module = _base_module(name, module_names)
            trained[module] = trained.get(module, 0) + weight.numel()
    return trained


def _base_module(parameter: str, module_names: set[str]) -> str:
    """Return the base model's module that a PEFT model's parameter belongs to; "" for none, as with prompt tuning."""
    parts = re.sub(r"\bbase_layer\.", "", parameter.removeprefix("base_model.model.")).split(".")
    for length in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:length])) in module_names:
            return name
    return ""


def _shapes(modules: Iterable[torch.nn.Module]) -> tuple[tuple[int, ...], ...]:
    largest = [
        max((tuple(weight.shape) for weight in module.parameters(recurse=False)), key=_numel, default=())
        for module in modules
    ]
    return tuple(dict.fromkeys(shape for shape in largest if shape))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _tensor_sizes(source: ModelLocation) -> dict[str, int]:
    """Return the size in bytes of each tensor in the checkpoint's files; empty if they are not local."""
    folder = source.folder
    if folder is None or not any((folder / name).is_file() for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)):
        return {}
    return {name: entry.num_bytes for name, entry in read_model_headers(folder).items()}


def _num_bytes(names: list[str], tensor_sizes: Mapping[str, int]) -> int | None:
    sizes = [size for name in names for tensor, size in tensor_sizes.items() if tensor.rpartition(".")[0] == name]
    return sum(sizes) if sizes else None
