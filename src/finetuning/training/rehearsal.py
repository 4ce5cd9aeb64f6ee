"""Rehearse a training step on fake tensors: its peak memory, its time on a device, and what would make a GPU wait.

The model is built from its config without weights, with the run's adapter, dtype, autocast, checkpointing and loss, and
computes one optimizer step on tensors that have a shape and no values. Every operation passes through a dispatch mode,
which follows each storage from its allocation to its release and adds up the work. Layers of one kind cost the same, so
a model with one and with two of each kind gives the whole; `exact` computes all layers.

Times are those of a roofline: an operation takes as long as its arithmetic or its memory traffic, whichever is longer,
at the shares of a device's peak that large operations reach, and no less than it takes to start it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from finetuning.errors import ConfigError, Location, first_line
from finetuning.training.rehearsed_model import (
    Model,
    StepShape,
    build_model,
    build_reference,
    make_fake,
    read_config,
    with_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from finetuning.config.sections.experiment import Experiment
    from finetuning.trainer.data_dependence import DataDependentOperation, Operator

Category = Literal["weights", "gradients", "optimizer", "activations", "temporary"]
CATEGORIES: tuple[Category, ...] = ("weights", "gradients", "optimizer", "activations", "temporary")
GIB = 1 << 30


@dataclass(frozen=True)
class DeviceModel:
    """What a device can do, from its data sheet."""

    title: str
    memory: float
    """Bytes."""
    half: float
    """Dense FLOP/s in bfloat16 with float32 accumulation."""
    single: float
    """FLOP/s in float32 (TF32 is not counted)."""
    bandwidth: float
    """Bytes per second."""


DEVICES: dict[str, DeviceModel] = {
    "h100": DeviceModel("NVIDIA H100 SXM, 80 GB", 79.6 * GIB, 989.4e12, 67e12, 3.35e12),
    "h200": DeviceModel("NVIDIA H200 SXM, 141 GB", 139.8 * GIB, 989.4e12, 67e12, 4.8e12),
    "b200": DeviceModel("NVIDIA B200, 180 GB", 178.3 * GIB, 2250e12, 75e12, 7.7e12),
    "a100": DeviceModel("NVIDIA A100 SXM, 80 GB", 79.1 * GIB, 312e12, 19.5e12, 2.04e12),
    "a100-40gb": DeviceModel("NVIDIA A100, 40 GB", 39.4 * GIB, 312e12, 19.5e12, 1.56e12),
    "l40s": DeviceModel("NVIDIA L40S, 48 GB", 44.5 * GIB, 362e12, 91.6e12, 0.864e12),
    "l4": DeviceModel("NVIDIA L4, 24 GB", 22.0 * GIB, 121e12, 30.3e12, 0.3e12),
    "mi300x": DeviceModel("AMD MI300X, 192 GB", 191.5 * GIB, 1307.4e12, 163.4e12, 5.3e12),
    "mi325x": DeviceModel("AMD MI325X, 256 GB", 255.5 * GIB, 1307.4e12, 163.4e12, 6.0e12),
}
"""By the names that `--device` takes."""
_REACHED_FLOPS, _REACHED_BANDWIDTH = 0.75, 0.85
_LAUNCH_S = 6e-6
USABLE_MEMORY = 0.94
"""Share of a device's memory that tensors can fill: the rest is fragments, kernels and the communication library."""
_GPU_BLOCK, _CPU_BLOCK = 512, 64
"""Bytes that allocators round up to."""
_FAILED_STEP = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, NotImplementedError)
"""What models raise that cannot compute a step on fake tensors."""


@dataclass
class Cost:
    """The cost of an optimizer step."""

    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Bytes by category when most memory is in use, for each part of a step. Each grows by a line with the number of
    layers; which of them is the largest differs between few layers and many."""
    flops: float = 0.0
    seconds: float = 0.0
    """Of one micro-batch, forward and backward."""
    update_seconds: float = 0.0
    by_operation: dict[str, float] = field(default_factory=dict)
    """Seconds by operation."""
    trained: float = 0.0
    """Number of trained weights."""
    operations: tuple[DataDependentOperation, ...] = ()

    @property
    def peak(self) -> dict[str, float]:
        """Bytes by category at the moment when most memory is in use."""
        return max(self.peaks.values(), key=lambda sizes: sum(sizes.values()), default={})

    @property
    def peak_bytes(self) -> float:
        return sum(self.peak.values())

    def extrapolated(self, more: Cost, layers: float) -> Cost:
        """Return the cost with `layers` times what `more` has more than this one."""

        def line(first: float, second: float) -> float:
            return first + layers * (second - first)

        def lines(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
            names = dict.fromkeys([*first, *second])
            return {name: max(line(first.get(name, 0.0), second.get(name, 0.0)), 0.0) for name in names}

        return Cost(
            {part: lines(self.peaks.get(part, {}), more.peaks.get(part, {})) for part in {**self.peaks, **more.peaks}},
            line(self.flops, more.flops),
            line(self.seconds, more.seconds),
            line(self.update_seconds, more.update_seconds),
            lines(self.by_operation, more.by_operation),
            line(self.trained, more.trained),
            self.operations,
        )


class _CostTracker(TorchDispatchMode):
    """Follows the storages and the work of a block."""

    def __init__(self, device: DeviceModel, shape: StepShape):
        super().__init__()
        self.device, self.shape = device, shape
        self.phase: Category = "weights"
        self.part = "forward pass"
        self.sizes: dict[int, tuple[int, Category]] = {}
        self.current = dict.fromkeys(CATEGORIES, 0.0)
        self.peaks: dict[str, dict[Category, float]] = {}
        self.flops = self.seconds = 0.0
        self.by_operation: dict[str, float] = {}
        self._block = _GPU_BLOCK if shape.for_gpu else _CPU_BLOCK

    def __torch_dispatch__(
        self,
        func: Operator,
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        results = [value for value in tree_iter(output) if isinstance(value, torch.Tensor)]
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        sources = {id(value.untyped_storage()) for value in inputs}
        is_view = bool(results) and all(id(value.untyped_storage()) in sources for value in results)
        for value in results:
            self._follow(value)
        if func.name().endswith("gemm_4bit"):
            self.count_temporary(inputs[0].shape[-1] * results[0].shape[-1] * inputs[0].element_size())
        if not func.name().startswith("prim") and not (is_view and func.is_view):
            self._add_work(func, args, kwargs, output, inputs, results)
        return output

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.sizes:
            return
        size = -(-storage.nbytes() // self._block) * self._block
        self.sizes[key] = (size, self.phase)
        self.current[self.phase] += size
        self._note_peak()
        weakref.finalize(storage, self._release, key)

    def count_temporary(self, size: int) -> None:
        """Count memory that an operation has allocated and released: bitsandbytes restores a whole weight."""
        self.current["temporary"] += size
        self._note_peak()
        self.current["temporary"] -= size

    def _note_peak(self) -> None:
        if sum(self.current.values()) > sum(self.peaks.get(self.part, {}).values()):
            self.peaks[self.part] = dict(self.current)

    def _release(self, key: int) -> None:
        size, category = self.sizes.pop(key, (0, "temporary"))
        self.current[category] -= size

    def reclassify(self, tensor: torch.Tensor, category: Category) -> None:
        """Count a tensor in another category from now on."""
        key = id(tensor.untyped_storage())
        if key in self.sizes:
            size, before = self.sizes[key]
            self.sizes[key] = (size, category)
            self.current[before] -= size
            self.current[category] += size

    def follow_gradients(self, trained: Sequence[torch.Tensor], embeddings: set[int]) -> None:
        """Count what is accumulated as gradients.

        Args:
            embeddings: ids of weights that are not those of layers.
        """

        def count(weight: torch.Tensor) -> None:
            if weight.grad is not None:
                self.reclassify(weight.grad, "gradients")
            if id(weight) not in embeddings:
                # The logits are released, and the gradients of the layers come in.
                self.part = "backward pass of the layers"

        for weight in trained:
            weight.register_post_accumulate_grad_hook(count)

    def _add_work(
        self,
        func: Operator,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        output: object,
        inputs: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        name = func.name().rpartition("::")[2].partition(".")[0]
        if name.startswith(("empty", "detach", "alias", "_unsafe_view")):
            return
        flops = self._attention_flops(name, inputs)
        if name == "gemm_4bit":
            # The input times the weight of shape (outputs, inputs).
            flops = 2.0 * inputs[0].numel() * results[0].shape[-1]
        if flops is None:
            count = flop_registry.get(func.overloadpacket)
            flops = float(count(*args, **kwargs, out_val=output)) if count else 0.0
        moved = sum(value.numel() * value.element_size() for value in (*inputs, *results))
        if name == "embedding":
            moved = 2 * sum(value.numel() * value.element_size() for value in results)
        # By the first tensor: attention's backward pass also takes its normalizers, which are in 32 bit.
        is_half = bool(inputs) and inputs[0].dtype in (torch.bfloat16, torch.float16)
        peak = self.device.half if is_half else self.device.single
        seconds = max(flops / (peak * _REACHED_FLOPS), moved / (self.device.bandwidth * _REACHED_BANDWIDTH), _LAUNCH_S)
        self.flops += flops
        self.seconds += seconds
        label = f"{name} ({'16 bit' if is_half else '32 bit'})" if flops else name
        self.by_operation[label] = self.by_operation.get(label, 0.0) + seconds

    def _attention_flops(self, name: str, inputs: Sequence[torch.Tensor]) -> float | None:
        """Return the FLOPs of causal attention, half of the square of each row's length; None for other operations."""
        if "varlen_attn" in name:
            query = inputs[1] if "backward" in name else inputs[0]
            width, squares = query.shape[-2] * query.shape[-1], sum(length**2 for length in self.shape.row_lengths)
        elif "scaled_dot_product" in name:
            query = inputs[1] if "backward" in name else inputs[0]
            width, squares = query.shape[1] * query.shape[-1], query.shape[0] * query.shape[2] ** 2
        else:
            return None
        # Two matrix products forward, five backward, of which one recomputes the scores.
        return 2.0 * squares * width * (2.5 if "backward" in name else 1.0)


def rehearse(experiment: Experiment, shape: StepShape, device: DeviceModel, *, exact: bool = False) -> Cost:
    """Return the cost of an optimizer step on the device, extrapolated from few layers or computed of all.

    Raises:
        ConfigError: the model cannot compute a step on fake tensors, or is quantized otherwise than in 4 bit.
        ModelError: the model's config or class cannot be read.
    """
    config = read_config(experiment)
    text = config.get_text_config()
    total: int = text.num_hidden_layers
    kinds: list[str] = list(getattr(text, "layer_types", None) or ["all"] * total)
    if exact:
        return _cost(experiment, config, shape, device, list(range(total)))
    first = {kind: kinds.index(kind) for kind in kinds}
    minimal = sorted(first.values())
    base = _cost(experiment, config, shape, device, minimal)
    result = base
    for kind, layer in first.items():
        remaining = kinds.count(kind) - 1
        if remaining:
            more = _cost(experiment, config, shape, device, sorted([*minimal, layer]))
            result = _sum(result, base.extrapolated(more, remaining), base)
    return result


def _sum(total: Cost, more: Cost, base: Cost) -> Cost:
    """Return `total` with what `more` has more than `base`."""

    def plus(name: str) -> float:
        return getattr(total, name) + getattr(more, name) - getattr(base, name)

    def plus_each(name: str) -> dict[str, float]:
        first, second, third = getattr(total, name), getattr(more, name), getattr(base, name)
        return {key: first.get(key, 0.0) + second.get(key, 0.0) - third.get(key, 0.0) for key in {**first, **second}}

    names = ("flops", "seconds", "update_seconds", "trained")
    peaks = {
        part: {
            name: size + more.peaks[part].get(name, 0.0) - base.peaks[part].get(name, 0.0)
            for name, size in sizes.items()
        }
        for part, sizes in total.peaks.items()
    }
    return replace(total, peaks=peaks, by_operation=plus_each("by_operation"), **{name: plus(name) for name in names})


def _cost(
    experiment: Experiment, config: PreTrainedConfig, shape: StepShape, device: DeviceModel, layers: Sequence[int]
) -> Cost:
    """Return the cost with these layers of the model, by their index; an index may occur twice."""
    from finetuning.trainer.data_dependence import DataDependenceRecorder

    config = with_layers(config, layers)
    model = build_model(experiment, config, shape)
    reference = build_reference(experiment, config, shape) if shape.has_reference else None
    tracker = _CostTracker(device, shape)
    recorder = DataDependenceRecorder()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        make_fake(model, shape.weights)
        if reference is not None:
            make_fake(reference, shape.weights)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        tracker.phase = "optimizer"
        states = [torch.empty_like(weight) for weight in trained for _ in range(shape.optimizer_states)]
        tracker.follow_gradients(trained, _embedding_weights(model))
        recorder.start()
        before = (0.0, 0.0, dict[str, float]())
        try:
            for _ in range(min(shape.micro_batches, 2)):
                before = (tracker.flops, tracker.seconds, dict(tracker.by_operation))
                _forward_backward(model, reference, shape, tracker)
            work = (tracker.flops - before[0], tracker.seconds - before[1])
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            last = recorder.operations[-1] if recorder.operations else error
            raise ConfigError(
                f"the step cannot be rehearsed: the model needs a value of a tensor to continue: {last}",
                location=Location(key="run_conf.model"),
            ) from error
        except _FAILED_STEP as error:
            raise ConfigError(
                f"the step cannot be rehearsed: {first_line(error)}", location=Location(key="run_conf.model")
            ) from error
        finally:
            recorder.stop()
        by_operation = {name: seconds - before[2].get(name, 0.0) for name, seconds in tracker.by_operation.items()}
        start = tracker.seconds
        tracker.phase, tracker.part = "temporary", "update"
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not shape.fused_update:
            sizes = [weight.numel() * weight.element_size() for weight in trained]
            # torch's Adam takes the root of all second moments at once on a GPU, and on a CPU weight by weight, in two.
            tracker.count_temporary(sum(sizes) if shape.for_gpu else 2 * max(sizes))
        count = sum(weight.numel() for weight in trained)
        # A fused update reads weight, gradient and states, and writes all but the gradient.
        update = tracker.seconds - start + 28.0 * count / (device.bandwidth * _REACHED_BANDWIDTH)
        del states
    peaks: dict[str, dict[str, float]] = {part: {**sizes} for part, sizes in tracker.peaks.items()}
    return Cost(peaks, *work, update, by_operation, float(count), tuple(recorder.operations))


def _forward_backward(model: Model, reference: Model | None, shape: StepShape, tracker: _CostTracker) -> None:
    tracker.phase, tracker.part = "activations", "forward pass"
    with _autocast(shape.autocast):
        loss = _dpo_loss(model, reference, shape) if shape.method == "dpo" else _sft_loss(model, shape)
    tracker.phase, tracker.part = "temporary", "backward pass of the loss"
    loss.backward()


def _embedding_weights(model: Model) -> set[int]:
    from finetuning.model.peft.adapters import base_model_of

    base = base_model_of(model)
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    return {id(weight) for module in modules if module is not None for weight in module.parameters()}


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _sft_inputs(shape: StepShape) -> dict[str, Any]:
    rows, longest, tokens = len(shape.row_lengths), max(shape.row_lengths), sum(shape.row_lengths)
    if shape.padded:
        ids = torch.zeros(rows, longest, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "use_cache": False}
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    borders = torch.zeros(rows + 1, dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": torch.zeros_like(ids),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "row_lengths": list(shape.row_lengths),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "use_cache": False,
    }


def _sft_loss(model: Model, shape: StepShape) -> torch.Tensor:
    from finetuning.model.peft.adapters import base_model_of
    from finetuning.trainer.chunked_cross_entropy import ChunkedCrossEntropy
    from finetuning.trainer.hooks import select_head_input

    inputs = _sft_inputs(shape)
    positions = torch.zeros(shape.num_labels, dtype=torch.int64)
    labels = torch.zeros(shape.num_labels, dtype=torch.int64)
    if shape.num_labels > shape.max_labels_at_once:
        loss = ChunkedCrossEntropy(model, shape.labels_per_chunk, None, fused=shape.fused_loss, is_checked=True)
        result = loss(model, inputs, labels, positions)
        assert result is not None
        return result[1]
    head = base_model_of(model).get_output_embeddings()
    assert head is not None
    with select_head_input(head, positions):
        logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels, reduction="sum")


def _dpo_loss(model: Model, reference: Model | None, shape: StepShape) -> torch.Tensor:
    """Return the loss of pairs: the policy, then the reference, on chosen and rejected answers together."""
    from finetuning.model.peft.adapter_files import is_peft_model

    rows, longest = 2 * len(shape.row_lengths), max(shape.row_lengths)
    ids = torch.zeros(rows, longest, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": ids, "fused_lm_head": True}
    policy = model(**inputs, use_cache=False).log_probs.sum(-1)
    without = model.disable_adapter() if is_peft_model(model) else nullcontext()
    with torch.no_grad(), without:
        expected = (reference or model)(**inputs, use_cache=False).log_probs.sum(-1)
    chosen, rejected = (policy - expected).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
