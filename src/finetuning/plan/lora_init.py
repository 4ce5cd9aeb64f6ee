"""Values of `init_lora_weights` that the engine does not support, with the reason and an alternative."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetuning.errors import ConfigError, Location, Problem
from finetuning.plan.features import RunContext

_PEFT_KWARGS = "peft_conf.peft_kwargs"
_INIT = f"{_PEFT_KWARGS}.init_lora_weights"


@dataclass(frozen=True)
class UnsupportedInit:
    """An unsupported value of `init_lora_weights`, given by its prefix."""

    prefix: str
    reason: str
    hint: str


# PEFT implements these as scripts of several steps; some do nothing, without a warning, if only `init_lora_weights` is
# set. They subtract the initial adapter from the base weights, so that the adapter is useless without the same
# subtraction, which can be repeated exactly for `pissa` and `olora` only.
_NOT_REPRODUCIBLE = "it changes the base weights, and loading the adapter cannot repeat the change without"
UNSUPPORTED_INITS = (
    UnsupportedInit(
        "pissa_niter_",
        f"{_NOT_REPRODUCIBLE} the same random numbers",
        "Set init_lora_weights: pissa, which uses an exact decomposition.",
    ),
    UnsupportedInit(
        "corda",
        f"{_NOT_REPRODUCIBLE} the training data",
        "Set init_lora_weights: eva, which uses the training data and leaves the base weights unchanged.",
    ),
    UnsupportedInit(
        "lora_ga",
        f"{_NOT_REPRODUCIBLE} the gradients of the training data",
        "Set init_lora_weights: eva, which uses the training data and leaves the base weights unchanged.",
    ),
    UnsupportedInit(
        "loftq",
        "it replaces the base model by a quantized one, which would have to be shipped with the adapter",
        "Set quant_conf: {quantization_type: bits-and-bytes, load_in_4bit: true, bnb_4bit_quant_type: nf4}.",
    ),
)
DATA_BASED_INIT = "eva"
"""The supported initialization that is computed from training rows."""


def requested_init(context: RunContext) -> str:
    """Return the name of the requested LoRA initialization in lower case; empty for PEFT's default or without LoRA."""
    value = context.peft_kwargs.get("init_lora_weights") if context.adapter == "LORA" else None
    return value.lower() if isinstance(value, str) else ""


def check_lora_init(context: RunContext) -> None:
    """Check that the requested initialization gives an adapter that can be loaded again.

    Raises:
        ConfigError: it does not. The message suggests an alternative.
    """
    problems = list(_problems(context))
    if problems:
        raise ConfigError(problems)


def _problems(context: RunContext) -> Iterator[Problem]:
    init = requested_init(context)
    for unsupported in UNSUPPORTED_INITS:
        if init.startswith(unsupported.prefix):
            yield Problem(f"{init} is not supported: {unsupported.reason}", Location(key=_INIT), unsupported.hint)
    if init == DATA_BASED_INIT and (context.experiment.method_name != "sft" or context.sharded_by):
        conflict = f"with {context.sharded_by}" if context.sharded_by else f"for {context.experiment.method_name}"
        message = f"{init} is only valid for sft in a single process, and not supported {conflict}"
        yield Problem(message, Location(key=_INIT), "Remove it, or set init_lora_weights: orthogonal.")
    # Without a GPTQ base PEFT ignores `use_qalora` and trains a plain LoRA.
    if (
        context.peft_kwargs.get("use_qalora")
        and context.adapter == "LORA"
        and context.checkpoint_quantization != "gptq"
    ):
        message = "QALoRA requires a GPTQ checkpoint; for any other base model PEFT trains a plain LoRA instead"
        yield Problem(message, Location(key=f"{_PEFT_KWARGS}.use_qalora"), "Remove it, or use a GPTQ checkpoint.")


def unsupported_inits_table() -> list[str]:
    """Return the unsupported initializations as the lines of a Markdown table."""
    lines = ["| `init_lora_weights` | why not | instead |", "|---|---|---|"]
    for init in UNSUPPORTED_INITS:
        name = f"{init.prefix}…" if init.prefix.endswith("_") else init.prefix
        lines.append(f"| `{name}` | {init.reason} | {init.hint} |")
    return lines
