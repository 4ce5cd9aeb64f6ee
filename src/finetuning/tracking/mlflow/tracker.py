"""Tracks a run in MLflow without waiting for it: records go to a queue file, which a process of its own uploads."""

from __future__ import annotations

import getpass
import logging
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from finetuning.distributed import announce_wait
from finetuning.tracking.mlflow.queue import QUEUE_NAME, Queue, UploadState, latest_run, list_queues, numbers_in, rotate
from finetuning.tracking.settings import TrackingPlan
from finetuning.tracking.tracker import LogEvent, TelemetryNames, Tracker, summary_totals

logger = logging.getLogger(__name__)

_SERVER_WAIT_S, _LOCAL_WAIT_S, _UPLOAD_WAIT_S, _CHECK_S = 10.0, 60.0, 3600.0, 30.0


class MlflowTracker(Tracker):
    """The MLflow run of a job, in its main process. `finish` ends it; if the process dies first, the uploader does."""

    name = "MLflow"

    def __init__(self, plan: TrackingPlan, queue: Queue, process: subprocess.Popen[bytes]):
        self.queue = queue
        self._plan, self._process = plan, process
        self._telemetry_names = TelemetryNames()
        self._next_check = time.monotonic() + _CHECK_S
        self._end: UploadState | None = None

    def log(self, event: LogEvent) -> None:
        values = summary_totals(event.values) if event.kind == "summary" else dict(event.values)
        if event.kind == "training":
            values |= {"tokens_per_second": event.metrics.tokens_per_s, "tokens_seen": event.metrics.tokens_seen}
        self.queue.append("metrics", values=numbers_in(values), step=event.metrics.step)
        if time.monotonic() > self._next_check:
            error = UploadState.read(self.queue.path).error
            self._next_check = float("inf") if error else time.monotonic() + _CHECK_S
            if error:
                logger.warning("MLflow: %s. Training continues; metrics wait in %s.", error, self.queue.path)

    def log_telemetry(self, values: Mapping[str, float], step: int) -> None:
        self.queue.append("metrics", values=numbers_in(self._telemetry_names.rename(values)), step=step)

    def on_save(self, step: int, folder: Path) -> None:
        self.log_model_files(folder)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Log a file, or the files of a folder, into a folder of the run's artifacts."""
        self.queue.append("artifact", path=str(path.absolute()), to=folder)

    def log_model_files(self, path: Path) -> None:
        """Log a checkpoint or the final model if `hf_mlflow_log_artifacts` is set."""
        if self._plan.log_artifacts.value:
            self.log_file(path, path.name)

    def finish(self, status: str, *, wait_s: float | None = None) -> UploadState:
        """End the run as FINISHED, FAILED or KILLED; return the state, whose `error` says why not all was uploaded.

        Waits 10 s for a server, 60 s for a local store, which may first create its database, and up to an hour while
        model files are uploaded. The rest stays in the queue, and a warning says so.
        """
        if self._end is not None:
            return self._end
        self.queue.append("end", status=status)
        wait_s = wait_s or (_LOCAL_WAIT_S if self._plan.is_local else _SERVER_WAIT_S)
        with announce_wait(f"MLflow at {self._plan.uri.value} to take what is queued"):
            state, delivered = self._wait_for_uploads(wait_s)
        if delivered or not self._plan.is_local:
            self._process.kill()  # what it was uploading is still in the queue
            self._process.wait()
        state.error = self.queue.error or (None if delivered else state.error or "no answer")
        if state.error:
            message = "MLflow at %s did not take everything (%s). The rest is in %s; upload it with: finetuning sync %s"
            logger.warning(message, self._plan.uri.value, state.error, self.queue.path, self.queue.path.parent)
        self._end = state
        self.queue.error = "the run has ended"
        return state

    def _wait_for_uploads(self, wait_s: float) -> tuple[UploadState, bool]:
        """Return the state after everything, or all that can be, was uploaded, and whether it was everything."""
        size, began = self.queue.path.stat().st_size, time.monotonic()
        while True:
            state = UploadState.read(self.queue.path)
            is_uploading_files = state.offset >= size and state.error is None and self._plan.log_artifacts.value
            longest_s = _UPLOAD_WAIT_S if is_uploading_files else wait_s
            delivered = state.offset >= size and not state.pending_files
            if delivered or self._process.poll() is not None or time.monotonic() - began > longest_s:
                return state, delivered
            time.sleep(0.05)


def start_mlflow(
    plan: TrackingPlan, output_dir: Path, *, job: str, resumed: bool, tags: Mapping[str, str] | None = None
) -> MlflowTracker | None:
    """Start tracking a job, in its main process; return None, after a warning, if that is impossible.

    A resumed job continues the MLflow run of its output directory, unless the server or the experiment has changed.
    """
    path = output_dir / QUEUE_NAME
    uploads, wants_metrics = bool(plan.log_artifacts.value), bool(plan.system_metrics.value)
    target = {"uri": plan.uri.value, "experiment": plan.experiment.value}
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        list_queues(output_dir)  # renames the queue of an earlier version
        record = latest_run(path)[0] if resumed else None
        previous = record.fields if record else {}
        same_run = plan.run_id.value in (None, UploadState.read(path).run_id, previous.get("run_id"))
        previous = previous if same_run and target.items() <= previous.items() else {}
        key, name, parent = previous.get("key"), previous.get("run_name"), None
        if plan.child_runs:
            parent = previous.get("parent") or {"key": secrets.token_hex(16), "name": plan.run_name.value, "jobs": 0}
            parent = {**parent, "jobs": parent["jobs"] + 1}
        if parent or not previous:
            rotate(output_dir)
            key, name = secrets.token_hex(16), None if parent else plan.run_name.value
        source = {"mlflow.source.name": f"finetuning {job}", "mlflow.source.type": "LOCAL"}
        with suppress(KeyError, OSError, ImportError):  # a user without a name, as in containers
            source["mlflow.user"] = getpass.getuser()
        run = {"key": key, "run_name": name, "parent": parent, "tags": {**source, **(tags or {}), **plan.tags}}
        ids = {"run_id": plan.run_id.value, "parent_run_id": plan.parent_run_id.value}
        queue = Queue(path)
        queue.append("run", **target, **ids, **run, uploads=uploads, system_metrics=wants_metrics)
        if queue.error:
            return None
        process = start_uploader(path, plan.uri.value, uploads, parent=os.getpid())
    except OSError as error:
        logger.warning("MLflow: tracking cannot start: %s. Training continues untracked.", error)
        return None
    return MlflowTracker(plan, queue, process)


def start_uploader(
    queue: Path, uri: str, uploads: bool, parent: int = 0, patience_s: float = math.inf
) -> subprocess.Popen[bytes]:
    """Start the process in a session of its own, so that Ctrl-C reaches the training process alone."""
    store = urlsplit(uri)  # MLflow puts the files of a SQLite store below the working directory
    folder = Path(store.path.removeprefix("/")).parent if store.scheme == "sqlite" else queue.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60" if uploads else "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    forced = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": uri, "PYTHONSAFEPATH": "1"}
    env = {**defaults, "MLFLOW_DISABLE_TELEMETRY": "true", **os.environ, **forced}
    uploader = [sys.executable, "-m", "finetuning.tracking.mlflow.sync"]
    command, null = [*uploader, str(queue.absolute()), str(parent), str(patience_s)], subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, cwd=folder, env=env, start_new_session=True)
