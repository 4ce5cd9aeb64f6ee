"""Check the module names in an adapter's config against a model, which may be on the meta device.

PEFT ignores a name that matches nothing, and refuses only a `target_modules` that matches nothing at all. So do the
checks here, which add a warning with a suggestion to the former.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetuning.errors import Location, ModelError, Problem

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

ALL_LINEAR = "all-linear"
_KWARGS = "peft_conf.peft_kwargs"
_BIAS_FIELDS = ("attention_bias", "mlp_bias", "use_bias", "bias", "use_qkv_bias", "qkv_bias")
"""Fields of `config.json` that give linear layers a bias, by architecture."""
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The first number in a module's name. Source: peft 0.21.2, `check_target_module_exists`."""


def check_module_names(model: nn.Module, config: PeftConfig) -> list[Problem]:
    """Return a warning for each module name, pattern and layer index of `config` that matches nothing in the model.

    Raises:
        ModelError: nothing matches `target_modules`, or a pattern is not a regular expression; or LoRA would add a bias
            to layers that cannot have one.
    """
    names = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    targeted, problems = _check_targets(model, config, names, parameters)
    if getattr(config, "lora_bias", False) and isinstance(model, PreTrainedModel):
        _check_biases(model, targeted)
    for key in ("exclude_modules", "feedforward_modules"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            if not _matching(value, names, key):
                problems.append(_unmatched(key, value, names))
        else:
            problems += [_unmatched(key, name, names) for name in _sorted(value) if not _has_suffix(name, names)]
    for name in _sorted(getattr(config, "modules_to_save", None)):
        # PEFT compares the ends of the names without regard to dots.
        if not any(module.endswith(name) for module in names):
            problems.append(_unmatched("modules_to_save", name, names))
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or {}:
            if not _matching(rf"(.*\.)?({pattern})", [*targeted, *parameters], key):
                problems.append(_unmatched(key, pattern, targeted, what="targeted module"))
    return problems


def _check_biases(model: PreTrainedModel, targeted: Sequence[str]) -> None:
    """Check that a merged model could hold the biases that `lora_bias` trains.

    Raises:
        ModelError: a targeted layer has no bias, and the architecture cannot be built with one.
    """
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    linear = [
        name for name in targeted if isinstance(modules[name], torch.nn.Linear | Conv1D) and modules[name] is not head
    ]
    if fields_that_add_biases(model, linear) is None:
        first = without_bias(model, linear)[0]
        raise ModelError(
            f"{type(model).__name__} has no bias in {first}: what `lora_bias` trains there is part of no weights, so"
            " the adapter could be neither merged nor served by vLLM",
            location=Location(key=f"{_KWARGS}.lora_bias"),
            hint="Remove lora_bias, or target only layers that have a bias.",
        )


def without_bias(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Return those of the modules that have no bias."""
    by_name = dict(model.named_modules())
    return [name for name in modules if getattr(by_name.get(name), "bias", None) is None]


def fields_that_add_biases(model: PreTrainedModel, modules: Sequence[str]) -> dict[str, bool] | None:
    """Return the config fields, to be set to true, with which all the modules have a bias.

    {} if they have one as they are; None if the architecture has no such fields. The model may be on the meta device.
    """
    config = copy.deepcopy(model.config)
    fields: dict[str, bool] = {}
    lacking = without_bias(model, modules)
    for field in _BIAS_FIELDS:
        if not lacking or getattr(config, field, None) is not False:
            continue
        config.update({field: True})
        with torch.device("meta"):
            fewer = without_bias(type(model)._from_config(copy.deepcopy(config)), modules)
        if len(fewer) < len(lacking):
            lacking, fields[field] = fewer, True
        else:
            config.update({field: False})
    return None if lacking else fields


def fused_targets(model: nn.Module, config: PeftConfig) -> tuple[list[str], list[str]]:
    """Return the target modules that PEFT replaces by parameters in which the model has fused them, and these.

    transformers stores the weights of all experts of a layer in one parameter. PEFT translates the names of the
    modules that they were before, such as Mixtral's `w1`, `w2` and `w3`, for the model types that it knows.

    Raises:
        ModelError: only a part of the modules in one parameter is targeted.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError as error:
        raise ModelError(str(error), location=Location(key=f"{_KWARGS}.target_modules")) from error
    before, after = (_sorted(getattr(item, "target_modules", None)) for item in (config, converted))
    parameters = set(_sorted(getattr(converted, "target_parameters", None)))
    added = parameters - set(_sorted(getattr(config, "target_parameters", None)))
    return [name for name in before if name not in after], sorted(added)


def _check_targets(
    model: nn.Module, config: PeftConfig, names: Sequence[str], parameters: Sequence[str]
) -> tuple[list[str], list[Problem]]:
    """Return the names of the targeted modules, and a warning for each target that matches nothing.

    Raises:
        ModelError: nothing matches.
    """
    targets = getattr(config, "target_modules", None)
    key = "target_modules"
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return list(names), []
        targeted = _matching(targets, names, key)
        if not targeted and not fused_targets(model, config)[1]:
            example = max(names, key=lambda name: name.count("."))
            raise ModelError(
                f"the pattern {targets!r} matches no module of the model",
                location=Location(key=f"{_KWARGS}.{key}"),
                hint=f"It must match a whole name, such as {example}. {_suggest(targets, names)}",
            )
        return targeted, []
    by_target = {name: [module for module in names if _has_suffix(name, [module])] for name in _sorted(targets)}
    unmatched = [name for name, modules in by_target.items() if not modules]
    if unmatched:
        fused = fused_targets(model, config)[0]
        unmatched = [name for name in unmatched if name not in fused]
    requested = _sorted(getattr(config, "target_parameters", None))
    lost = [name for name in requested if not _has_suffix(name, parameters)]
    if by_target and len(unmatched) == len(by_target) and len(lost) == len(requested):
        raise ModelError(
            f"the model has no module {', '.join(map(repr, unmatched))}",
            location=Location(key=f"{_KWARGS}.{key}"),
            hint=_suggest(unmatched[0], names),
        )
    problems = [_unmatched(key, name, names) for name in unmatched]
    problems += [_unmatched("target_parameters", name, parameters, what="parameter") for name in lost]
    targeted = list(dict.fromkeys(module for modules in by_target.values() for module in modules))
    return targeted, [*problems, *_check_layers(config, targeted)]


def _check_layers(config: PeftConfig, targeted: Sequence[str]) -> Iterator[Problem]:
    """Yield a warning for each index in `layers_to_transform` that no targeted module has.

    Raises:
        ModelError: no targeted module has any of them.
    """
    value = getattr(config, "layers_to_transform", None)
    indices = [value] if isinstance(value, int) else list(value or [])
    # Without target_modules, PEFT chooses them by the architecture.
    if not indices or not targeted or getattr(config, "layers_pattern", None):
        return
    present = {int(match[1]) for module in targeted if (match := _LAYER_INDEX.match(module))}
    location = Location(key=f"{_KWARGS}.layers_to_transform")
    missing = [index for index in indices if index not in present]
    hint = f"They are in the layers {min(present)} to {max(present)}." if present else None
    if len(missing) == len(indices):
        raise ModelError(f"no targeted module is in the layers {indices}", location=location, hint=hint)
    for index in missing:
        yield Problem(f"no targeted module is in layer {index}, which is ignored", location, hint)


def _unmatched(key: str, name: str, names: Sequence[str], what: str = "module") -> Problem:
    message = f"the model has no {what} {name!r}, which is ignored"
    return Problem(message, Location(key=f"{_KWARGS}.{key}"), _suggest(name, names))


def _sorted(value: Iterable[str] | str | None) -> list[str]:
    return [] if value is None or isinstance(value, str) else sorted(str(name) for name in value)


def _matching(pattern: str, names: Sequence[str], key: str) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        location = Location(key=f"{_KWARGS}.{key}")
        raise ModelError(f"{pattern!r} is not a valid regular expression: {error}", location=location) from None


def _has_suffix(suffix: str, names: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for name in names)


def _suggest(module: str, names: Sequence[str]) -> str:
    # Layer indices are the last part of many names.
    suffixes = sorted({name.rpartition(".")[2] for name in names} - {str(number) for number in range(10_000)})
    near = get_close_matches(module.rpartition(".")[2], suffixes, 3, 0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"Its modules: {', '.join(suffixes)}."
