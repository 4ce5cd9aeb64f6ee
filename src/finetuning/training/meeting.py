"""What the processes of a job must have in common before they train, and how they part."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from finetuning.errors import Place, StorageError
from finetuning.training.resume.find import ResumePoint

_Answer = TypeVar("_Answer")

_PATIENCE_S = 10.0
"""How long a file that another machine has made may take to appear on a network's filesystem."""


def agreed(output_dir: Path, resume: ResumePoint, world_size: int) -> ResumePoint:
    """The main process's checkpoint, once every process has been seen to share its output directory.

    Collective: every process of the job comes here, after its process group was made.

    Raises:
        StorageError: names the machines that have a directory of their own instead; on every process.
    """
    if world_size == 1:
        return resume
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state = PartialState()
    told = [f".meeting-{uuid.uuid4().hex}", resume, socket.gethostname()]
    if state.is_main_process:
        (output_dir / told[0]).touch()
    broadcast_object_list(told, from_process=0)
    marker, resume, main_host = output_dir / told[0], *told[1:]
    strangers = [host for host, sees in gather_object([(socket.gethostname(), _appears(marker))]) if not sees]
    if state.is_main_process:
        marker.unlink(missing_ok=True)
    if strangers:
        raise StorageError(
            f"{output_dir} is not one folder for all machines: {', '.join(sorted(set(strangers)))} cannot see what"
            f" {main_host} writes there",
            place=Place(key="training_args.output_dir"),
            hint="Name a folder on a filesystem that all of them mount; checkpoints are written and read by all.",
        )
    return resume


def told_by_main(find_out: Callable[[], _Answer], world_size: int) -> _Answer:
    """What the main process finds out, on every process; `find_out` is called on no other.

    Collective: every process of the job comes here, after its process group was made.
    """
    if world_size == 1:
        return find_out()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    told = [find_out() if PartialState().is_main_process else None]
    broadcast_object_list(told, from_process=0)
    return told[0]


def part(world_size: int) -> None:
    """Ends the process group. Left to the interpreter's exit, its threads may outlive what they belong to, which aborts
    a process whose work is done (torch's documentation of `destroy_process_group` asks for it)."""
    if world_size == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _appears(marker: Path) -> bool:
    """Whether a file is there, or comes soon."""
    until = time.monotonic() + _PATIENCE_S
    while not marker.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
