"""How a new LoRA begins: which ways make an adapter that loads again, and what is in the way of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetuning.errors import ConfigError, Location, Problem
from finetuning.plan.features import RunContext

_ARGUMENTS = "peft_conf.peft_kwargs"
_INIT = f"{_ARGUMENTS}.init_lora_weights"


@dataclass(frozen=True)
class UnsupportedInit:
    """A value of `init_lora_weights` that is refused, by how it starts: why, and what to take instead."""

    name: str
    why: str
    instead: str


_TAKEN_OUT = "is taken out of the base, and whoever loads the adapter cannot take it out again"
UNSUPPORTED_INITS = (
    UnsupportedInit(
        "pissa_niter_",
        f"what a search from random numbers finds {_TAKEN_OUT}: another search finds something else",
        "Set init_lora_weights: pissa, whose search is exact.",
    ),
    UnsupportedInit(
        "corda",
        f"what the rows tell {_TAKEN_OUT} without them",
        "Set init_lora_weights: eva, which reads the rows and leaves the base as it is.",
    ),
    UnsupportedInit(
        "lora_ga",
        f"what the gradients of the rows tell {_TAKEN_OUT} without them",
        "Set init_lora_weights: eva, which reads the rows and leaves the base as it is.",
    ),
    UnsupportedInit(
        "loftq",
        "it replaces the base by a rounded one, which the adapter would have to be shipped with",
        "Set quant_conf: {quantization_type: bits-and-bytes, load_in_4bit: true, bnb_4bit_quant_type: nf4}.",
    ),
)
"""In PEFT they are scripts of several steps; by `init_lora_weights` alone some do nothing there, without a word."""
DATA_BASED_INIT = "eva"


def requested_init(setting: RunContext) -> str:
    """How the setting's new LoRA begins, in lower case; empty without one, or where it begins as usual."""
    if setting.adapter != "LORA":
        return ""
    asked = setting.experiment.peft_conf.peft_kwargs.get("init_lora_weights")
    return asked.lower() if isinstance(asked, str) else ""


def check_lora_init(setting: RunContext) -> None:
    """Nothing when the adapter can begin as asked, and load again afterwards.

    Raises:
        ConfigError: it cannot, with an alternative.
    """
    problems = list(_problems(setting))
    if problems:
        raise ConfigError(problems)


def _problems(setting: RunContext) -> Iterator[Problem]:
    begins = requested_init(setting)
    for refused in UNSUPPORTED_INITS:
        if begins.startswith(refused.name):
            yield Problem(f"{begins} cannot be the beginning: {refused.why}", Location(key=_INIT), refused.instead)
    if begins == DATA_BASED_INIT and (setting.experiment.method_name != "sft" or setting.sharded_by):
        where = f"under {setting.sharded_by}" if setting.sharded_by else f"for {setting.experiment.method_name}"
        message = f"{begins} reads the rows of supervised training in one process before it begins; not {where}"
        yield Problem(message, Location(key=_INIT), "Remove it, or set init_lora_weights: orthogonal.")
    arguments = setting.experiment.peft_conf.peft_kwargs if setting.adapter == "LORA" else {}
    if arguments.get("use_qalora") and setting.quantised_by != "gptq":
        message = "QALoRA is for the layers of a GPTQ checkpoint; on any other PEFT trains a plain LoRA, silently"
        yield Problem(message, Location(key=f"{_ARGUMENTS}.use_qalora"), "Remove it, or name a GPTQ checkpoint.")


def unsupported_inits_table() -> list[str]:
    """Return the table of unsupported initializations in Markdown."""
    lines = ["| `init_lora_weights` | reason | instead |", "|---|---|---|"]
    shown = ((one.name + "…" if one.name.endswith("_") else one.name, one) for one in UNSUPPORTED_INITS)
    return [*lines, *(f"| `{name}` | {one.why} | {one.instead} |" for name, one in shown)]
