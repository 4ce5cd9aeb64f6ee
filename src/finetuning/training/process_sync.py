"""What the processes of a distributed run exchange outside of training: the resume point, the output directory."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from finetuning.distributed import announce_wait
from finetuning.errors import Location, StorageError
from finetuning.training.resume.find import ResumePoint

T = TypeVar("T")

_PROPAGATION_TIMEOUT_S = 10.0
"""How long a file that another host created may take to appear on a network file system."""


def sync_resume_point(output_dir: Path, resume: ResumePoint) -> ResumePoint:
    """Return the main process's resume point, after checking that all processes share the output directory.

    Collective: every process calls this after its process group was created.

    Raises:
        StorageError: names the hosts that see a different directory; raised on every process.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state = PartialState()
    message = [f".shared-{uuid.uuid4().hex}", resume, socket.gethostname()]
    if state.is_main_process:
        (output_dir / message[0]).touch()
    with announce_wait("the other processes of the job, which prepare their data"):
        broadcast_object_list(message, from_process=0)
        name, resume, main_host = message
        marker = output_dir / name
        hosts = gather_object([(socket.gethostname(), _wait_for_file(marker))])
    if state.is_main_process:
        marker.unlink(missing_ok=True)
    separate = sorted({host for host, is_visible in hosts if not is_visible})
    if separate:
        raise StorageError(
            f"{output_dir} is not shared by all hosts: {', '.join(separate)} cannot see what {main_host} writes there",
            location=Location(key="training_args.output_dir"),
            hint="Choose a folder on a file system that all of them mount; all of them write and read checkpoints.",
        )
    return resume


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """Return the result of `compute` on every process; only the main process calls it.

    Collective: every process calls this after its process group was created.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    message = [compute() if PartialState().is_main_process else None]
    with announce_wait("the main process of the job"):
        broadcast_object_list(message, from_process=0)
    [result] = message
    return result  # pyright: ignore[reportReturnType]


def destroy_process_group() -> None:
    """Destroy the process group, if there is one.

    torch asks for it: at interpreter exit its threads may outlive what they use, which aborts a process that succeeded.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _wait_for_file(path: Path) -> bool:
    """Return whether the file exists, or appears within the timeout."""
    deadline = time.monotonic() + _PROPAGATION_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
