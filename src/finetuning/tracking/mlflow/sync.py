"""The process that uploads a queue, during a run or for `finetuning sync`.

A process, not a thread: MLflow's import and local stores would hold the training process's interpreter lock for seconds
(measured: a call of 0.6 s, steps up to 2.5 times as long), and a killed run has to be marked KILLED by someone.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from finetuning.atomic_io import try_lock
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, Location
from finetuning.tracking.mlflow.queue import (
    QUEUE_NAME,
    Queue,
    UploadState,
    latest_run,
    list_queues,
    numbers_in,
    read_records,
)
from finetuning.tracking.mlflow.tracker import start_uploader

_EXIT_UPLOADED, _EXIT_NOT_UPLOADED, _EXIT_BUSY = 0, 1, 3
_ORPHAN_S, _POLL_S, _LONGEST_PAUSE_S = 10.0, 0.1, 5.0


class SyncResult(NamedTuple):
    """What became of one queue: the records and files that were and are waiting, and why they are."""

    queue: Path
    waiting_before: int
    waiting: int
    state: UploadState
    error: str | None


def sync_run(folder: Path, *, patience_s: float = 30.0) -> list[SyncResult]:
    """Upload what is left in the queues of a run's folder; give up after `patience_s` without an answer."""
    queues = list_queues(folder) if folder.is_dir() else []
    if not queues:
        raise ConfigError("no run with an MLflow queue here; nothing to send", location=Location(file=str(folder)))
    results = []
    for queue in queues:
        (run, ended), before, code = latest_run(queue), _waiting(queue), _EXIT_UPLOADED
        if run and (before or not ended):
            process = start_uploader(queue, run.fields["uri"], run.fields["uploads"], patience_s=patience_s)
            try:
                with announce_wait(f"MLflow at {run.fields['uri']} to take what is queued"):
                    code = process.wait()
            finally:
                process.kill()
        state = UploadState.read(queue)
        error = {_EXIT_UPLOADED: None, _EXIT_BUSY: "the run is uploading it right now"}.get(code, state.error or "?")
        results.append(SyncResult(queue, before, _waiting(queue), state, error))
    return results


def add_to_run(folder: Path, values: Mapping[str, float], files: Sequence[Path], step: int) -> str | None:
    """Add metrics and files to the MLflow run of a run that has ended. Return why that failed; None if it did not.

    Returns None as well if the run was not tracked in MLflow. What is not uploaded waits in the queue.
    """
    path = folder / QUEUE_NAME
    if not path.is_file():
        return None
    queue = Queue(path)
    queue.append("metrics", values=numbers_in(values), step=step)
    for file in files:
        queue.append("artifact", path=str(file.absolute()), to=file.parent.name)
    return queue.error or sync_run(folder)[-1].error


def _waiting(queue: Path) -> int:
    state = UploadState.read(queue)
    return len(list(read_records(queue, state.offset))) + len(state.pending_files)


def main(queue: Path, parent: int, patience_s: float) -> int:
    """Upload the queue of the training process `parent`, or what is there if that is 0; return the exit code."""
    os.nice(10)
    with queue.open("rb+") as stream:
        while try_lock(stream.fileno()) is False:
            if os.getppid() != parent:
                return _EXIT_NOT_UPLOADED if parent else _EXIT_BUSY
            time.sleep(_POLL_S)
        try:
            return _upload(queue, os.fstat(stream.fileno()).st_ino, parent, patience_s)
        except Exception as error:  # noqa: BLE001  MLflow cannot be imported, or cannot open the store
            UploadState.read(queue).write_error(queue, error)
    return _EXIT_NOT_UPLOADED


def _upload(queue: Path, inode: int, parent: int, patience_s: float) -> int:
    """Follow the queue until the run's `end` record is uploaded, with exponential backoff while MLflow fails.

    If the parent dies first, upload for at most ten seconds and mark the run KILLED. Without a parent, give up when
    every attempt has failed for `patience_s`.
    """
    from finetuning.tracking.mlflow.uploader import Uploader

    uploader, stop_metrics = Uploader(queue), threading.Event()
    if parent and uploader.run.fields.get("system_metrics"):
        threading.Thread(target=_measure_system, args=(queue, stop_metrics), daemon=True).start()
    pause_s, failing_since, deadline = 0.0, math.inf, math.inf
    while queue.exists() and queue.stat().st_ino == inode:  # until another job has rotated it
        if parent and os.getppid() != parent:
            parent, deadline = 0, time.monotonic() + _ORPHAN_S
        if uploader.ended or not parent:
            stop_metrics.set()
        try:
            pause_s = 0.0 if uploader.upload_next() else _POLL_S
            failing_since = math.inf
            if pause_s and not (uploader.ended or parent):
                uploader.close_run("KILLED")
            if pause_s and (uploader.ended or not parent):
                return _EXIT_UPLOADED
        except Exception as error:  # noqa: BLE001  a tracker may fail in any way
            uploader.state.write_error(queue, error)
            failing_since = min(failing_since, time.monotonic())
            pause_s = min(max(2 * pause_s, 0.5), _LONGEST_PAUSE_S)
        time.sleep(pause_s)
        if time.monotonic() > min(deadline, failing_since + patience_s):
            break
    return _EXIT_NOT_UPLOADED


def _measure_system(path: Path, stop: threading.Event) -> None:
    """Append the metrics of MLflow's monitors to the queue; steps count intervals since the run was first opened."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor, queue, began_ms = SystemMetricsMonitor(run_id=""), Queue(path), next(read_records(path)).fields["time"]
    prefix = f"system/{monitor.node_id}/" if monitor.node_id else "system/"
    while not stop.wait(monitor.sampling_interval):
        monitor.collect_metrics()
        step = int((time.time() - began_ms / 1000) / monitor.sampling_interval)
        values = {prefix + name: value for name, value in monitor.aggregate_metrics().items()}
        queue.append("metrics", values=numbers_in(values), step=step)
        for source in monitor.monitors:
            source.clear_metrics()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
