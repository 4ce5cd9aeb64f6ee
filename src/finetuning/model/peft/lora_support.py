"""What each option of LoRA means for merging and for vLLM: the table that both read.

Checked against peft 0.21.2 and vLLM 0.32.0 (`vllm/lora/peft_helper.py`, `lora_model.py`). `make test-serving` compares
it with an installed vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

VLLM_VERSION = "0.32"
"""The release of vLLM that the table was checked against."""


@dataclass(frozen=True)
class LoraInit:
    """A value of `init_lora_weights`, and what it does to the base model's weights."""

    name: str
    """The value in lower case; one that ends with `_` is a prefix."""
    label: str
    changes_base: bool = False
    """Whether the initial adapter is subtracted from the base's weights, or these are replaced."""
    is_repeated: bool = False
    """Whether loading the adapter makes the same change to the base again, so that PEFT can merge it."""
    is_convertible: bool = False
    """Whether it can be written as a plain LoRA with the help of the initial adapter."""


INITS = (
    LoraInit("true", "plain"),
    LoraInit("false", "random"),
    LoraInit("gaussian", "Gaussian"),
    LoraInit("eva", "EVA"),
    LoraInit("orthogonal", "orthogonal"),
    LoraInit("mica", "MiCA"),
    LoraInit("pissa", "PiSSA", changes_base=True, is_repeated=True, is_convertible=True),
    LoraInit("pissa_niter_", "fast PiSSA", changes_base=True, is_convertible=True),
    LoraInit("olora", "OLoRA", changes_base=True, is_repeated=True, is_convertible=True),
    LoraInit("corda", "CorDA", changes_base=True, is_convertible=True),
    LoraInit("lora_ga", "LoRA-GA", changes_base=True, is_convertible=True),
    # The base is replaced by a quantized one, and the initial adapter does not make up the whole difference.
    LoraInit("loftq", "LoftQ", changes_base=True, is_repeated=True),
)


def lora_init(config: Mapping[str, object]) -> LoraInit:
    """Return the initialization that an adapter's config names; an unknown one counts as a change of the base."""
    value = config.get("init_lora_weights", True)
    name = "true" if value is None else str(value).lower()
    for init in INITS:
        if name == init.name or (init.name.endswith("_") and name.startswith(init.name)):
            return init
    return LoraInit(name, name, changes_base=True, is_repeated=True)


@dataclass(frozen=True)
class LoraOption:
    """A field of a LoRA config that adds tensors, or changes the formula W + alpha / r * B A."""

    field: str
    label: str
    is_streamed: bool
    """Whether the merge streams it tensor by tensor; else PEFT merges in memory."""
    vllm: Literal["yes", "no", "if equal"]
    """Whether vLLM serves it; `if equal`: only without its tensors, which are dropped where they equal the base's."""
    unused: object = None
    """The value that turns it off."""


OPTIONS = (
    LoraOption("use_rslora", "rank-stabilized scaling", True, "yes"),
    LoraOption("rank_pattern", "ranks per module", True, "yes"),
    LoraOption("alpha_pattern", "scaling factors per module", True, "yes"),
    LoraOption("modules_to_save", "whole trained modules", True, "if equal"),
    LoraOption("trainable_token_indices", "trained token rows", True, "if equal"),
    LoraOption("bias", "trained biases", True, "if equal", unused="none"),
    LoraOption("lora_bias", "a bias in LoRA", True, "if equal", unused=False),
    LoraOption("use_dora", "DoRA", True, "no"),
    LoraOption("alora_invocation_tokens", "activated LoRA", False, "no"),
    LoraOption("arrow_config", "Arrow", False, "no"),
    LoraOption("kasa_config", "KaSA", False, "no"),
    LoraOption("layer_replication", "replicated layers", False, "no"),
    LoraOption("megatron_config", "Megatron layers", False, "no"),
    LoraOption("monteclora_config", "MonteCLoRA", False, "no"),
    LoraOption("target_parameters", "adapted parameters (fused experts)", False, "no"),
    LoraOption("use_bdlora", "BD-LoRA", False, "no"),
    LoraOption("use_qalora", "QALoRA", False, "no"),
    LoraOption("velora_config", "VeLoRA", False, "no"),
)


EMBEDDINGS = ("embed_tokens", "lm_head")
"""Embedding modules whose LoRA vLLM serves for `WITH_EMBEDDINGS`."""
WITH_EMBEDDINGS = frozenset((
    "Apertus", "Ernie4_5", "Exaone4", "ExaoneMoe", "FalconH1", "Granite", "GraniteMoe", "GraniteMoeHybrid",
    "GraniteMoeSWA", "GraniteMoeShared", "GraniteSWA", "HyperCLOVAX", "Jamba", "Lfm2", "Lfm2Moe", "Llama", "Llama4",
    "MiniCPM3", "Mixtral", "Nemotron", "NemotronH", "Phi3", "PhiMoE", "Qwen3", "Qwen3Moe", "Qwen3_5", "Qwen3_5Moe",
))  # fmt: skip
"""Architectures, without `ForCausalLM`, whose class in vLLM declares both as `embedding_modules`."""
WITHOUT_EMBEDDINGS = frozenset((
    "AXK1", "Afmoe", "DeepseekV2", "DeepseekV3", "Ernie4_5_Moe", "Gemma", "Gemma2", "Gemma3", "Gemma4", "Glm4",
    "Glm4Moe", "Glm4MoeLite", "GptOss", "HYV3", "Laguna", "LongcatFlash", "MiniMaxM2", "Ministral3", "Mistral", "OPT",
    "OlmoHybrid", "Olmoe", "Qwen2", "Qwen2Moe", "Qwen3Next",
))  # fmt: skip
"""Architectures whose class in vLLM serves LoRA, but declares none. Others get `INPUT_EMBEDDINGS`."""
INPUT_EMBEDDINGS = EMBEDDINGS[:1]
"""What vLLM declares for Cohere and for every class that it takes from transformers."""
WITHOUT_LORA = frozenset((
    "Bloom", "Cohere2Moe", "Dbrx", "Falcon", "FalconMamba", "GPT2LMHeadModel", "GPTJ", "Gemma3n", "HrmText", "Mamba",
    "Mamba2", "MiMoV2Flash", "StableLm", "Zamba2",
))  # fmt: skip
"""Architectures whose class in vLLM serves no LoRA at all."""


def servable_embeddings(architecture: str) -> tuple[str, ...] | None:
    """Return the embedding modules whose LoRA vLLM serves for an architecture, such as `LlamaForCausalLM`.

    None if vLLM serves no LoRA for it.
    """
    name = architecture.removesuffix("ForCausalLM")
    if name in WITHOUT_LORA:
        return None
    if name in WITH_EMBEDDINGS:
        return EMBEDDINGS
    return () if name in WITHOUT_EMBEDDINGS else INPUT_EMBEDDINGS


def unservable_modules(modules: Iterable[str], config: Mapping[str, object]) -> list[str]:
    """Return why vLLM does not serve LoRA on these embeddings and output heads of a base model, or on any module of it.

    Args:
        modules: their names; others are not checked.
        config: the base model's `config.json`.
    """
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    served = servable_embeddings(architecture)
    if served is None:
        return [f"vLLM {VLLM_VERSION} serves no LoRA on {architecture}"]
    return [
        f"{module} is adapted, and vLLM {VLLM_VERSION} does not serve that for {architecture or 'this architecture'}"
        for module in modules
        if module.rpartition(".")[2] not in served
    ]


TURNED_OFF = (None, False, [], {})
"""Values of a field that turn its option off; a few options have one more."""


def used_options(config: Mapping[str, object]) -> list[LoraOption]:
    """Return the options that an adapter's config turns on."""
    return [option for option in OPTIONS if config.get(option.field) not in (*TURNED_OFF, option.unused)]


def support_table() -> list[str]:
    """Return both tables as the lines of one Markdown table."""
    lines = ["| LoRA with | `merge_adapter` | vLLM |", "|---|---|---|"]
    served = {"yes": "yes", "no": "merge it", "if equal": "if they equal the base's; else merge it"}
    for option in OPTIONS:
        merge = "yes" if option.is_streamed else "by PEFT, in memory"
        if option.field == "alora_invocation_tokens":
            merge = "no: it is switched on by tokens"
        vllm = "no" if merge.startswith("no") else served[option.vllm]
        lines.append(f"| {option.label} (`{option.field}`) | {merge} | {vllm} |")
    for init in INITS:
        name = f"{init.name}N" if init.name.endswith("_") else init.name
        merge, vllm = "yes", "yes"
        if init.changes_base:
            merge = "by PEFT, in memory" if init.is_repeated else "convert it first"
            vllm = "with `--initial-adapter`" if init.is_convertible else "merge it"
            if init.is_convertible and init.is_repeated:
                vllm = "converted, if the base is there"
        lines.append(f"| {init.label} initialization (`init_lora_weights: {name}`) | {merge} | {vllm} |")
    return lines
