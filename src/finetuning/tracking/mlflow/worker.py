"""The process that delivers a spool to MLflow: `mlflow_worker SPOOL --parent PID`, or `SPOOL --once`.

With `--parent` it follows the spool until its `end` order is delivered. When the parent is gone without one, it sends
what is there for ten seconds at most, marks the run KILLED and ends. With `--once` it delivers what is there, gives up
after `--patience` seconds without a sign of MLflow, and says by its exit code how it went.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from finetuning.tracking.mlflow.queue_file import Delivery, delivery_path, whole_bytes
from finetuning.tracking.mlflow.system_metrics import MachineMeter
from finetuning.tracking.mlflow.uploader import Courier

EXIT_DELIVERED, EXIT_NOT_DELIVERED, EXIT_BUSY = 0, 1, 3
ORPHAN_SECONDS = 10.0
_POLL_S = 0.1
_PING_S = 2.0
_LONGEST_PAUSE_S = 15.0


class Lane:
    """Calls one of the courier's two deliveries again and again, more slowly while it fails."""

    def __init__(self, courier: Courier, deliver: Callable[[int | None], bool]):
        self._courier = courier
        self._deliver = deliver
        self._pause = 0.0
        self.failing_since: float | None = None

    def turn(self, limit: int | None = None, longest_pause: float = _LONGEST_PAUSE_S) -> None:
        """One delivery, and the pause that it asks for: none after progress, a short one when nothing was waiting."""
        try:
            moved = self._deliver(limit)
        except Exception as error:  # noqa: BLE001  a tracker fails in any way, in code of many libraries
            self._courier.note_error(error)
            self.failing_since = self.failing_since or time.monotonic()
            self._pause = min(max(2 * self._pause, 0.5), longest_pause)
            time.sleep(self._pause)
            return
        self._pause, self.failing_since = 0.0, None
        if not moved:
            time.sleep(_POLL_S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("spool", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--patience", type=float, default=30.0)
    options = parser.parse_args(argv)
    os.nice(10)
    with options.spool.open("rb+") as stream:
        while not _locked(stream.fileno()):
            if options.once:
                return EXIT_BUSY
            if os.getppid() != options.parent:
                return EXIT_NOT_DELIVERED
            time.sleep(_POLL_S)
        try:
            courier = Courier(options.spool)
        except Exception as error:  # noqa: BLE001  MLflow does not import, or cannot open the store
            _note(options.spool, error)
            return EXIT_NOT_DELIVERED
        if options.once:
            return _deliver_once(courier, options.patience)
        return _follow(courier, options.parent, os.fstat(stream.fileno()).st_ino)


def _follow(courier: Courier, parent: int, inode: int) -> int:
    """Delivers until the end; returns at once when another run has put a spool of its own in this one's place."""
    records, files = Lane(courier, courier.deliver_records), Lane(courier, courier.deliver_files)
    limit: int | None = None
    deadline = float("inf")
    stopping = threading.Event()
    threading.Thread(target=_files_lane, args=(files, stopping), daemon=True).start()
    next_ping = time.monotonic() + _PING_S
    meter = _meter(courier)
    while time.monotonic() < deadline:
        if meter is not None and (courier.ended or limit is not None):
            meter.stop()
            meter = None
        if not courier.spool.exists() or courier.spool.stat().st_ino != inode:
            return EXIT_NOT_DELIVERED
        if limit is None and os.getppid() != parent:
            limit = whole_bytes(courier.spool)
            deadline = time.monotonic() + ORPHAN_SECONDS
        records.turn(limit, longest_pause=_LONGEST_PAUSE_S if limit is None and not courier.ended else 1.0)
        if courier.is_drained(limit) and (courier.ended or limit is not None):
            break
        if courier.ended and records.failing_since is None and time.monotonic() > next_ping:
            _try_ping(courier)
            next_ping = time.monotonic() + _PING_S
    stopping.set()
    if limit is not None and not courier.ended and records.failing_since is None:
        Lane(courier, lambda _: courier.close_run("KILLED") is None).turn(longest_pause=0.0)
    return EXIT_DELIVERED if courier.is_drained(limit) else EXIT_NOT_DELIVERED


def _meter(courier: Courier) -> MachineMeter | None:
    """What measures the machine, where the run asks for it and the library for it is there."""
    if not courier.run.get("system_metrics"):
        return None
    try:
        meter = MachineMeter(courier.spool)
    except (ImportError, OSError) as error:
        courier.note_error(error)
        return None
    meter.start()
    return meter


def _files_lane(lane: Lane, stopping: threading.Event) -> None:
    while not stopping.is_set():
        lane.turn()


def _try_ping(courier: Courier) -> None:
    try:
        courier.ping()
    except Exception as error:  # noqa: BLE001  as in Lane
        courier.note_error(error)


def _deliver_once(courier: Courier, patience: float) -> int:
    retry = Lane(courier, lambda _: courier.retry_files_left() is None)
    records, files = Lane(courier, courier.deliver_records), Lane(courier, courier.deliver_files)
    size = whole_bytes(courier.spool)
    for lane, done in (
        (records, lambda: courier.delivery.records_sent >= size),
        (retry, lambda: not courier.delivery.files_left or retry.failing_since is None),
        (files, lambda: courier.is_drained(size)),
    ):
        lane.turn(size)
        while not done():
            if lane.failing_since is not None and time.monotonic() - lane.failing_since > patience:
                return EXIT_NOT_DELIVERED
            lane.turn(size)
    if not courier.ended and not _is_alive(courier):
        courier.close_run("KILLED")
    return EXIT_NOT_DELIVERED if courier.delivery.files_left else EXIT_DELIVERED


def _is_alive(courier: Courier) -> bool:
    """Whether the training process of the newest run may still be there; one on another machine counts as alive."""
    if courier.run.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(courier.run["pid"]), 0)
    except (ProcessLookupError, KeyError):
        return False
    except PermissionError:
        return True
    return True


def _locked(descriptor: int) -> bool:
    """True when this process alone delivers this spool now, or when the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _note(spool: Path, error: BaseException) -> None:
    delivery = Delivery.read(delivery_path(spool))
    delivery.error = f"{type(error).__name__}: {error}"[:500]
    delivery.write(delivery_path(spool))


if __name__ == "__main__":
    raise SystemExit(main())
