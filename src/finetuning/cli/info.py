"""`finetuning doctor`: what this machine can use, and what is missing.

`finetuning targets`: the names that `target_modules` may hold, with their sizes.

`finetuning schema`: the JSON Schema of a method's YAML, for editors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.cli.errors import run_command
from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.errors import EXIT_OK, EXIT_USER, ConfigError

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import Experiment
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.model.hardware import Device, Hardware
    from finetuning.model.module_summary import ModuleSummary

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


def doctor_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code: 1 when something is missing that every run needs."""
    return run_command(_examine, argv)


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
    from finetuning.model.hardware import detect_hardware

    machine = detect_hardware(Path(options.output_dir))
    packages = {package.module: found_version(package) for package in PACKAGES}
    attention = attention_of(
        machine, [name for name, package in FLASH_ATTENTION_PACKAGES.items() if package.is_installed]
    )
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


def attention_of(machine: Hardware, installed: Sequence[str]) -> dict[str, str | None]:
    """Each attention implementation with what is in its way; None where nothing is."""
    has_gpu = any(device.kind == "cuda" for device in machine.devices)
    found: dict[str, str | None] = {"eager": None, "sdpa": None}
    found["flex_attention"] = None if has_gpu else "no backward pass on a CPU"
    for name, package in FLASH_ATTENTION_PACKAGES.items():
        missing = None if name in installed else package.install
        found[name] = missing if has_gpu else "needs a CUDA or ROCm device"
    return found


def _missing(packages: Mapping[str, str | None]) -> dict[str, str]:
    return {package.module: package.install for package in PACKAGES if packages[package.module] is None}


def _machine_lines(machine: Hardware) -> list[str]:
    lines = [
        f"python     {machine.python}",
        f"torch      {machine.torch}, built for {machine.build}",
        f"machine    {machine.cores} cores, memory {_room(machine.free, machine.memory)},"
        f" disk {_gib(machine.disk_free)} free",
    ]
    for device in machine.devices:
        where = "cpu" if device.kind == "cpu" else "accelerator"
        lines.append(f"{where:<10} {device.name}{_memory_of(device)}: {'; '.join(map(str, device.dtypes))}")
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


def _package_lines(packages: Mapping[str, str | None], machine: Hardware) -> list[str]:
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


def targets_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_show, argv)


def _show(argv: Sequence[str]) -> int:
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document

    parser = argparse.ArgumentParser(
        prog="finetuning targets",
        description="List a model's modules by the last part of their names, with counts, shapes and sizes, and what"
        " peft_conf trains in each. No weight is loaded.",
    )
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(argv)
    experiment = read_experiment(apply_overrides(read_document(options.config), options.overrides))

    from finetuning.algorithms import ALGORITHMS
    from finetuning.cli.status import quiet_libraries
    from finetuning.model.load import CAUSAL_LM, SEQUENCE_CLASSIFICATION
    from finetuning.model.module_summary import summarize_modules

    quiet_libraries()
    head = SEQUENCE_CLASSIFICATION if ALGORITHMS[experiment.method_name].has_score_head else CAUSAL_LM
    inventory = summarize_modules(experiment.run_conf, experiment.peft_conf, head=head)
    if options.json:
        print(json.dumps(asdict(inventory), indent=2))
    else:
        for line in lines_of(inventory):
            print(line)
    return 0


def read_experiment(document: ConfigDocument) -> Experiment:
    """The experiment of the method that the file names, or of the first one whose YAML it is.

    Raises:
        ConfigError: it is no method's YAML; with what is wrong with it as its own method's, or as one of sft.
    """
    from finetuning.config.sections.experiment import EXPERIMENTS
    from finetuning.config.validation.validate import validate

    named = document.values.get("method")
    classes = [EXPERIMENTS[named]] if named in EXPERIMENTS else list(EXPERIMENTS.values())
    first: ConfigError | None = None
    for experiment in classes:
        try:
            return validate(document, experiment).experiment
        except ConfigError as error:
            first = first or error
    raise first or ConfigError("there is no method")


def lines_of(inventory: ModuleSummary) -> list[str]:
    """The inventory as a table for people."""
    header = ("module", "class", "count", "shape", "parameters", "size", "all-linear", "trained by peft_conf")
    rows = [header]
    for group in inventory.groups:
        shapes = " ".join("x".join(map(str, shape)) for shape in group.shapes[:3])
        trained = f"{group.trained:,}" if group.trained else "-"
        if group.trained and group.adapted < group.count:
            trained += f" in {group.adapted} of {group.count}"
        rows.append(
            (
                group.name,
                group.kind,
                str(group.count),
                shapes + (" …" if len(group.shapes) > 3 else ""),
                f"{group.parameters:,}" if group.parameters else "tied",
                "-" if group.bytes is None else _human(group.bytes),
                "yes" if group.all_linear else "-",
                trained,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = f"{inventory.model}: {inventory.architecture}, {inventory.parameters:,} parameters"
    if inventory.trained is not None:
        share = 100 * inventory.trained / max(inventory.parameters, 1)
        total += f"; peft_conf trains {inventory.trained:,} ({share:.3g} %)"
    return [total, "", *told]


def _human(count: int) -> str:
    from finetuning.plan.plan import format_bytes

    return format_bytes(count)


def schema_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_print_schema, argv)


def _print_schema(argv: Sequence[str]) -> int:
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.schema.json_schema import schema_text

    parser = argparse.ArgumentParser(
        prog="finetuning schema",
        description="Print the JSON Schema of a method's YAML. Editors take it from a first line such as"
        " '# yaml-language-server: $schema=sft.json'.",
    )
    parser.add_argument("method", choices=list(ALGORITHMS), help="the method")
    print(schema_text(ALGORITHMS[parser.parse_args(argv).method].experiment), end="")
    return 0
