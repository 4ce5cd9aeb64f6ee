"""Metrics of TRL's preference trainers that are read from the device when they are logged, not at each step.

TRL computes a dozen metrics at each step and reads each from the device at once (`.item()`), branches on counts, and
selects by masks whose number of True the host does not know. On a GPU each of these waits for everything before it. The
counts are known before a batch is copied to the device, so here they come with it, and nothing has to be read.

A function mode of torch changes these calls where a trainer of TRL makes them: `item()` returns the tensor, comparing a
count with 0 is true (checked beforehand), and indices of masks are computed by operations of a known size, which
gives the same values in the same order. Read in TRL 1.16; `tests/upstream_surface.toml` has the digests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from finetuning.data.collators import IMAGE_ROWS
from finetuning.trainer import TrainerBase

COUNTS = "host_counts"
"""The key of a batch that holds its counts."""
Counts = dict[str, int]
Batch: TypeAlias = dict[str, Any]
Rows: TypeAlias = list[object]
Collator = Callable[..., Batch]
Metrics: TypeAlias = dict[str, dict[str, list[Any]]]


class CountingCollator:
    """Adds counts to the batches of a collator of TRL, before they are copied to a device.

    With pairs, the first half of the rows is chosen and the second rejected; with `label`, as for KTO, each row has its
    own. `chosen_tokens` and `rejected_tokens` count tokens that have a log-probability, `chosen_rows` and
    `rejected_rows` rows.
    """

    def __init__(self, collator: Collator):
        self.inner = collator

    def __call__(self, rows: Rows) -> Batch:
        batch = self.inner(rows)
        return {**batch, COUNTS: count_on_host(batch)}


def count_on_host(batch: Batch) -> Counts:
    """Return the counts of a batch that is still on the host."""
    if "completion_mask" not in batch:
        return {}
    tokens: list[int] = batch["completion_mask"][:, 1:].sum(-1).tolist()
    is_chosen: list[bool]
    if "label" in batch:
        is_chosen = [bool(label) for label in torch.as_tensor(batch["label"]).tolist()]
    else:
        is_chosen = [row < len(tokens) // 2 for row in range(len(tokens))]
    chosen = [count for count, flag in zip(tokens, is_chosen, strict=True) if flag]
    rejected = [count for count, flag in zip(tokens, is_chosen, strict=True) if not flag]
    return {
        "chosen_rows": len(chosen),
        "rejected_rows": len(rejected),
        "chosen_tokens": sum(chosen),
        "rejected_tokens": sum(rejected),
    }


class DeferredMetricsMixin(TrainerBase):
    """Read the metrics of a TRL trainer when they are logged or saved. Its place is just left of TRL's trainer."""

    defers_metrics: bool | None = None
    """Whether metrics are read late: by default on GPUs, where reading them makes the device wait."""
    token_masks = ("chosen", "rejected")
    """Which rows the masks are of that the loss selects tokens by, in their order."""
    _metrics: Metrics
    _stored_metrics: Metrics
    _total_train_tokens: int | torch.Tensor

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        counts: Counts | None = inputs.get(COUNTS)
        inputs = {name: value for name, value in inputs.items() if name not in (COUNTS, IMAGE_ROWS)}
        defers = self.args.device.type == "cuda" if self.defers_metrics is None else self.defers_metrics
        is_known = counts is not None and all(counts.values())
        if not (defers and is_known and self.model.training and torch.is_grad_enabled()) or self.args.torch_compile:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        modules = {base.__module__ for base in type(self).__mro__ if base.__module__.startswith("trl.")}
        with _HostCounts(counts or {}, self.token_masks, modules):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.read_metrics()
        super().log(logs, start_time)

    def read_metrics(self) -> None:
        """Replace all metrics that are still on the device by their values, in one copy."""
        series = [
            values
            for name in ("_metrics", "_stored_metrics")
            for metrics in getattr(self, name, {}).values()
            for values in metrics.values()
        ]
        places = [(values, index) for values in series for index, value in enumerate(values) if torch.is_tensor(value)]
        total = getattr(self, "_total_train_tokens", None)
        tensors = [values[index] for values, index in places] + ([total] if torch.is_tensor(total) else [])
        if not tensors:
            return
        numbers: list[float] = torch.stack([tensor.detach().double().reshape(()) for tensor in tensors]).tolist()
        if torch.is_tensor(total):
            self._total_train_tokens = int(numbers.pop())
        for (values, index), number in zip(places, numbers, strict=True):
            values[index] = number


class _HostCounts(TorchFunctionMode):
    """Answer from the host what a trainer of TRL would read from the device; calls of the model are left alone."""

    def __init__(self, counts: Counts, token_masks: Sequence[str], modules: set[str]):
        super().__init__()
        self._counts = counts
        self._token_masks = list(token_masks)
        self._row_masks = ["chosen", "rejected"]
        self._modules = modules

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        answer = _ANSWERS.get(func)
        frame = None if answer is None else inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if answer is not None and caller is not None and caller.f_globals.get("__name__") in self._modules:
            return answer(self, func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _item(self, func: object, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(())

    def _bool(self, func: object, tensor: torch.Tensor) -> bool:
        # Only counts are compared, with 0, and `compute_loss` has seen that none is 0.
        return True

    def _nonzero(self, func: object, mask: torch.Tensor, **options: object) -> torch.Tensor:
        return torch.nonzero_static(mask, size=self._counts[f"{self._row_masks.pop(0)}_rows"])

    def _getitem(self, func: Callable[..., torch.Tensor], tensor: torch.Tensor, index: object) -> torch.Tensor:
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
            return func(tensor, index)
        size = self._counts[f"{self._token_masks.pop(0)}_tokens"]
        return tensor.flatten().index_select(0, torch.nonzero_static(index.flatten(), size=size)[:, 0])


_ANSWERS: dict[Callable[..., object], Callable[..., object]] = {
    torch.Tensor.item: _HostCounts._item,
    torch.Tensor.__bool__: _HostCounts._bool,
    torch.nonzero: _HostCounts._nonzero,
    torch.Tensor.__getitem__: _HostCounts._getitem,
}
