"""Merge shard by shard and tensor by tensor, with memory for the two largest tensors only.

One thread computes the next tensor while the main thread writes the current one, and a third flushes the previous shard
to disk. torch runs with one thread each: on blocks that fit the CPU cache, synchronizing its own threads takes longer
than the work, above all on a busy machine. Tensors alternate between two buffers, because allocating new pages for each
one costs more than the computation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

import torch

from finetuning.atomic_io import fsync
from finetuning.export.inputs import BaseModel
from finetuning.export.merge.apply import DTYPES, ChangedElements, apply_deltas, load_tensor, raw_bytes
from finetuning.export.merge.deltas import WeightDelta
from finetuning.export.merge.merge_plan import MergePlan
from finetuning.export.safetensors_writer import OutputTensor, copied_tensor, read_metadata, write_tensor_file
from finetuning.model.safetensors_io import SAFE_WEIGHTS_INDEX_NAME, TensorEntry

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the total."""

Tensors = list[tuple[str, TensorEntry]]
"""Names of tensors to write, in order, each with the base's tensor to start from."""

MergeTask = tuple[str, TensorEntry, tuple[WeightDelta, ...]]
"""A tensor that changes: its name, the base's tensor, and the deltas to apply."""


def write_merged(base: BaseModel, plan: MergePlan, folder: Path, progress: Progress | None = None) -> ChangedElements:
    """Write the merged weights into `folder`, with the base's shards and names.

    Returns:
        How many elements the adapters change, and how many of the changes survive rounding.
    """
    by_file: dict[Path, Tensors] = {}
    for name, entry in sorted(base.entries.items(), key=lambda item: (item[1].file, item[1].start)):
        tensors = by_file.setdefault(entry.file, [])
        tensors.append((name, entry))
        tensors += [(new, entry) for new, source in plan.added.items() if source == name]
    tasks = [
        (name, entry, plan.deltas[name])
        for tensors in by_file.values()
        for name, entry in tensors
        if plan.deltas.get(name)
    ]
    total = sum(_num_bytes(name, entry, plan) for tensors in by_file.values() for name, entry in tensors)
    done = 0
    with (
        _one_torch_thread(),
        ThreadPoolExecutor(1) as flusher,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as worker,
    ):
        prefetcher = _Prefetcher(tasks, worker)
        flushed: list[Future[None]] = []
        for file, tensors in by_file.items():
            outputs = [_output(name, entry, plan, prefetcher) for name, entry in tensors]
            outputs_with_progress = [_with_progress(output, done, total, progress) for output in outputs]
            write_tensor_file(folder / file.name, outputs_with_progress, read_metadata(file))
            flushed.append(flusher.submit(fsync, folder / file.name))
            done += sum(output.num_bytes for output in outputs)
        for future in flushed:
            # Raises what went wrong in the thread.
            future.result()
    _write_index(base, by_file, total, folder)
    return prefetcher.elements


class _Prefetcher:
    """Compute changed tensors in the order they are written, one ahead of the writer."""

    def __init__(self, tasks: Sequence[MergeTask], worker: ThreadPoolExecutor):
        self.elements = ChangedElements()
        self._tasks = iter(tasks)
        self._worker = worker
        largest = max((entry.num_bytes for _, entry, _ in tasks), default=0)
        self._memory = cycle([torch.empty(largest, dtype=torch.uint8) for _ in range(2)])
        self._next = self._start()

    def take(self) -> memoryview:
        """Return the bytes of the next changed tensor; they are valid until the next call."""
        assert self._next is not None, "more tensors were written than were planned"
        data = self._next.result()
        self._next = self._start()
        return data

    def _start(self) -> Future[memoryview] | None:
        task = next(self._tasks, None)
        return None if task is None else self._worker.submit(_compute, *task, next(self._memory), self.elements)


def _compute(
    name: str, entry: TensorEntry, deltas: tuple[WeightDelta, ...], memory: torch.Tensor, elements: ChangedElements
) -> memoryview:
    return raw_bytes(apply_deltas(name, load_tensor(entry, memory), deltas, elements))


def _output(name: str, entry: TensorEntry, plan: MergePlan, prefetcher: _Prefetcher) -> OutputTensor:
    if not plan.deltas.get(name):
        return copied_tensor(name, entry)

    def write(stream: BinaryIO) -> None:
        stream.write(prefetcher.take())

    shape = plan.shapes.get(name, entry.shape)
    return OutputTensor(name, entry.dtype, shape, _num_bytes(name, entry, plan), write)


def _num_bytes(name: str, entry: TensorEntry, plan: MergePlan) -> int:
    shape = plan.shapes.get(name, entry.shape)
    return entry.num_bytes if shape == entry.shape else math.prod(shape) * DTYPES[entry.dtype].itemsize


def _with_progress(tensor: OutputTensor, done: int, total: int, progress: Progress | None) -> OutputTensor:
    """Return the tensor with a write function that reports progress afterwards."""
    if progress is None:
        return tensor

    def write(stream: BinaryIO) -> None:
        tensor.write(stream)
        progress(min(done + stream.tell(), total), total)

    return OutputTensor(tensor.name, tensor.dtype, tensor.shape, tensor.num_bytes, write)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_index(base: BaseModel, by_file: dict[Path, Tensors], total: int, folder: Path) -> None:
    if not (base.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return
    index = json.loads((base.folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    index["weight_map"] = {name: file.name for file, tensors in by_file.items() for name, _ in tensors}
    index.setdefault("metadata", {})["total_size"] = total
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
