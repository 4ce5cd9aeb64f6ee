"""`finetuning doctor`: what this machine can use, and what is missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.cli.errors import run
from finetuning.config.attention import FLASH
from finetuning.errors import EXIT_OK, EXIT_USER

if TYPE_CHECKING:
    from finetuning.model.hardware import Device, Machine

_REINSTALL = "pip install --force-reinstall finetuning"


@dataclass(frozen=True)
class Package:
    """A package by the name it is imported and installed by, what it is for, and the line that installs it."""

    module: str
    distribution: str
    use: str
    install: str
    is_needed: bool = False
    needs_gpu: bool = False


PACKAGES = (
    *(
        Package(name, name, use, _REINSTALL, is_needed=True)
        for name, use in (
            ("transformers", "models and the trainer"),
            ("trl", "preference methods"),
            ("peft", "adapters"),
            ("accelerate", "several processes"),
            ("datasets", "rows"),
        )
    ),
    Package("bitsandbytes", "bitsandbytes", "8 and 4 bit weights, 8 bit optimizers", "pip install bitsandbytes"),
    Package("mlflow", "mlflow", "tracking", "pip install mlflow"),
    Package(
        "liger_kernel", "liger-kernel", "training_args.use_liger_kernel", "pip install 'finetuning[liger]'", False, True
    ),
    Package("deepspeed", "deepspeed", "training_args.deepspeed", "pip install 'finetuning[deepspeed]'", False, True),
    Package("gptqmodel", "gptqmodel", "GPTQ checkpoints", "pip install 'finetuning[gptq]'"),
    Package("optimum", "optimum", "GPTQ checkpoints", "pip install 'finetuning[gptq]'"),
    Package(
        "opentelemetry.exporter.otlp.proto.http",
        "opentelemetry-exporter-otlp-proto-http",
        "telemetry over the network",
        "pip install 'finetuning[otlp]'",
    ),
    Package("schedulefree", "schedulefree", "optim: schedule_free_adamw", "pip install 'finetuning[schedule-free]'"),
    Package(
        "torchao",
        "torchao",
        "quant_conf: torchao; optim: adamw_torch_4bit and adamw_torch_8bit",
        "pip install 'finetuning[torchao]'",
    ),
    Package("fsspec", "fsspec", "run_conf.copy_checkpoints_to", "pip install fsspec"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code: 1 when something is missing that every run needs."""
    return run(_examine, argv)


def _examine(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="finetuning doctor", description="Show what this machine can use, and how to install what is missing."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output-dir", default=".", help="folder whose disk runs write to (default: this one)")
    options = parser.parse_args(argv)
    if not is_there("torch"):
        print("torch is missing: " + _REINSTALL)
        return EXIT_USER
    from finetuning.model.hardware import look_at_machine

    machine = look_at_machine(Path(options.output_dir))
    packages = {package.module: found_version(package) for package in PACKAGES}
    attention = attention_of(machine, [name for name, package in FLASH.items() if package.is_installed])
    if options.json:
        shown = {"machine": asdict(machine), "packages": packages, "attention": attention}
        print(json.dumps(shown | {"missing": _missing(packages)}, indent=2))
    else:
        for line in [*_machine_lines(machine), *_attention_lines(attention), *_package_lines(packages, machine)]:
            print(line)
    return EXIT_USER if any(package.is_needed and packages[package.module] is None for package in PACKAGES) else EXIT_OK


def is_there(module: str) -> bool:
    """Whether a module can be imported, found without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def found_version(package: Package) -> str | None:
    """The version that is installed; None without one."""
    if not is_there(package.module):
        return None
    try:
        return version(package.distribution)
    except PackageNotFoundError:
        return "unknown"


def attention_of(machine: Machine, installed: Sequence[str]) -> dict[str, str | None]:
    """Each attention implementation with what is in its way; None where nothing is."""
    has_gpu = any(device.kind == "cuda" for device in machine.devices)
    found: dict[str, str | None] = {"eager": None, "sdpa": None}
    found["flex_attention"] = None if has_gpu else "no backward pass on a CPU"
    for name, package in FLASH.items():
        missing = None if name in installed else package.install
        found[name] = missing if has_gpu else "needs a CUDA or ROCm device"
    return found


def _missing(packages: Mapping[str, str | None]) -> dict[str, str]:
    return {package.module: package.install for package in PACKAGES if packages[package.module] is None}


def _machine_lines(machine: Machine) -> list[str]:
    lines = [
        f"python     {machine.python}",
        f"torch      {machine.torch}, built for {machine.build}",
        f"machine    {machine.cores} cores, memory {_room(machine.free, machine.memory)},"
        f" disk {_gib(machine.disk_free)} free",
    ]
    for device in machine.devices:
        where = "cpu" if device.kind == "cpu" else "accelerator"
        lines.append(f"{where:<10} {device.name}{_memory_of(device)}: {'; '.join(map(str, device.abilities))}")
    if len(machine.devices) == 1:
        why = (
            "torch was built for the CPU only"
            if machine.build == "CPU"
            else f"torch, built for {machine.build}, sees none"
        )
        lines.append(f"no accelerator: {why}. Builds for CUDA and ROCm: https://pytorch.org/get-started/locally")
    return lines


def _memory_of(device: Device) -> str:
    return "" if device.kind == "cpu" or device.memory is None else f", memory {_room(device.free, device.memory)}"


def _attention_lines(attention: Mapping[str, str | None]) -> list[str]:
    lines = ["attention"]
    return lines + [
        f"  {name:<18} {'yes' if trouble is None else f'no: {trouble}'}" for name, trouble in attention.items()
    ]


def _package_lines(packages: Mapping[str, str | None], machine: Machine) -> list[str]:
    lines = ["packages"]
    has_gpu = len(machine.devices) > 1
    for package in PACKAGES:
        found: Any = packages[package.module]
        gpu = " (needs a GPU)" if found is None and package.needs_gpu and not has_gpu else ""
        state = found or f"missing{gpu}: {package.install}"
        lines.append(f"  {package.distribution:<38} {state}  [{package.use}]")
    return lines


def _room(free: int | None, total: int | None) -> str:
    return "unknown" if free is None or total is None else f"{_gib(free)} free of {_gib(total)}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
