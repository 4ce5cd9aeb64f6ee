"""Find the operations of a block that make a GPU wait for the host, with the line that calls them.

An operation is data-dependent if the host waits for a value of a tensor: to branch on it, or to know the shape of
the result. On a GPU the host then waits until all earlier operations are done, and the GPU waits for the next one. They
are found on any device, by the operations themselves, so a step can be checked on a CPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_SHAPE_DEPENDS_ON_VALUES = frozenset(
    {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere"}
)
_READ_BY_HOST = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
_MASKS = (torch.bool, torch.uint8)
# Copies to the host that no operation of the dispatcher shows on a CPU.
_COPIES_TO_HOST: Mapping[object, str] = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.cpu: "cpu",
    torch.Tensor.numpy: "numpy",
}
_TORCH = Path(torch.__file__).parent
_Positional: TypeAlias = Sequence[Any]
_Named: TypeAlias = Mapping[str, Any] | None
_Call: TypeAlias = Callable[..., object]


class Operator(Protocol):
    """An operator of torch's dispatcher."""

    is_view: bool
    overloadpacket: Any

    def name(self) -> str: ...

    def __call__(self, *args: object, **kwargs: object) -> object: ...


@dataclass(frozen=True)
class DataDependentOperation:
    """An operation that the host waits for, and the innermost line outside of torch that calls it."""

    name: str
    location: str
    """`file:line (function)`, with the file relative to the folder that its package is in."""
    in_backward: bool = False

    def __str__(self) -> str:
        return f"{self.name} at {self.location}{', in the backward pass' if self.in_backward else ''}"


@contextmanager
def find_data_dependent_operations() -> Iterator[list[DataDependentOperation]]:
    """Yield a list that gets each data-dependent operation of the block, in their order.

    Optimizers of torch keep the number of steps on the host, or, fused ones, on the device. Reading a number from the
    host's memory makes nothing wait, so what they read is left out.
    """
    operations: list[DataDependentOperation] = []
    with _FunctionMode(operations), _DispatchMode(operations):
        yield operations


class DataDependenceRecorder:
    """`find_data_dependent_operations` for a block that begins and ends in two calls, such as those of a callback."""

    def __init__(self) -> None:
        self.operations: list[DataDependentOperation] = []
        self._modes: list[TorchFunctionMode | TorchDispatchMode] = []

    def start(self) -> None:
        """Begin to record."""
        self._modes = [_FunctionMode(self.operations), _DispatchMode(self.operations)]
        for mode in self._modes:
            mode.__enter__()

    def stop(self) -> None:
        """End recording; does nothing if it has not begun."""
        while self._modes:
            self._modes.pop().__exit__(None, None, None)


class _DispatchMode(TorchDispatchMode):
    def __init__(self, operations: list[DataDependentOperation]):
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(
        self, func: Operator, types: object, args: _Positional = (), kwargs: _Named = None
    ) -> object:
        name, _, overload = func.name().rpartition("::")[2].partition(".")
        if _is_data_dependent(name, overload, args):
            _record(self._operations, name)
        return func(*args, **(kwargs or {}))


class _FunctionMode(TorchFunctionMode):
    def __init__(self, operations: list[DataDependentOperation]):
        super().__init__()
        self._operations = operations

    def __torch_function__(
        self,
        func: _Call,
        types: object,
        args: _Positional = (),
        kwargs: _Named = None,
    ) -> object:
        name = _COPIES_TO_HOST.get(func)
        if name is not None:
            _record(self._operations, name)
        return func(*args, **(kwargs or {}))


def _is_data_dependent(name: str, overload: str, args: _Positional) -> bool:
    if name in _READ_BY_HOST or name in _SHAPE_DEPENDS_ON_VALUES:
        return True
    if name == "repeat_interleave":
        # With one tensor of counts; with a number, or `output_size`, the shape is known.
        return overload == "Tensor" and len(args) == 1
    if name not in _INDEXING:
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype in _MASKS for index in args[1])


def _record(operations: list[DataDependentOperation], name: str) -> None:
    frames = traceback.extract_stack()[:-2]
    outside = [frame for frame in frames if not Path(frame.filename).is_relative_to(_TORCH)]
    outside = [frame for frame in outside if frame.filename != __file__]
    inner = frames[-1] if not outside else outside[-1]
    if any("/torch/optim/" in frame.filename for frame in frames[frames.index(inner) + 1 :]):
        return
    in_backward = any(frame.name == "_engine_run_backward" for frame in frames)
    location = f"{_short(inner.filename)}:{inner.lineno} ({inner.name})"
    operations.append(DataDependentOperation(name, location, in_backward))


def _short(file: str) -> str:
    for folder in ("site-packages/", "/src/"):
        if folder in file:
            return file.rpartition(folder)[2]
    return Path(file).name
