"""What a run on a GPU gets unless its config says otherwise: data type, optimizer, precision, copies, allocator."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import BitsAndBytes
from finetuning.plan.plan import Decision

if TYPE_CHECKING:
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import Plan
    from finetuning.training.rehearsal import DeviceModel

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_AMPERE = 8
"""The first generation of NVIDIA GPUs with bfloat16 and TF32 in hardware."""
_SAME_MEMORY = 0.02
"""How much the memory of a GPU may differ from that of its type."""


def configure_allocator(environ: MutableMapping[str, str], *, is_rocm: bool) -> None:
    """Let torch's allocator grow its blocks: rows of other lengths then leave no memory that cannot be used.

    torch reads the variable when it first uses a GPU. ROCm does not support it.
    """
    if not is_rocm and not any(name in environ for name in _ALLOCATOR_VARIABLES):
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def use_local_device(topology: ProcessTopology) -> None:
    """Select the GPU of this process, before anything else asks for one: what does would open the first GPU."""
    import torch

    if torch.cuda.is_available() and topology.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(topology.local_rank)


def gpu_defaults(experiment: Experiment, *, has_bfloat16: bool, has_tf32: bool) -> tuple[Experiment, list[Decision]]:
    """Return the experiment with the settings that a GPU computes fastest with, and what was set and why.

    Only keys that the config does not set are changed, and none under DeepSpeed, which has a config of its own.

    Args:
        has_bfloat16: whether the GPU multiplies matrices of bfloat16 in hardware.
        has_tf32: whether it has TF32.
    """
    args = experiment.training_args
    extra = args.model_extra or {}
    if args.deepspeed or extra.get("use_cpu"):
        return experiment, []
    chosen: dict[str, Any] = {}
    made: list[Decision] = []
    if has_bfloat16 and not args.fp16 and "bf16" not in args.model_fields_set:
        chosen["bf16"] = True
        made.append(Decision("bf16", "true", "this GPU computes in bfloat16 many times faster than in float32"))
    if args.optim == "adamw_torch" and "optim" not in args.model_fields_set:
        chosen["optim"] = "adamw_torch_fused"
        made.append(Decision("optim", "adamw_torch_fused", "one kernel for all weights"))
    if has_tf32 and "tf32" not in extra and experiment.run_conf.determinism == "no":
        chosen["tf32"] = True
        made.append(Decision("tf32", "true", "for what is computed in float32"))
    if experiment.method_name == "sft" and extra.get("use_liger_kernel") and "liger_kernel_config" not in extra:
        chosen["liger_kernel_config"] = {"fused_linear_cross_entropy": False, "cross_entropy": False}
        made.append(Decision("Liger kernels", "norms, rope, MLPs", "the loss in chunks is ours, for any batch"))
    if "accelerator_config" not in extra:
        # The copy of a batch to the device then overlaps with the step before; its memory is pinned by default.
        chosen["accelerator_config"] = {"non_blocking": True}
    updated = experiment.model_copy(update={"training_args": args.model_copy(update=chosen)}) if chosen else experiment
    quant = experiment.quant_conf
    if isinstance(quant, BitsAndBytes) and quant.load_in_4bit and quant.bnb_4bit_compute_dtype is None and has_bfloat16:
        quant = quant.model_copy(update={"bnb_4bit_compute_dtype": "bfloat16"})
        updated = updated.model_copy(update={"quant_conf": quant})
        made.append(Decision("4-bit computation", "bfloat16", "this GPU multiplies bfloat16 in hardware"))
    return updated, made


def with_gpu_defaults(experiment: Experiment, topology: ProcessTopology) -> tuple[Experiment, list[Decision]]:
    """Return `gpu_defaults` for the GPU of this process; the experiment as it is where there is none."""
    import torch

    configure_allocator(os.environ, is_rocm=torch.version.hip is not None)
    if not torch.cuda.is_available():
        return experiment, []
    use_local_device(topology)
    major = torch.cuda.get_device_capability()[0]
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return gpu_defaults(experiment, has_bfloat16=has_bfloat16, has_tf32=not torch.version.hip and major >= _AMPERE)


def with_memory_plan(experiment: Experiment, plan: Plan) -> tuple[Experiment, Plan]:
    """Return experiment and plan with what fits into the GPU of this process; as they are where there is none."""
    import torch

    if not torch.cuda.is_available() or (experiment.training_args.model_extra or {}).get("use_cpu"):
        return experiment, plan
    from finetuning.training.memory_plan import plan_memory

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return plan_memory(experiment, plan, device_model(properties.name, properties.total_memory))


def device_model(name: str, memory: int) -> DeviceModel:
    """Return what is known of a GPU: of one that is not in the table, only its memory.

    Processes plan alike: GPUs of one type differ by some megabytes, so that the table or whole GiB are used.

    Args:
        name: as the driver names it, such as `NVIDIA H100 80GB HBM3`.
        memory: bytes.
    """
    from finetuning.training.rehearsal import DEVICES, GIB

    words = name.upper().replace("-", " ").split()
    for key, device in DEVICES.items():
        is_named = key.partition("-")[0].upper() in words
        if is_named and abs(device.memory / memory - 1) < _SAME_MEMORY:
            return device
    unknown = DEVICES["a100"]
    return replace(unknown, title=name, memory=float(memory // GIB * GIB))
