"""Reject incompatible features and missing packages before any weight is loaded.

`python -m finetuning.plan.compatibility docs/reference/support.md` writes the compatibility page."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

from finetuning.config.sections import tracking as trackers
from finetuning.config.sections.model import BitsAndBytes, TorchAO
from finetuning.errors import ConfigError, Location, MissingPackageError, Problem
from finetuning.plan import features
from finetuning.plan.features import FEATURES, Feature, RunContext
from finetuning.plan.lora_init import check_lora_init, unsupported_inits_table


@dataclass(frozen=True)
class Incompatibility:
    """Two features that cannot be combined, with the reason and a hint. Errors point to the key of the first."""

    first: Feature
    second: Feature
    reason: str
    hint: str

    def applies(self, context: RunContext) -> bool:
        return self.first.has(context) and self.second.has(context)

    def problem(self, context: RunContext) -> Problem:
        """Return the problem to report to the user."""
        has_adapter = context.adapter and "adapter" in (self.first.axis, self.second.axis)
        adapter = f" ({context.adapter})" if has_adapter else ""
        message = f"{self.first.name} cannot be combined with {self.second.name}{adapter}: {self.reason}"
        return Problem(message, Location(key=self.first.key), self.hint)


_NEEDS_TOKENWISE = "only adapters that transform each token independently keep the rows of a batch isolated"
_PADDED = "Set sft_args.batching: auto and packing: false."
_NEEDS_WHOLE_MODEL = "row isolation is verified on the complete model before training, which DeepSpeed may partition"
_NEEDS_VALUES = "the adapter computes with the values of the base weights, which quantized weights do not provide"
_AUTO_CHUNKS = "Set sft_args.logits_at_once: auto."
INCOMPATIBILITIES = (
    Incompatibility(
        features.QUANT_8BIT,
        features.FULL_FINE_TUNING,
        "quantized weights cannot be trained",
        "Choose an adapter, such as LORA.",
    ),
    Incompatibility(
        features.QUANT_4BIT,
        features.FULL_FINE_TUNING,
        "quantized weights cannot be trained",
        "Choose an adapter, such as LORA.",
    ),
    Incompatibility(
        features.TORCHAO,
        features.FULL_FINE_TUNING,
        "quantized weights cannot be trained",
        "Choose an adapter, such as LORA.",
    ),
    Incompatibility(
        features.GPTQ,
        features.FULL_FINE_TUNING,
        "quantized weights cannot be trained",
        "Choose an adapter, such as LORA.",
    ),
    Incompatibility(
        features.QUANTIZED_ON_LOAD, features.GPTQ, "the checkpoint is already quantized", "Remove quant_conf."
    ),
    Incompatibility(
        features.GPTQ, features.NO_GPTQ_SUPPORT, "PEFT supports few adapter types on GPTQ layers", "Choose LORA."
    ),
    Incompatibility(
        features.WEIGHT_BASED_INIT,
        features.GPTQ,
        "the values of GPTQ weights are packed and not available",
        "Remove init_lora_weights.",
    ),
    Incompatibility(features.DORA, features.GPTQ, "PEFT does not implement DoRA for GPTQ layers", "Remove use_dora."),
    Incompatibility(
        features.GPTQ,
        features.FSDP,
        "its weights are packed integers, which accelerate cannot distribute to the processes",
        "Run with torchrun without sharding, or load the unquantized model in 4 bits (nf4).",
    ),
    Incompatibility(
        features.TORCHAO,
        features.NO_TORCHAO_SUPPORT,
        "PEFT supports few adapter types on torchao weights",
        "Choose LORA.",
    ),
    *(
        Incompatibility(
            features.TORCHAO, sharding, "torchao weights are tensor subclasses that cannot be sharded", "Use 4-bit nf4."
        )
        for sharding in (features.FSDP, features.DEEPSPEED)
    ),
    Incompatibility(
        features.QUANT_8BIT,
        features.NO_8BIT_SUPPORT,
        _NEEDS_VALUES,
        "Choose LORA, or quantization_type: no-quantization.",
    ),
    Incompatibility(
        features.QUANT_4BIT,
        features.NO_4BIT_SUPPORT,
        _NEEDS_VALUES,
        "Choose LORA, or quantization_type: no-quantization.",
    ),
    *(
        Incompatibility(
            init,
            features.REFERENCE_MODEL,
            "the reference model is the base without the adapter, but this initialization makes the two differ from the"
            " start",
            "Remove init_lora_weights.",
        )
        for init in (features.PISSA, features.OLORA, features.RANDOM_INIT)
    ),
    Incompatibility(
        features.ALORA,
        features.REWARD,
        "PEFT detects the invocation tokens in causal language models only",
        "Choose a plain LORA.",
    ),
    *(
        Incompatibility(
            features.PISSA, weights, "it decomposes the base weights, whose values are needed", "Remove one of them."
        )
        for weights in (features.QUANT_8BIT, features.QUANT_4BIT, features.TORCHAO)
    ),
    Incompatibility(
        features.QUANT_8BIT,
        features.FSDP,
        "FSDP only shards floating-point tensors",
        "Set load_in_4bit: true and load_in_8bit: false; 4-bit weights can be stored as floats.",
    ),
    *(
        Incompatibility(rows, adapter, _NEEDS_TOKENWISE, _PADDED)
        for rows in (features.PACKING, features.PADDING_FREE)
        for adapter in (features.ALORA, features.VIRTUAL, features.NOT_TOKENWISE)
    ),
    *(
        Incompatibility(rows, features.DEEPSPEED, _NEEDS_WHOLE_MODEL, _PADDED)
        for rows in (features.PACKING, features.PADDING_FREE)
    ),
    *(
        Incompatibility(
            features.CHUNKED_LOGITS,
            sharding,
            "processes with different numbers of labels would gather the output layer a different number of times",
            _AUTO_CHUNKS,
        )
        for sharding in (features.FSDP, features.DEEPSPEED)
    ),
    Incompatibility(
        features.CHUNKED_LOGITS, features.VIRTUAL, "virtual tokens shift the positions of the labels", _AUTO_CHUNKS
    ),
    Incompatibility(
        features.GRADIENT_CHECKPOINTING,
        features.PREFIX,
        "prefixes are entries of the key-value cache, which recomputed layers do not see",
        "Set gradient_checkpointing: false, or choose PROMPT_TUNING.",
    ),
    *(
        Incompatibility(
            features.ADALORA,
            sharding,
            "it reallocates rank between layers by gradients that are sharded",
            "Choose LORA, or run without sharding.",
        )
        for sharding in (features.FSDP, features.DEEPSPEED)
    ),
    Incompatibility(
        features.LOAD_BEST_MODEL,
        features.ADALORA,
        "its ranks, and so the shapes of its weights, change between checkpoints",
        "Set load_best_model_at_end: false, or choose LORA.",
    ),
    Incompatibility(
        features.OPTIMIZER_8BIT,
        features.FSDP,
        "bitsandbytes optimizers do not support sharded tensors and write out of bounds",
        "Set optim: adamw_torch_fused; FSDP shards its states.",
    ),
    *(
        Incompatibility(
            features.LOW_RANK_OPTIMIZER,
            adapter,
            "it projects the gradients of full weight matrices, which are frozen under an adapter",
            "Set optim: adamw_torch_fused, or train all weights (NO_PEFT).",
        )
        for adapter in (features.LORA, features.ALORA, features.ADALORA, features.VIRTUAL, features.NOT_TOKENWISE)
    ),
    Incompatibility(
        features.LAYERWISE_OPTIMIZER,
        features.ACCUMULATION,
        "each layer is updated as soon as its gradient is computed",
        "Increase max_per_device_train_batch_size, or use the optimizer without _layerwise.",
    ),
    Incompatibility(
        features.LAYERWISE_OPTIMIZER,
        features.MULTI_PROCESS,
        "it does not average gradients across processes",
        "Use the optimizer without _layerwise.",
    ),
    Incompatibility(
        features.MOVING_REFERENCE,
        features.ADAPTER,
        "with an adapter TRL keeps no model of the reference that could move",
        "Set sync_ref_model: false, or peft_type: NO_PEFT.",
    ),
    Incompatibility(
        features.SHARDED_MOVING_REFERENCE,
        features.RESUMING,
        "sharded weights of the reference are not in checkpoints, so a resumed run would start from others",
        "Set run_conf.resume_from_checkpoint: false, or sync_ref_model: false.",
    ),
    Incompatibility(
        features.UNSAVED_OPTIMIZER_STATE,
        features.RESUMING,
        "it keeps states that checkpoints do not hold",
        "Set run_conf.resume_from_checkpoint: false, or use the optimizer without _layerwise.",
    ),
    Incompatibility(
        features.LORAPLUS,
        features.NOT_LORA,
        "it sets a separate learning rate for the B matrices of LoRA",
        "Choose peft_type: LORA, or remove overrides.loraplus_lr_ratio.",
    ),
    Incompatibility(
        features.LORAPLUS,
        features.LOW_RANK_OPTIMIZER,
        "both define the parameter groups of the optimizer",
        "Set optim: adamw_torch_fused, or remove LoRA+.",
    ),
    Incompatibility(
        features.LORAPLUS,
        features.DEEPSPEED,
        "DeepSpeed may create the optimizer itself, with a single learning rate",
        "Run without DeepSpeed, or remove overrides.loraplus_lr_ratio.",
    ),
    Incompatibility(
        features.COMPILED_LAYERS,
        features.DEEPSPEED,
        "DeepSpeed compiles by its own config, and gathers partitioned weights in hooks of the layers",
        "Set torch_compile: false, or use FSDP2.",
    ),
    Incompatibility(
        features.PART_RATES,
        features.LOW_RANK_OPTIMIZER,
        "both define the parameter groups of the optimizer",
        "Set optim: adamw_torch_fused, or remove overrides.part_learning_rates.",
    ),
    Incompatibility(
        features.PART_RATES,
        features.DEEPSPEED,
        "DeepSpeed may create the optimizer itself, with a single learning rate",
        "Run without DeepSpeed, or remove overrides.part_learning_rates.",
    ),
    Incompatibility(
        features.FP16,
        features.FLOAT16_TRAINABLE,
        "loss scaling needs trainable weights in float32, which autocast casts",
        "Set run_conf.model_args.dtype: float32 (or auto), or use bf16.",
    ),
)
"""All rejected pairs. Any other combination is allowed."""


NEEDS_GPU = {
    "use_liger_kernel": ("its Triton kernels compile for GPUs only", "Remove it."),
    "activation_offloading": ("on a CPU, activations are in CPU memory already", "Remove it."),
}
"""Fields of `training_args` that need a GPU: reason and hint."""


def check_compatibility(context: RunContext) -> None:
    """Check that the features of an experiment can be combined.

    Raises:
        ConfigError: they cannot. Lists every incompatible pair with its key and an alternative.
    """
    problems = [item.problem(context) for item in INCOMPATIBILITIES if item.applies(context)]
    if problems:
        # Several pairs can give the same message.
        raise ConfigError(list(dict.fromkeys(problems)))
    if (context.args.model_extra or {}).get("push_to_hub") and _is_offline(os.environ):
        raise ConfigError(
            "needs the Hub, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
            location=Location(key="training_args.push_to_hub"),
            hint="Unset it, or remove push_to_hub and upload the final model later.",
        )
    if context.adapter == "LORA" and context.peft_kwargs.keys() & {"init_lora_weights", "use_qalora"}:
        check_lora_init(context)


def _is_offline(environ: Mapping[str, str]) -> bool:
    """Return whether huggingface_hub contacts no server. Source: huggingface_hub 1.26, `constants.py`."""
    values = (environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


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
    axes = dict.fromkeys(feature.axis for feature in (*FEATURES, *_unlisted_features()))
    for first, second in combinations(axes, 2):
        pairs = [item for item in INCOMPATIBILITIES if {item.first.axis, item.second.axis} == {first, second}]
        if pairs:
            lines += [f"## {first.capitalize()} and {second}", "", "| feature | refused with | reason | instead |"]
            lines += ["|---|---|---|---|"]
            lines += [f"| {_cell(p.first)} | {_cell(p.second)} | {p.reason} | {p.hint} |" for p in pairs]
            lines += [""]
    lines += ["## Only on a GPU", "", "| `training_args` | reason | on a CPU |", "|---|---|---|"]
    lines += [f"| `{key}` | {reason} | {hint} |" for key, (reason, hint) in NEEDS_GPU.items()]
    lines += ["", "## Initialization of a LoRA", ""]
    lines += [
        "`peft_conf.peft_kwargs.init_lora_weights` accepts every value of PEFT except these:",
        "",
        *unsupported_inits_table(),
        "",
    ]
    lines += ["## Adapter types by group", ""]
    for title, names in (
        ("Act on each token alone, so that rows can be concatenated", features.TOKENWISE_ADAPTERS),
        ("Add virtual tokens", features.VIRTUAL_TOKEN_ADAPTERS),
        ("Work on torchao's weights, in addition to those with virtual tokens", features.TORCHAO_ADAPTERS),
        ("Work on GPTQ's layers, in addition to those with virtual tokens", features.GPTQ_ADAPTERS),
        ("Do not work on 4-bit weights", features.INCOMPATIBLE_WITH_4BIT),
        ("Do not work on 8-bit weights", features.INCOMPATIBLE_WITH_8BIT),
    ):
        lines.append(f"- {title}: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines) + "\n"


def _unlisted_features() -> list[Feature]:
    paired = [feature for item in INCOMPATIBILITIES for feature in (item.first, item.second)]
    return [feature for feature in paired if feature not in FEATURES]


def _cell(feature: Feature) -> str:
    return f"{feature.name} (`{feature.key}`)" if feature.key else feature.name


@dataclass(frozen=True)
class DependencyRequirement:
    """A required package: the module to import, the install command, and the config key that requires it."""

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
    "adamw_torch_xla": ("torch_xla", "pip install torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "pip install torch_npu"),
    "adamw_anyprecision": ("torchdistx", "see https://github.com/pytorch/torchdistx"),
    "adamw_torch_4bit": ("torchao", "pip install 'finetuning[torchao]'"),
    "adamw_torch_8bit": ("torchao", "pip install 'finetuning[torchao]'"),
}
_BITSANDBYTES_OPTIMIZERS = ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb")


def required_packages(context: RunContext) -> Iterator[DependencyRequirement]:
    """Yield the packages that an experiment needs in addition to the dependencies of every run."""
    optimizer = context.args.optim
    for name, (module, install) in _OPTIMIZERS.items():
        if optimizer.startswith(name):
            yield DependencyRequirement(module, install, "training_args.optim")
    if optimizer.startswith(_BITSANDBYTES_OPTIMIZERS):
        yield DependencyRequirement("bitsandbytes", "pip install bitsandbytes", "training_args.optim")
    if isinstance(context.experiment.quant_conf, BitsAndBytes):
        yield DependencyRequirement("bitsandbytes", "pip install bitsandbytes", "quant_conf.quantization_type")
    if isinstance(context.experiment.quant_conf, TorchAO):
        yield DependencyRequirement("torchao", "pip install 'finetuning[torchao]'", "quant_conf.quantization_type")
    if (context.args.model_extra or {}).get("use_liger_kernel"):
        yield DependencyRequirement("liger_kernel", "pip install 'finetuning[liger]'", "training_args.use_liger_kernel")
    if context.checkpoint_quantization == "gptq":
        for module in ("gptqmodel", "optimum"):
            yield DependencyRequirement(module, "pip install 'finetuning[gptq]'", "run_conf.model")
    if context.args.deepspeed:
        yield DependencyRequirement("deepspeed", "pip install 'finetuning[deepspeed]'", "training_args.deepspeed")
    tracking = context.experiment.tracking
    for name in trackers.requested_trackers(tracking, context.args.report_to):
        package = (trackers.ACCELERATE_TRACKERS | trackers.TRANSFORMERS_TRACKERS).get(name)
        if package is not None:
            yield DependencyRequirement(package.module, package.install, trackers.tracker_key(tracking, name))


def check_packages(context: RunContext) -> None:
    """Check that the optional packages of an experiment are installed, without importing them.

    Raises:
        MissingPackageError: some are not. Lists each with its install command.
    """
    missing = [need for need in required_packages(context) if find_spec(need.module) is None]
    if missing:
        raise MissingPackageError(
            [
                Problem(
                    f"needs the package {need.module}, which is not installed",
                    Location(key=need.key),
                    f"Install it with: {need.install}",
                )
                for need in missing
            ]
        )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(compatibility_page(), encoding="utf-8")
