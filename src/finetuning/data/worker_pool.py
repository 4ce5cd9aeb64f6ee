"""Processes that share the work on batches, each with its own copy of what was learned before they were started."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from finetuning.errors import FinetuningError, InternalError, Problem

_THREADS = "TOKENIZERS_PARALLELISM"
_AHEAD = 2
"""Batches in work or waiting for their turn, for each process."""


def usable_workers(wanted: int) -> int:
    """How many processes can share work here: no more than there are cores, and one where a process cannot be cloned
    safely."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(wanted, len(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class _Failed:
    kind: type[FinetuningError]
    problems: tuple[Problem, ...]


class WorkerPool:
    """Clones of this process that do one thing each to the batches that they are given."""

    def __init__(self, work: Callable[[Any], Any], count: int):
        """`work` and all that it holds are copied as they are now; what it takes and gives is pickled."""
        context = multiprocessing.get_context("fork")
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        with _single_threaded_tokenizers():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(work, theirs, [*self._processes, ours]), name="prepare", daemon=True
                )
                process.start()
                theirs.close()
                self._processes[ours] = process

    def __enter__(self) -> WorkerPool:
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

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """What became of each batch, in order.

        Raises:
            FinetuningError: what `work` raised; InternalError where a process died.
        """
        waiting = iter(batches)
        idle, busy, done = list(self._processes), dict[Connection, int](), dict[int, Any]()
        sent = given = 0
        is_more = True
        while is_more or busy or done:
            while is_more and idle and sent - given < _AHEAD * len(self._processes):
                batch = next(waiting, None)
                is_more = batch is not None
                if is_more:
                    pipe = idle.pop()
                    self._exchange(pipe, pipe.send, batch)
                    busy[pipe] = sent
                    sent += 1
            if given in done:
                yield done.pop(given)
                given += 1
                continue
            for pipe in wait(list(busy)):
                answer = self._exchange(pipe, pipe.recv)
                if isinstance(answer, _Failed):
                    raise answer.kind(answer.problems)
                done[busy.pop(pipe)] = answer
                idle.append(pipe)

    def _exchange(self, pipe: Any, step: Callable[..., Any], *values: Any) -> Any:
        try:
            return step(*values)
        except (EOFError, OSError):
            process = self._processes[pipe]
            process.join()
            code = process.exitcode
            why = "was killed, for want of memory perhaps" if code == -signal.SIGKILL else f"ended with {code}"
            raise InternalError(f"a process that prepares rows {why}") from None


def _serve(work: Callable[[Any], Any], pipe: Connection, others: Sequence[Connection]) -> None:
    """Answers until the other end of the pipe is closed, which happens also when the first process is killed."""
    for one in others:
        one.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()
    gc.disable()
    try:
        while True:
            batch = pipe.recv()
            try:
                answer = work(batch)
            except FinetuningError as error:
                answer = _Failed(type(error), error.problems)
            pipe.send(answer)
            del batch, answer
            gc.collect()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Tells the tokenizers of clones that they have no threads, which a clone does not inherit."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before
