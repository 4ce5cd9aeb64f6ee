"""What the device of a run cannot do is refused before its weights are loaded."""

from __future__ import annotations

from typing import Any

from finetuning.config.sections.experiment import Experiment
from finetuning.errors import ConfigError, Place, Problem
from finetuning.model.hardware import Device, training_device
from finetuning.plan.compatibility import NEEDS_GPU

_INSTEAD = {
    "bf16": "Set bf16: false; fp16: true where the device has it.",
    "fp16": "Set fp16: false; bf16: true where the device has it.",
    "tf32": "Remove it.",
}
_ASKED_BY = {"bf16": ("bf16", "bf16_full_eval"), "fp16": ("fp16",), "tf32": ("tf32",)}


def check_device(experiment: Experiment, device: Device | None = None) -> None:
    """Nothing when the run's device can do what is asked for: its number types, and what only a GPU can.

    Raises:
        ConfigError: everything that it lacks.
        ModelError: there is no such attention implementation, or it needs another device.
        MissingPackageError: the attention implementation is not installed.
    """
    check_precision(experiment, device)
    args = experiment.training_args
    passed_on: dict[str, Any] = args.model_extra or {}
    device = device or training_device(bool(passed_on.get("use_cpu")))
    _check_attention(experiment, device)
    asked = [key for key in NEEDS_GPU if getattr(args, key, None) or passed_on.get(key)]
    if asked and device.kind == "cpu":
        raise ConfigError(
            [
                Problem(
                    f"is true, but needs a GPU: {NEEDS_GPU[key][0]}",
                    Place(key=f"training_args.{key}"),
                    NEEDS_GPU[key][1],
                )
                for key in asked
            ]
        )


def _check_attention(experiment: Experiment, device: Device) -> None:
    implementation = experiment.run_conf.model_args.attn_implementation
    if implementation is None:
        return
    from finetuning.model.load import check_attention

    check_attention(implementation)
    if implementation == "flex_attention" and device.kind == "cpu":
        raise ConfigError(
            "flex_attention has no backward pass on a CPU",
            place=Place(key="run_conf.model_args.attn_implementation"),
            hint="Use sdpa here.",
        )


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


def computing(experiment: Experiment, model: Any, device: Device | None = None) -> tuple[str, str]:
    """What the run computes in; and what its device has that is faster, nothing where nothing is known to be."""
    args = experiment.training_args
    weights = str(model.dtype).removeprefix("torch.")
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if autocast:
        return f"{autocast} by autocast, the weights in {weights}", ""
    if args.deepspeed or weights != "float32":
        return weights, ""
    device = device or training_device(bool((args.model_extra or {}).get("use_cpu")))
    ability = device.can("bf16")
    if not ability.ok or ability.note.startswith("emulated"):
        return weights, ""
    return weights, f"{device.name} has bfloat16 in hardware, which training_args.bf16 uses"
