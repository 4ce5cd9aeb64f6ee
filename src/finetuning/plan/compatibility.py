"""The support matrix: what does not go together, said before a weight is loaded, with what to do instead.

The optional packages that a run needs, looked for without importing them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.config.sections import tracking as trackers
from finetuning.config.sections.model import BitsAndBytes, TorchAO
from finetuning.errors import ConfigError, Location, MissingPackageError, Problem
from finetuning.plan import features as t
from finetuning.plan.features import FEATURES, Feature, RunContext
from finetuning.plan.lora_init import unsupported_inits_table


@dataclass(frozen=True)
class Incompatibility:
    """Two traits that exclude each other: why, and what to do. The key of the first is the one to change."""

    one: Feature
    other: Feature
    why: str
    instead: str

    def applies(self, setting: RunContext) -> bool:
        return self.one.has(setting) and self.other.has(setting)

    def problem(self, setting: RunContext) -> Problem:
        """What the user reads."""
        adapter = f" ({setting.adapter})" if "adapter" in (self.one.axis, self.other.axis) and setting.adapter else ""
        message = f"{self.one.name} does not go with {self.other.name}{adapter}: {self.why}"
        return Problem(message, Location(key=self.one.key), self.instead)


_APART = "only adapters that treat each token alone let rows lie end to end"
_PADDED = "Set sft_args.batching: auto and packing: false."
_UNPLACED = (
    "that rows stay apart is proven on the logits of a whole model before training, and DeepSpeed may load it in parts"
)
_READS = "the adapter computes with the numbers of the weights, which quantised ones do not hold as such"
_UNSLICED = "Set sft_args.logits_at_once: auto."
INCOMPATIBILITIES = (
    Incompatibility(
        t.EIGHT_BIT, t.ALL_WEIGHTS, "quantised weights cannot be trained", "Choose an adapter, such as LORA."
    ),
    Incompatibility(
        t.FOUR_BIT, t.ALL_WEIGHTS, "quantised weights cannot be trained", "Choose an adapter, such as LORA."
    ),
    Incompatibility(
        t.TORCHAO, t.ALL_WEIGHTS, "quantised weights cannot be trained", "Choose an adapter, such as LORA."
    ),
    Incompatibility(t.GPTQ, t.ALL_WEIGHTS, "quantised weights cannot be trained", "Choose an adapter, such as LORA."),
    Incompatibility(t.QUANTISED_ANEW, t.GPTQ, "the checkpoint is quantised as it is", "Remove quant_conf."),
    Incompatibility(t.GPTQ, t.NOT_OVER_GPTQ, "PEFT has layers over those of GPTQ for few adapters", "Choose LORA."),
    Incompatibility(
        t.FROM_WEIGHTS, t.GPTQ, "packed layers do not hold their weights as numbers", "Remove init_lora_weights."
    ),
    Incompatibility(t.DORA, t.GPTQ, "PEFT's layer over those of GPTQ has no DoRA", "Remove use_dora."),
    Incompatibility(
        t.GPTQ,
        t.FSDP,
        "its weights are packed integers, which accelerate cannot hand out to the processes",
        "Run by torchrun without sharding, or take the unquantised model with quant_conf: 4 bit, nf4.",
    ),
    Incompatibility(
        t.TORCHAO, t.NOT_OVER_TORCHAO, "PEFT has layers over torchao's weights for few adapters", "Choose LORA."
    ),
    *(
        Incompatibility(
            t.TORCHAO, sharding, "its weights are no plain tensors, which sharding cuts", "Choose 4 bit, nf4."
        )
        for sharding in (t.FSDP, t.DEEPSPEED)
    ),
    Incompatibility(t.EIGHT_BIT, t.NO_EIGHT_BIT, _READS, "Choose LORA, or quantization_type: no-quantization."),
    Incompatibility(t.FOUR_BIT, t.NO_FOUR_BIT, _READS, "Choose LORA, or quantization_type: no-quantization."),
    *(
        Incompatibility(
            beginning,
            t.REFERENCE,
            "the reference is the model without its adapter, which this beginning makes another than the one that is"
            " trained",
            "Remove init_lora_weights.",
        )
        for beginning in (t.PISSA, t.OLORA, t.RANDOM_START)
    ),
    Incompatibility(
        t.ALORA, t.SCORES, "PEFT looks for the text that switches it on in language models only", "Choose a plain LORA."
    ),
    *(
        Incompatibility(
            t.PISSA, weights, "it takes the weights apart, which needs them as numbers", "Remove one of them."
        )
        for weights in (t.EIGHT_BIT, t.FOUR_BIT, t.TORCHAO)
    ),
    Incompatibility(
        t.EIGHT_BIT,
        t.FSDP,
        "FSDP shards floating point numbers only",
        "Set load_in_4bit: true and load_in_8bit: false, which is stored as floats.",
    ),
    *(
        Incompatibility(rows, adapter, _APART, _PADDED)
        for rows in (t.PACKING, t.PADDING_FREE)
        for adapter in (t.ALORA, t.VIRTUAL, t.UNPROVEN)
    ),
    *(Incompatibility(rows, t.DEEPSPEED, _UNPLACED, _PADDED) for rows in (t.PACKING, t.PADDING_FREE)),
    *(
        Incompatibility(
            t.SLICED,
            sharding,
            "processes with other numbers of labels would gather the head other numbers of times",
            _UNSLICED,
        )
        for sharding in (t.FSDP, t.DEEPSPEED)
    ),
    Incompatibility(t.SLICED, t.VIRTUAL, "virtual tokens shift the positions that labels stand at", _UNSLICED),
    Incompatibility(
        t.CHECKPOINTING,
        t.PREFIX,
        "prefixes are keys and values of a cache, which recomputed layers do not see",
        "Set gradient_checkpointing: false, or choose PROMPT_TUNING.",
    ),
    *(
        Incompatibility(
            t.ADALORA,
            sharding,
            "it moves rank between layers by gradients that no process holds whole",
            "Choose LORA, or run without sharding.",
        )
        for sharding in (t.FSDP, t.DEEPSPEED)
    ),
    Incompatibility(
        t.BEST_AT_END,
        t.ADALORA,
        "its ranks have other shapes at the end than in an earlier checkpoint",
        "Set load_best_model_at_end: false, or choose LORA.",
    ),
    Incompatibility(
        t.EIGHT_BIT_OPTIMIZER,
        t.FSDP,
        "bitsandbytes' optimizers do not know sharded tensors and write past them",
        "Set optim: adamw_torch_fused; FSDP shards its states.",
    ),
    *(
        Incompatibility(
            t.LOW_RANK,
            adapter,
            "it projects the gradients of whole weight matrices, which an adapter leaves frozen",
            "Set optim: adamw_torch_fused, or train all weights (NO_PEFT).",
        )
        for adapter in (t.LORA, t.ALORA, t.ADALORA, t.VIRTUAL, t.UNPROVEN)
    ),
    Incompatibility(
        t.LAYERWISE,
        t.ACCUMULATION,
        "each layer is updated as soon as its gradient is there",
        "Raise max_per_device_train_batch_size, or take the optimizer without _layerwise.",
    ),
    Incompatibility(
        t.LAYERWISE, t.SEVERAL, "gradients are not averaged between processes", "Take it without _layerwise."
    ),
    Incompatibility(
        t.LORAPLUS,
        t.NOT_LORA,
        "it gives the B matrices of LoRA a learning rate of their own",
        "Choose peft_type: LORA, or remove overrides.loraplus_lr_ratio.",
    ),
    Incompatibility(
        t.LORAPLUS, t.LOW_RANK, "both make the groups of parameters", "Set optim: adamw_torch_fused, or remove LoRA+."
    ),
    Incompatibility(
        t.LORAPLUS,
        t.DEEPSPEED,
        "DeepSpeed may build the optimizer itself, with one learning rate",
        "Run without DeepSpeed, or remove overrides.loraplus_lr_ratio.",
    ),
    Incompatibility(
        t.FP16,
        t.FLOAT16_MASTERS,
        "loss scaling needs the trained weights in float32 and casts as it computes",
        "Set run_conf.model_args.dtype: float32 (or auto), or use bf16.",
    ),
)
"""Every pair that is refused; whatever else is asked for together is tried."""


NEEDS_GPU = {
    "use_liger_kernel": ("its kernels are written in Triton, which compiles for GPUs", "Remove it."),
    "activation_offloading": ("on a CPU activations are in the machine's memory as it is", "Remove it."),
}
"""Fields of `training_args` that a CPU cannot honour: why, and what to do."""


def check_compatibility(setting: RunContext) -> None:
    """Nothing when all that the setting asks for goes together.

    Raises:
        ConfigError: every pair that does not, with its place and an alternative.
    """
    problems = {str(refusal.problem(setting)): refusal for refusal in INCOMPATIBILITIES if refusal.applies(setting)}
    if problems:
        raise ConfigError([refusal.problem(setting) for refusal in problems.values()])


def find_incompatibility(one: Feature, other: Feature) -> Incompatibility | None:
    """Why two traits exclude each other; None when they do not."""
    return next(
        (refusal for refusal in INCOMPATIBILITIES if {one.name, other.name} == {refusal.one.name, refusal.other.name}),
        None,
    )


def compatibility_page() -> str:
    """Return the page of incompatible features in Markdown, grouped by what they concern."""
    lines = [
        "# Feature compatibility",
        "",
        "<!-- Generated by `make docs`; a test fails when this page is stale. -->",
        "",
        "Features that are not listed here can be combined. A listed combination is refused before any weight is",
        "loaded, by `--dry-run` too, with file and line of the key.",
        "",
    ]
    for one_axis, other_axis in combinations(dict.fromkeys(trait.axis for trait in (*FEATURES, *_unlisted())), 2):
        refusals = [r for r in INCOMPATIBILITIES if {r.one.axis, r.other.axis} == {one_axis, other_axis}]
        if refusals:
            lines += [
                f"## {one_axis.capitalize()} and {other_axis}",
                "",
                "| feature | refused with | reason | instead |",
            ]
            lines += ["|---|---|---|---|"]
            lines += [f"| {_named(r.one)} | {_named(r.other)} | {r.why} | {r.instead} |" for r in refusals]
            lines += [""]
    lines += ["## Only on a GPU", "", "| `training_args` | reason | on a CPU |", "|---|---|---|"]
    lines += [f"| `{key}` | {why} | {instead} |" for key, (why, instead) in NEEDS_GPU.items()]
    lines += ["", "## Initialization of a LoRA", ""]
    lines += [
        "`peft_conf.peft_kwargs.init_lora_weights` accepts every value of PEFT except these:",
        "",
        *unsupported_inits_table(),
        "",
    ]
    lines += ["## Adapter types by group", ""]
    for title, names in (
        ("Act on each token alone, so that rows can be concatenated", t.TOKENWISE_ADAPTERS),
        ("Add virtual tokens", t.VIRTUAL_TOKEN_ADAPTERS),
        ("Work on torchao's weights, in addition to those with virtual tokens", t.TORCHAO_ADAPTERS),
        ("Work on GPTQ's layers, in addition to those with virtual tokens", t.GPTQ_ADAPTERS),
        ("Do not work on 4-bit weights", t.INCOMPATIBLE_WITH_4BIT),
        ("Do not work on 8-bit weights", t.INCOMPATIBLE_WITH_8BIT),
    ):
        lines.append(f"- {title}: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines) + "\n"


def _unlisted() -> list[Feature]:
    return [trait for refusal in INCOMPATIBILITIES for trait in (refusal.one, refusal.other) if trait not in FEATURES]


def _named(trait: Feature) -> str:
    return f"{trait.name} (`{trait.key}`)" if trait.key else trait.name


@dataclass(frozen=True)
class DependencyRequirement:
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


def required_packages(setting: RunContext) -> Iterator[DependencyRequirement]:
    """What the setting asks for beyond the packages that every run has."""
    optimizer = setting.args.optim
    for name, (module, install) in _OPTIMIZERS.items():
        if optimizer.startswith(name):
            yield DependencyRequirement(module, install, "training_args.optim")
    if optimizer.startswith(_OF_BITSANDBYTES):
        yield DependencyRequirement("bitsandbytes", "pip install bitsandbytes", "training_args.optim")
    if isinstance(setting.experiment.quant_conf, BitsAndBytes):
        yield DependencyRequirement("bitsandbytes", "pip install bitsandbytes", "quant_conf.quantization_type")
    if isinstance(setting.experiment.quant_conf, TorchAO):
        yield DependencyRequirement("torchao", "pip install 'finetuning[torchao]'", "quant_conf.quantization_type")
    if (setting.args.model_extra or {}).get("use_liger_kernel"):
        yield DependencyRequirement("liger_kernel", "pip install 'finetuning[liger]'", "training_args.use_liger_kernel")
    if setting.quantised_by == "gptq":
        for module in ("gptqmodel", "optimum"):
            yield DependencyRequirement(module, "pip install 'finetuning[gptq]'", "run_conf.model")
    if setting.args.deepspeed:
        yield DependencyRequirement("deepspeed", "pip install 'finetuning[deepspeed]'", "training_args.deepspeed")
    for name in trackers.requested_trackers(setting.experiment):
        package = (trackers.ACCELERATE_TRACKERS | trackers.TRANSFORMERS_TRACKERS).get(name)
        if package is not None:
            yield DependencyRequirement(package.module, package.install, trackers.tracker_key(setting.experiment, name))


def check_packages(setting: RunContext) -> None:
    """Nothing when all that the setting needs is installed.

    Raises:
        MissingPackageError: every package that is not, with its install line.
    """
    missing = [need for need in required_packages(setting) if find_spec(need.module) is None]
    attention = FLASH_ATTENTION_PACKAGES.get(setting.experiment.run_conf.model_args.attn_implementation or "")
    if attention is not None and not attention.is_installed:
        missing.append(DependencyRequirement(attention.distribution, f"{attention.install}; or use sdpa", _ATTENTION))
    if missing:
        raise MissingPackageError(
            [
                Problem(f"needs the package {need.module}, which is not installed", Location(key=need.key), _line(need))
                for need in missing
            ]
        )


def _line(need: DependencyRequirement) -> str:
    return f"Install it with: {need.install}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(compatibility_page(), encoding="utf-8")
