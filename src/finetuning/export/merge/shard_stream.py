"""The merge itself: shard to shard, tensor by tensor, never more in memory than the largest tensors need.

One thread computes the next tensor while this one writes the last, and another flushes the shard before to disk. Each
computes with one thread of torch: on blocks that fit the cache, torch's own threads wait for each other longer than
they work, above all on a busy machine. Tensors take turns in the same memory, as fresh pages cost the system dear.
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
from finetuning.export.merge.apply import DTYPES, apply_deltas, load_tensor, raw_bytes
from finetuning.export.merge.deltas import WeightDelta
from finetuning.export.merge.merge_plan import MergePlan
from finetuning.export.safetensors_writer import OutputTensor, copied_tensor, read_metadata, write_tensor_file
from finetuning.model.safetensors_io import SAFE_WEIGHTS_INDEX_NAME, TensorEntry

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""

Tensors = list[tuple[str, TensorEntry]]
"""Names to be written, in order, each with the tensor of the base that it is made of."""

Job = tuple[str, TensorEntry, tuple[WeightDelta, ...]]
"""A tensor to be edited: its name, what it is made of, and how."""


def write_merged(base: BaseModel, plan: MergePlan, folder: Path, progress: Progress | None = None) -> int:
    """Writes the merged weights with the base's shards and names; returns their bytes."""
    by_file: dict[Path, Tensors] = {}
    for name, entry in sorted(base.entries.items(), key=lambda item: (item[1].file, item[1].start)):
        tensors = by_file.setdefault(entry.file, [])
        tensors.append((name, entry))
        tensors += [(new, entry) for new, source in plan.added.items() if source == name]
    jobs = [
        (name, entry, plan.edits[name])
        for tensors in by_file.values()
        for name, entry in tensors
        if plan.edits.get(name)
    ]
    total = sum(_num_bytes(name, entry, plan) for tensors in by_file.values() for name, entry in tensors)
    done = 0
    with (
        _one_torch_thread(),
        ThreadPoolExecutor(1) as flusher,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as worker,
    ):
        ahead = _Ahead(jobs, worker)
        flushed: list[Future[None]] = []
        for file, tensors in by_file.items():
            outputs = [_output(name, entry, plan, ahead) for name, entry in tensors]
            counted = [_counted(output, done, total, progress) for output in outputs]
            write_tensor_file(folder / file.name, counted, read_metadata(file))
            flushed.append(flusher.submit(fsync, folder / file.name))
            done += sum(output.num_bytes for output in outputs)
        for one in flushed:
            one.result()
    _write_index(base, by_file, total, folder)
    return total


class _Ahead:
    """The edited tensors in the order of writing; while one is written, the next is being computed."""

    def __init__(self, jobs: Sequence[Job], worker: ThreadPoolExecutor):
        self._jobs = iter(jobs)
        self._worker = worker
        largest = max((entry.num_bytes for _, entry, _ in jobs), default=0)
        self._memory = cycle([torch.empty(largest, dtype=torch.uint8) for _ in range(2)])
        self._next = self._start()

    def take(self) -> memoryview:
        """The bytes of the next edited tensor, valid until the one after it is taken."""
        assert self._next is not None, "more tensors were written than were planned"
        ready = self._next.result()
        self._next = self._start()
        return ready

    def _start(self) -> Future[memoryview] | None:
        job = next(self._jobs, None)
        return None if job is None else self._worker.submit(_compute, *job, next(self._memory))


def _compute(name: str, entry: TensorEntry, edits: tuple[WeightDelta, ...], memory: torch.Tensor) -> memoryview:
    return raw_bytes(apply_deltas(name, load_tensor(entry, memory), edits))


def _output(name: str, entry: TensorEntry, plan: MergePlan, ahead: _Ahead) -> OutputTensor:
    if not plan.edits.get(name):
        return copied_tensor(name, entry)

    def write(stream: BinaryIO) -> None:
        stream.write(ahead.take())

    shape = plan.shapes.get(name, entry.shape)
    return OutputTensor(name, entry.dtype, shape, _num_bytes(name, entry, plan), write)


def _num_bytes(name: str, entry: TensorEntry, plan: MergePlan) -> int:
    shape = plan.shapes.get(name, entry.shape)
    return entry.num_bytes if shape == entry.shape else math.prod(shape) * DTYPES[entry.dtype].itemsize


def _counted(tensor: OutputTensor, done: int, total: int, progress: Progress | None) -> OutputTensor:
    """The same tensor, which tells the progress after it is written."""
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
