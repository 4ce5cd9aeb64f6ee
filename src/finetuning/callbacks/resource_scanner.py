"""Measures time and memory of one step and writes them to a file, like `hf_resource_scanner` of fms-hf-tuning.

The file has the format of HFResourceScanner. That package patches functions of the trainer and of torch.distributed;
here temporary hooks on the model are used instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, TrainerCallback, TrainerState
    from transformers import TrainerControl as Control
    from transformers import TrainingArguments as Args

SCANNED_STEP = 5
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class ResourceScan:
    """The measurements of one step.

    Times are nanoseconds since 1970, or since the step began for `relative` ones. Those of forward and backward pass
    are of the last micro-batch.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self._model = model
        self._device = device
        self._began = 0
        self._tokens = 0
        self.times: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.mark("step_begin")
        self._hooks = [
            model.register_forward_pre_hook(self._forward_begins, with_kwargs=True),
            model.register_forward_hook(self._forward_ended),
        ]

    def mark(self, name: str) -> None:
        """Record the time of an event, after synchronizing the device."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.time_ns()
        self._began = self._began or now
        self.times[f"{name}_absolute"] = now
        self.times[f"{name}_relative"] = now - self._began

    def _forward_begins(self, module: nn.Module, arguments: object, more: Mapping[str, torch.Tensor]) -> None:
        self.mark("fwd_begin")
        ids = more.get("input_ids")
        self._tokens += 0 if ids is None else ids.numel()

    def _forward_ended(self, module: nn.Module, arguments: object, output: object) -> None:
        self.mark("fwd_end")
        self.mark("bwd_begin")
        self.memory["after_forward"] = self._allocated()

    def backward_ended(self) -> None:
        """Record the end of the backward pass and the size of the gradients."""
        self.mark("bwd_end")
        grads = [weight.grad for weight in self._model.parameters() if weight.grad is not None]
        self.memory["gradients"] = sum(grad.numel() * grad.element_size() for grad in grads)
        self.mark("opt_begin")

    def finished(self, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """Remove the hooks and return the content of the file."""
        import torch

        self.mark("step_end")
        for hook in self._hooks:
            hook.remove()
        states = (value for state in optimizer.state.values() for value in state.values())
        held = [value for value in states if isinstance(value, torch.Tensor)]
        sizes = {
            "model": self._model.get_memory_footprint(),
            "optimizer": sum(value.numel() * value.element_size() for value in held),
            "gradients": self.memory["gradients"],
        }
        if self._device.type == "cuda":
            sizes["cudamem"] = self._allocated()
            sizes["cuda_max_mem"] = torch.cuda.max_memory_allocated(self._device)
            sizes["activation"] = max(self.memory["after_forward"] - sizes["model"] - sizes["optimizer"], 0)
        seconds = self.times["step_end_relative"] / 1e9
        return {
            "time_data": self.times,
            "mem_data": {name: _size(value) for name, value in sizes.items()},
            "tps_data": {"tokens": self._tokens, "tps": self._tokens / seconds},
            "metadata": {"step": SCANNED_STEP, "device": str(self._device)},
        }

    def _allocated(self) -> int:
        import torch

        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0


def scanner_callback(path: Path) -> TrainerCallback:
    """Return a callback that measures step 5 on the main process and writes the file. A shorter run has no file."""
    from transformers import TrainerCallback

    class Scanner(TrainerCallback):
        """See `scanner_callback`."""

        scan: ResourceScan | None = None

        def on_step_begin(
            self, args: Args, state: TrainerState, control: Control, *, model: PreTrainedModel, **kwargs: object
        ) -> None:
            if state.is_world_process_zero and state.global_step == SCANNED_STEP - 1:
                self.scan = ResourceScan(model, args.device)

        def on_pre_optimizer_step(self, args: Args, state: TrainerState, control: Control, **kwargs: object) -> None:
            if self.scan:
                self.scan.backward_ended()

        def on_optimizer_step(self, args: Args, state: TrainerState, control: Control, **kwargs: object) -> None:
            if self.scan:
                self.scan.mark("opt_end")

        def on_step_end(
            self,
            args: Args,
            state: TrainerState,
            control: Control,
            *,
            optimizer: torch.optim.Optimizer,
            **kwargs: object,
        ) -> None:
            scan, self.scan = self.scan, None
            if scan:
                path.write_text(json.dumps(scan.finished(optimizer), indent=1) + "\n", encoding="utf-8")

    return Scanner()


def _size(count: float) -> str:
    """
    >>> _size(512), _size(3 * 1024**2)
    ('512.0 B', '3.0 MiB')
    """
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"
