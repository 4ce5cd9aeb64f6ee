"""Number types that the device of a run lacks are refused before its weights are loaded."""

from __future__ import annotations

from typing import Any

from finetuning.config.experiment import Experiment
from finetuning.errors import ConfigError, Place, Problem
from finetuning.model.machine import Device, training_device

_INSTEAD = {
    "bf16": "Set bf16: false; fp16: true where the device has it.",
    "fp16": "Set fp16: false; bf16: true where the device has it.",
    "tf32": "Remove it.",
}
_ASKED_BY = {"bf16": ("bf16", "bf16_full_eval"), "fp16": ("fp16",), "tf32": ("tf32",)}


def check_precision(experiment: Experiment, device: Device | None = None) -> None:
    """Nothing when the device computes in all that is asked for. `finetuning doctor` shows what it can.

    Raises:
        ConfigError: every number type that it lacks, with what is in the way.
    """
    args = experiment.training_args
    passed_on: dict[str, Any] = args.model_extra or {}
    asked = {
        key: ability
        for ability, keys in _ASKED_BY.items()
        for key in keys
        if getattr(args, key, None) or passed_on.get(key)
    }
    if not asked:
        return
    device = device or training_device(bool(passed_on.get("use_cpu")))
    found = {key: device.can(ability) for key, ability in asked.items()}
    problems = [
        Problem(
            f"is true, but {device.name} does not compute in {asked[key]}: {ability.note}",
            Place(key=f"training_args.{key}"),
            _INSTEAD[asked[key]],
        )
        for key, ability in found.items()
        if not ability.ok
    ]
    if problems:
        raise ConfigError(problems)
