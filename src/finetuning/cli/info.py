"""`finetuning doctor` and `finetuning targets`: information about the machine and the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, run_command
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
    """A package: its import name, its distribution, what it is used for, and the command that installs it."""

    module: str
    distribution: str
    use: str
    install: str
    is_required: bool = False
    requires_gpu: bool = False


PACKAGES = (
    *(
        Package(name, name, use, _REINSTALL, is_required=True)
        for name, use in (
            ("transformers", "models and the trainer"),
            ("trl", "preference training"),
            ("peft", "adapters"),
            ("accelerate", "distributed training"),
            ("datasets", "datasets from files and the hub"),
        )
    ),
    Package("bitsandbytes", "bitsandbytes", "8-bit and 4-bit weights, 8-bit optimizers", "pip install bitsandbytes"),
    Package("mlflow", "mlflow", "experiment tracking", "pip install mlflow"),
    Package(
        "liger_kernel", "liger-kernel", "training_args.use_liger_kernel", "pip install 'finetuning[liger]'", False, True
    ),
    Package("deepspeed", "deepspeed", "training_args.deepspeed", "pip install 'finetuning[deepspeed]'", False, True),
    Package("gptqmodel", "gptqmodel", "GPTQ checkpoints", "pip install 'finetuning[gptq]'"),
    Package("optimum", "optimum", "GPTQ checkpoints", "pip install 'finetuning[gptq]'"),
    Package(
        "opentelemetry.exporter.otlp.proto.http",
        "opentelemetry-exporter-otlp-proto-http",
        "telemetry export over OTLP",
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
    """Run `finetuning doctor` and return its exit code: 1 if a required package is missing."""
    return run_command(_doctor, argv)


def _doctor(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="finetuning doctor",
        description="Show hardware, attention implementations and installed packages, and how to install missing ones.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output-dir", default=".", help="folder whose free disk space is shown (default: the current one)"
    )
    options = parser.parse_args(argv)
    if not is_installed("torch"):
        print("torch is not installed: " + _REINSTALL)
        return EXIT_USER
    from finetuning.model.hardware import detect_hardware

    machine = detect_hardware(Path(options.output_dir))
    packages = {package.module: installed_version(package) for package in PACKAGES}
    attention = attention_support(
        machine, [name for name, package in FLASH_ATTENTION_PACKAGES.items() if package.is_installed]
    )
    if options.json:
        result = {"machine": asdict(machine), "packages": packages, "attention": attention}
        print(json.dumps(result | {"missing": _missing(packages)}, indent=2))
    else:
        for line in [*_machine_lines(machine), *_attention_lines(attention), *_package_lines(packages, machine)]:
            print(line)
    return (
        EXIT_USER if any(package.is_required and packages[package.module] is None for package in PACKAGES) else EXIT_OK
    )


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def installed_version(package: Package) -> str | None:
    """Return the installed version; None if the package is missing."""
    if not is_installed(package.module):
        return None
    try:
        return version(package.distribution)
    except PackageNotFoundError:
        return "unknown"


def attention_support(machine: Hardware, installed: Sequence[str]) -> dict[str, str | None]:
    """Return for each attention implementation why it cannot be used, or None if it can."""
    has_gpu = any(device.kind == "cuda" for device in machine.devices)
    support: dict[str, str | None] = {"eager": None, "sdpa": None}
    support["flex_attention"] = None if has_gpu else "no backward pass on a CPU"
    for name, package in FLASH_ATTENTION_PACKAGES.items():
        missing = None if name in installed else package.install
        support[name] = missing if has_gpu else "needs a CUDA or ROCm device"
    return support


def _missing(packages: Mapping[str, str | None]) -> dict[str, str]:
    return {package.module: package.install for package in PACKAGES if packages[package.module] is None}


def _machine_lines(machine: Hardware) -> list[str]:
    lines = [
        f"python     {machine.python}",
        f"torch      {machine.torch}, built for {machine.build}",
        f"machine    {machine.cores} cores, memory {_free_of(machine.free, machine.memory)},"
        f" disk {_gib(machine.disk_free)} free",
    ]
    for device in machine.devices:
        label = "cpu" if device.kind == "cpu" else "accelerator"
        lines.append(f"{label:<10} {device.name}{_memory_of(device)}: {'; '.join(map(str, device.dtypes))}")
    if len(machine.devices) == 1:
        reason = (
            "torch was built for the CPU only"
            if machine.build == "CPU"
            else f"torch was built for {machine.build} but detects no device"
        )
        lines.append(f"no accelerator: {reason}. Builds for CUDA and ROCm: https://pytorch.org/get-started/locally")
    return lines


def _memory_of(device: Device) -> str:
    return "" if device.kind == "cpu" or device.memory is None else f", memory {_free_of(device.free, device.memory)}"


def _attention_lines(attention: Mapping[str, str | None]) -> list[str]:
    lines = ["attention"]
    return lines + [
        f"  {name:<18} {'yes' if reason is None else f'no: {reason}'}" for name, reason in attention.items()
    ]


def _package_lines(packages: Mapping[str, str | None], machine: Hardware) -> list[str]:
    lines = ["packages"]
    has_gpu = len(machine.devices) > 1
    for package in PACKAGES:
        installed = packages[package.module]
        gpu = " (requires a GPU)" if package.requires_gpu and not has_gpu else ""
        state = installed or f"missing{gpu}: {package.install}"
        lines.append(f"  {package.distribution:<38} {state}  [{package.use}]")
    return lines


def _free_of(free: int | None, total: int | None) -> str:
    return "unknown" if free is None or total is None else f"{_gib(free)} free of {_gib(total)}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def targets_main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning targets` and return its exit code."""
    return run_command(_targets, argv)


def _targets(argv: Sequence[str]) -> int:
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document

    parser = Parser(
        prog="finetuning targets",
        description="List the modules of a model by the last part of their names, with counts, shapes and sizes, and"
        " the parameters that peft_conf trains in each. Loads no weights.",
    )
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override the file's"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(argv)
    experiment = read_experiment(apply_overrides(read_document(options.config), options.overrides))

    from finetuning.algorithms import ALGORITHMS
    from finetuning.model.load import CAUSAL_LM, SEQUENCE_CLASSIFICATION
    from finetuning.model.module_summary import summarize_modules
    from finetuning.report.console import quiet_libraries

    quiet_libraries()
    head = SEQUENCE_CLASSIFICATION if ALGORITHMS[experiment.method_name].has_score_head else CAUSAL_LM
    summary = summarize_modules(experiment.run_conf, experiment.peft_conf, head=head)
    if options.json:
        print(json.dumps(asdict(summary), indent=2))
    else:
        for line in summary_lines(summary):
            print(line)
    return 0


def read_experiment(document: ConfigDocument) -> Experiment:
    """Return the experiment of the method that the file names, or else of the first method that accepts the file.

    Raises:
        ConfigError: no method accepts the file; the errors are those of the named method, or of sft.
    """
    from finetuning.config.sections.experiment import EXPERIMENTS
    from finetuning.config.validation.validate import validate

    name = document.values.get("method")
    classes = [EXPERIMENTS[name]] if name in EXPERIMENTS else list(EXPERIMENTS.values())
    first_error: ConfigError | None = None
    for experiment in classes:
        try:
            return validate(document, experiment).experiment
        except ConfigError as error:
            first_error = first_error or error
    raise first_error or ConfigError("no method is registered")


def summary_lines(summary: ModuleSummary) -> list[str]:
    """Return the summary as a text table."""
    from finetuning.plan.plan import format_bytes

    header = ("module", "class", "count", "shape", "parameters", "size", "all-linear", "trained by peft_conf")
    rows: list[tuple[str, ...]] = [header]
    for group in summary.groups:
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
                "-" if group.bytes is None else format_bytes(group.bytes),
                "yes" if group.all_linear else "-",
                trained,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = f"{summary.model}: {summary.architecture}, {summary.parameters:,} parameters"
    if summary.trained is not None:
        share = 100 * summary.trained / max(summary.parameters, 1)
        total += f"; peft_conf trains {summary.trained:,} ({share:.3g} %)"
    return [total, "", *lines]
