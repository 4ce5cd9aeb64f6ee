"""The optional packages that a run needs, looked for without importing them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from finetuning.config.attention import FLASH
from finetuning.config.sections import trackers
from finetuning.config.sections.model import BitsAndBytes, TorchAO
from finetuning.errors import MissingPackageError, Place, Problem
from finetuning.plan.features import Setting


@dataclass(frozen=True)
class Need:
    """A package by the name that it is imported by, its install line, and the key that asks for it."""

    module: str
    install: str
    key: str


_OPTIMIZERS = {
    "galore": ("galore_torch", "pip install galore-torch"),
    "apollo": ("apollo_torch", "pip install apollo-torch"),
    "schedule_free": ("schedulefree", "pip install 'finetuning[schedule-free]'"),
    "lomo": ("lomo_optim", "pip install lomo-optim"),
    "adalomo": ("lomo_optim", "pip install lomo-optim"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
    "adamw_torch_4bit": ("torchao", "pip install 'finetuning[torchao]'"),
    "adamw_torch_8bit": ("torchao", "pip install 'finetuning[torchao]'"),
}
_ATTENTION = "run_conf.model_args.attn_implementation"
_OF_BITSANDBYTES = ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb")


def needs(setting: Setting) -> Iterator[Need]:
    """What the setting asks for beyond the packages that every run has."""
    optimizer = setting.args.optim
    for name, (module, install) in _OPTIMIZERS.items():
        if optimizer.startswith(name):
            yield Need(module, install, "training_args.optim")
    if optimizer.startswith(_OF_BITSANDBYTES):
        yield Need("bitsandbytes", "pip install bitsandbytes", "training_args.optim")
    if isinstance(setting.experiment.quant_conf, BitsAndBytes):
        yield Need("bitsandbytes", "pip install bitsandbytes", "quant_conf.quantization_type")
    if isinstance(setting.experiment.quant_conf, TorchAO):
        yield Need("torchao", "pip install 'finetuning[torchao]'", "quant_conf.quantization_type")
    if (setting.args.model_extra or {}).get("use_liger_kernel"):
        yield Need("liger_kernel", "pip install 'finetuning[liger]'", "training_args.use_liger_kernel")
    if setting.quantised_by == "gptq":
        for module in ("gptqmodel", "optimum"):
            yield Need(module, "pip install 'finetuning[gptq]'", "run_conf.model")
    if setting.args.deepspeed:
        yield Need("deepspeed", "pip install 'finetuning[deepspeed]'", "training_args.deepspeed")
    for name in trackers.wanted_trackers(setting.experiment):
        package = (trackers.PACKAGES | trackers.FOREIGN).get(name)
        if package is not None:
            yield Need(package.module, package.install, trackers.asking_key(setting.experiment, name))


def check_packages(setting: Setting) -> None:
    """Nothing when all that the setting needs is installed.

    Raises:
        MissingPackageError: every package that is not, with its install line.
    """
    missing = [need for need in needs(setting) if find_spec(need.module) is None]
    attention = FLASH.get(setting.experiment.run_conf.model_args.attn_implementation or "")
    if attention is not None and not attention.is_installed:
        missing.append(Need(attention.distribution, f"{attention.install}; or use sdpa", _ATTENTION))
    if missing:
        raise MissingPackageError(
            [
                Problem(f"needs the package {need.module}, which is not installed", Place(key=need.key), _line(need))
                for need in missing
            ]
        )


def _line(need: Need) -> str:
    return f"Install it with: {need.install}"
