"""What a run gets from its device unless its config says otherwise.

On a GPU: data type, optimizer, precision, copies, allocator. On a CPU: the faster data type.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.pretrained_config import find_pretrained_config
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import BitsAndBytes
from finetuning.config.yaml.reader import read_document
from finetuning.plan.features import RunContext
from finetuning.plan.plan import Decision
from finetuning.report.run_folder import CONFIG_NAME

if TYPE_CHECKING:
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import Plan
    from finetuning.training.rehearsal import DeviceModel

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_AMPERE = 8
"""The first generation of NVIDIA GPUs with bfloat16 and TF32 in hardware."""
_SAME_MEMORY = 0.02
"""How much the memory of a GPU may differ from that of its type."""


_CLEARLY_FASTER = 1.2
"""How many times as fast bfloat16 has to be: less would let the noise of the probe decide."""
_PROBE_TOKENS, _PROBE_ROUNDS = 512, 2
_PROBE_HIDDEN, _PROBE_INNER = 512, 2048
"""The widest layer of the probe: wider ones take longer, and the ratio is about the same."""


def with_faster_dtype(experiment: Experiment, topology: ProcessTopology) -> tuple[Experiment, list[Decision]]:
    """Return the experiment with bfloat16 autocast if the CPU computes this model faster with it, and the reason.

    Only where the config sets neither `bf16` nor `fp16` and weights are in float32. A run that continues another one
    computes as that one did.
    """
    import torch

    args, context = experiment.training_args, RunContext(experiment, topology, 1)
    on_cpu = bool((args.model_extra or {}).get("use_cpu")) or not torch.accelerator.is_available()
    is_open = not args.fp16 and "bf16" not in args.model_fields_set and not args.deepspeed
    weights = context.checkpoint_dtype if context.weights_dtype == "auto" else context.weights_dtype
    if not (on_cpu and is_open) or weights not in (None, "float32") or topology.is_distributed:
        return experiment, []
    if experiment.run_conf.determinism != "no":
        return experiment, [_dtype_decision("float32", "run_conf.determinism: the time of a probe decides nothing")]
    earlier = _earlier_bf16(experiment)
    if earlier is not None:
        chosen, reason = earlier, "as the run that it continues"
    else:
        ratio = bfloat16_speed(find_pretrained_config(experiment.run_conf.model) or {}, context.trains_all_weights)
        if ratio is None:
            return experiment, []
        chosen = ratio >= _CLEARLY_FASTER
        reason = f"bfloat16 is {ratio:.2f} times as fast on this CPU, by a probe of a layer"
    if not chosen:
        return experiment, [_dtype_decision("float32", reason)]
    args = args.model_copy(update={"bf16": True})
    return experiment.model_copy(update={"training_args": args}), [_dtype_decision("bfloat16", reason)]


def _dtype_decision(value: str, reason: str) -> Decision:
    return Decision("computation", value, f"{reason}; training_args.bf16 sets it")


def _earlier_bf16(experiment: Experiment) -> bool | None:
    """Return `training_args.bf16` of the run that this one continues; None if there is none."""
    requested = str(experiment.run_conf.resume_from_checkpoint)
    if requested.lower() == "false":
        return None
    is_path = requested.lower() not in ("true", "auto")
    file = (Path(requested).parent if is_path else Path(experiment.training_args.output_dir)) / CONFIG_NAME
    if not file.is_file():
        return None
    value = read_document(file).values.get("training_args")
    return bool(value.get("bf16")) if isinstance(value, dict) else None


def bfloat16_speed(config: Mapping[str, object], trains_weights: bool) -> float | None:
    """Return how many times as fast as float32 autocast to bfloat16 computes a layer, forward and backward, here.

    Args:
        config: the model's config.json.
        trains_weights: whether gradients of the weights are computed.

    Returns:
        The ratio; None if the config does not name the sizes.
    """
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

    sizes = [config.get(name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")]
    hidden, inner, heads = (size if isinstance(size, int) and size > 0 else 0 for size in sizes)
    if not (hidden and inner and heads) or hidden % heads:
        return None
    head_size, tokens = hidden // heads, _PROBE_TOKENS
    heads = max(min(hidden, _PROBE_HIDDEN) // head_size, 1)
    hidden, inner = heads * head_size, min(inner, _PROBE_INNER)
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, trained: bool = trains_weights) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).requires_grad_(trained)

    query, key, value, output = (make(hidden, hidden) for _ in range(4))
    gate, up, down = make(inner, hidden), make(inner, hidden), make(hidden, inner)
    states = make(tokens, hidden, trained=True)

    def seconds(in_bfloat16: bool) -> float:
        start = time.thread_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            normed = rms_norm(states, (hidden,))
            first, second, third = (
                linear(normed, weight).view(1, tokens, heads, -1).transpose(1, 2) for weight in (query, key, value)
            )
            attended = (
                scaled_dot_product_attention(first, second, third, is_causal=True)
                .transpose(1, 2)
                .reshape(tokens, hidden)
            )
            residual = states + linear(attended, output)
            normed = rms_norm(residual, (hidden,))
            result = residual + linear(silu(linear(normed, gate)) * linear(normed, up), down)
        result.float().square().mean().backward()
        return time.thread_time() - start

    times: dict[bool, list[float]] = {False: [], True: []}
    # The CPU time of one thread: other processes, and threads that wait for each other, do not decide.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(1 + _PROBE_ROUNDS):
            for in_bfloat16, measured in times.items():
                measured.append(seconds(in_bfloat16))
    finally:
        torch.set_num_threads(threads)
    # The first of each is a warm-up; the fastest of the others was disturbed least.
    return min(times[False][1:]) / min(times[True][1:])


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
