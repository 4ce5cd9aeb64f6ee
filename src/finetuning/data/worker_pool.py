"""A pool of forked worker processes. Each has its own copy of what the parent had computed before the fork."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, TypeVar, cast

from finetuning.errors import FinetuningError, InternalError, Problem

Task = TypeVar("Task")
Result = TypeVar("Result")
Returned = TypeVar("Returned")
_THREADS = "TOKENIZERS_PARALLELISM"
_AHEAD = 2
"""Batches in flight per process."""


def usable_workers(requested: int) -> int:
    """How many worker processes to use: at most one per core, and 1 where forking is not safe."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(requested, len(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class _Failed:
    kind: type[FinetuningError]
    problems: tuple[Problem, ...]


class WorkerPool(Generic[Task, Result]):
    """Forked copies of this process, each applying `work` to batches."""

    def __init__(self, work: Callable[[Task], Result], count: int):
        """`work` is inherited through the fork with everything that it refers to; batches and results are pickled."""
        context = multiprocessing.get_context("fork")
        self._processes: dict[Connection, BaseProcess] = {}
        with _single_threaded_tokenizers():
            for _ in range(count):
                parent_end, child_end = context.Pipe()
                process = context.Process(
                    target=_serve, args=(work, child_end, [*self._processes, parent_end]), name="prepare", daemon=True
                )
                process.start()
                child_end.close()
                self._processes[parent_end] = process

    def __enter__(self) -> WorkerPool[Task, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe, process in self._processes.items():
            pipe.close()
            if kind is not None:
                process.terminate()
        for process in self._processes.values():
            process.join()

    def map(self, batches: Iterable[Task]) -> Iterator[Result]:
        """The result of each batch, in order.

        Raises:
            FinetuningError: raised by `work`, or InternalError if a process died.
        """
        pending = iter(batches)
        idle, busy, done = list(self._processes), dict[Connection, int](), dict[int, Result]()
        sent = yielded = 0
        has_more = True
        while has_more or busy or done:
            while has_more and idle and sent - yielded < _AHEAD * len(self._processes):
                batch = next(pending, None)
                has_more = batch is not None
                if has_more:
                    pipe = idle.pop()
                    self._exchange(pipe, pipe.send, batch)
                    busy[pipe] = sent
                    sent += 1
            if yielded in done:
                yield done.pop(yielded)
                yielded += 1
                continue
            for pipe in cast("list[Connection]", wait(list(busy))):
                result = self._exchange(pipe, pipe.recv)
                if isinstance(result, _Failed):
                    raise result.kind(result.problems)
                done[busy.pop(pipe)] = result
                idle.append(pipe)

    def _exchange(self, pipe: Connection, step: Callable[..., Returned], *values: object) -> Returned:
        try:
            return step(*values)
        except (EOFError, OSError):
            process = self._processes[pipe]
            process.join()
            code = process.exitcode
            reason = "was killed, possibly out of memory" if code == -signal.SIGKILL else f"exited with code {code}"
            raise InternalError(f"a data worker process {reason}") from None


def _serve(work: Callable[[Task], object], pipe: Connection, inherited: Sequence[Connection]) -> None:
    """Serve batches until the other end of the pipe is closed, which also happens when the parent is killed."""
    # Inherited ends of the other pipes would keep them open after the parent has gone.
    for connection in inherited:
        connection.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Collecting touches every inherited object, which would copy its memory page.
    gc.freeze()
    gc.disable()
    try:
        while True:
            batch = pipe.recv()
            try:
                result = work(batch)
            except FinetuningError as error:
                result = _Failed(type(error), error.problems)
            pipe.send(result)
            del batch, result
            gc.collect()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@contextmanager
def _single_threaded_tokenizers() -> Generator[None, None, None]:
    """Switch off the tokenizers' thread pool in forked processes, which do not inherit its threads."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before
