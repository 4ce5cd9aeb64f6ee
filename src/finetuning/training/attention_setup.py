"""The attention of a run: chosen by its circumstances, kept where it is proven on the model itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm
from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.config.sections.experiment import Experiment
from finetuning.distributed import ProcessTopology
from finetuning.plan.attention import DEFAULT_ATTENTION, AttentionChoice, AttentionContext, RowLayout, choose_attention

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


@dataclass(frozen=True)
class AttentionSetup:
    """Implementations to try in the place of the one that the model was loaded with, the best first; and why that one
    computes which does."""

    to_try: tuple[str, ...]
    reason: str
    autocast: torch.dtype | None = None
    """The type that the run computes in by autocast; None without."""


def setup_attention(
    experiment: Experiment, method: Algorithm, model: Any, arguments: TrainingArguments, topology: ProcessTopology
) -> AttentionSetup:
    """What is to be tried on a model that was loaded: nothing where the config names an implementation."""
    import torch

    if experiment.run_conf.model_args.attn_implementation:
        return AttentionSetup((), "as configured")
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    choice = _choice(experiment, method, model, arguments, topology, autocast or model.dtype)
    return AttentionSetup(tuple(name for name in choice.ranked if name != DEFAULT_ATTENTION), choice.reason, autocast)


def enable_padding_free(
    adapted: Any, attention: AttentionSetup, topology: ProcessTopology
) -> tuple[str | None, AttentionSetup]:
    """None where the model computes rows end to end from now on, otherwise the reason why it does not; and the
    attention that it does it by.

    Under FSDP the main process alone is sure to hold the weights: with `cpu_ram_efficient_loading` the others get
    theirs when the model is shared out, which is later.
    """
    from finetuning.model.varlen_attention import SDPA_VARLEN, enable_varlen, enable_varlen_kernel, use_varlen
    from finetuning.training.process_sync import broadcast_from_main

    model, peft_config = adapted.model, adapted.peft_config

    def find_out() -> tuple[str | None, str, tuple[str, ...]]:
        tried: list[str] = []
        for name in attention.to_try:
            why_not = _unusable(name) or enable_varlen_kernel(model, name, peft_config, attention.autocast)
            if why_not is None:
                return None, name, tuple(tried)
            tried.append(f"{name} was not taken: {why_not}")
        return enable_varlen(model, peft_config), SDPA_VARLEN, tuple(tried)

    reason, name, tried = broadcast_from_main(find_out, topology.world_size)
    if reason is None:
        use_varlen(model, name)
    chosen = attention.reason if name != SDPA_VARLEN or not tried else "the default"
    return reason, replace(attention, reason="; ".join([chosen, *tried]))


def _choice(
    experiment: Experiment,
    method: Algorithm,
    model: Any,
    arguments: TrainingArguments,
    topology: ProcessTopology,
    dtype: torch.dtype,
) -> AttentionChoice:
    from finetuning.model.hardware import training_device

    installed = tuple(name for name, package in FLASH_ATTENTION_PACKAGES.items() if package.is_installed)
    if not installed:
        return choose_attention(AttentionContext())
    device = training_device(arguments.use_cpu)
    config = model.config.get_text_config()
    return choose_attention(
        AttentionContext(
            device=device.kind,
            capability=device.capability,
            installed=installed,
            dtype=str(dtype).removeprefix("torch."),
            layout=_row_layout(experiment, method),
            method=method.name,
            sharded_by=topology.sharded_by or ("deepspeed" if experiment.training_args.deepspeed else None),
            is_deterministic=experiment.run_conf.determinism != "no" or arguments.full_determinism,
            has_dropout=any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")),
        )
    )


def _row_layout(experiment: Experiment, method: Algorithm) -> RowLayout:
    """How the rows are to lie, where the model allows it."""
    if not method.lays_end_to_end or experiment.sft_args.batching == "padded":
        return "padded"
    return "packed" if experiment.sft_args.packing else "padding-free"


def _unusable(name: str) -> str | None:
    """Why transformers would not compute by a package that is installed: it would look for a kernel on the hub."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    looks = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    return None if looks[name]() else "transformers does not take the version that is installed"
