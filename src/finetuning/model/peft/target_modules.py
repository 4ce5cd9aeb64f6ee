"""The names in `target_modules` and its like, looked up in the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedModel

from finetuning.errors import Location, ModelError
from finetuning.model.quantization import is_packed, linear_layers

ALL_LINEAR = "all-linear"


def resolve_targets(
    model: PreTrainedModel, kwargs: Mapping[str, Any], *, place: str, is_prompt: bool = False
) -> dict[str, Any]:
    """The arguments with `target_modules` as PEFT has to be told them, every name of theirs found in the model.

    A list that holds `all-linear` means all linear layers but the output layer, whatever else it holds; PEFT alone
    would take it for a module's name and adapt the others only.

    Raises:
        ModelError: a name is in no module; it gives the nearest ones.
    """
    resolved = dict(kwargs)
    targets = resolved.get("target_modules")
    if isinstance(targets, (list, tuple)) and ALL_LINEAR in targets:
        resolved["target_modules"] = targets = ALL_LINEAR
    if is_prompt:
        return resolved
    if targets == ALL_LINEAR and is_packed(model):
        # PEFT takes torch's own linear layers only, which packed ones are not.
        resolved["target_modules"] = linear_layers(model)
    names = [name for name, _ in model.named_modules() if name]
    for key in ("target_modules", "modules_to_save", "feedforward_modules", "exclude_modules"):
        wanted = resolved.get(key)
        if isinstance(wanted, str) and wanted != ALL_LINEAR and key == "target_modules":
            _check_pattern(wanted, names, Location(key=f"{place}.{key}"))
        elif isinstance(wanted, (list, tuple)):
            for name in wanted:
                _check_name(str(name), names, Location(key=f"{place}.{key}"))
    return resolved


def _check_pattern(pattern: str, names: list[str], place: Location) -> None:
    try:
        found = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ModelError(f"{pattern!r} is no regular expression: {error}", place=place) from None
    if not found:
        raise ModelError(
            f"the pattern {pattern!r} matches no module of the model",
            place=place,
            hint=f"It must match a whole name, such as {_example(names)}. {_nearest(pattern, names)}",
        )


def _check_name(wanted: str, names: list[str], place: Location) -> None:
    if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
        raise ModelError(f"the model has no module {wanted!r}", place=place, hint=_nearest(wanted, names))


def _example(names: list[str]) -> str:
    return max(names, key=lambda name: name.count("."))


def _nearest(wanted: str, names: list[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in names} - {str(number) for number in range(10_000)})
    near = get_close_matches(wanted.rpartition(".")[2], endings, 3, 0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(endings)}."
