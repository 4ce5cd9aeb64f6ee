"""MLflow, off the critical path.

Every metric, parameter and file is one line in a spool beside the run, and that is all the training process does: one
write, some 20 microseconds, whatever state the server is in. A child process tails the spool and talks to MLflow.

A thread with a queue was the other way. It would import MLflow (1.8 s of processor time) in the training process,
take turns at the interpreter lock with the loop, lose its queue with the process, be copied half-alive into forked data
workers, and, blocked in a request, hold up the interpreter's exit. The child costs 170 MB of memory and runs at a lower
priority; what it has not sent stays in the spool, for a resumed run or for `finetuning sync` to deliver. When the
training process is killed, the child notices, sends the rest and marks the run KILLED.

Checkpoints are copied from where they stand: one that is rotated away before its turn is noted as gone.
"""

from __future__ import annotations

import getpass
import logging
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.tracking.mlflow.mlflow_process import start_worker
from finetuning.tracking.mlflow.queue_file import (
    SPOOL_NAME,
    Delivery,
    SpoolWriter,
    delivery_path,
    latest_run,
    plain_metrics,
    set_aside,
)
from finetuning.tracking.settings import TrackingPlan
from finetuning.tracking.tracker import LogEvent, TelemetryNames, Tracker, summary_totals

Status = Literal["FINISHED", "FAILED", "KILLED"]
logger = logging.getLogger(__name__)

SERVER_WAIT_S = 10.0
LOCAL_WAIT_S = 60.0
_POLL_S = 0.05
_FIRST_LOOK_S, _NEXT_LOOK_S = 15.0, 60.0
_ADJECTIVES = ("amber", "brave", "calm", "clever", "eager", "fair", "gentle", "happy", "keen", "lucky", "noble", "warm")
_NOUNS = ("badger", "cedar", "comet", "delta", "falcon", "heron", "juniper", "lynx", "maple", "otter", "raven", "river")


@dataclass(frozen=True)
class TrackingEnd:
    """How tracking ended: whether all has arrived, where the run is, and, if not, where the rest is kept and why."""

    delivered: bool
    run_id: str | None
    run_name: str | None
    url: str | None
    spool: Path
    reason: str | None = None


class MlflowTracker(Tracker):
    """One MLflow run, for the main process of a job.

    `finish` ends it. Closed as a sink, or never finished because the process died, it is left to the worker.
    """

    name = "MLflow"

    def __init__(self, plan: TrackingPlan, writer: SpoolWriter, process: subprocess.Popen[bytes]):
        self._plan = plan
        self._writer = writer
        self._process = process
        self._telemetry_names = TelemetryNames()
        self._next_look = time.monotonic() + _FIRST_LOOK_S
        self._told = False
        self._finished = False
        self._fault: str | None = None
        self._size_at_end = 0

    @property
    def spool(self) -> Path:
        return self._writer.path

    def log(self, event: LogEvent) -> None:
        values = dict(event.values)
        if event.kind == "training":
            metrics = event.metrics
            known = {"tokens_per_second": metrics.tokens_per_s, "tokens_seen": metrics.tokens_seen}
            values |= {key: float(value) for key, value in known.items() if value is not None}
        if event.kind == "summary":
            values = summary_totals(values)
        self.log_metrics(values, event.metrics.step)

    def log_telemetry(self, values: Mapping[str, float], step: int) -> None:
        self.log_metrics(self._telemetry_names.rename(values), step)

    def on_save(self, step: int, folder: Path) -> None:
        self.log_model_files(folder, folder.name)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at an optimizer step, NaN and infinities included."""
        if values:
            self._append("metrics", values=plain_metrics(values), step=step)
        if time.monotonic() > self._next_look:
            self._look()

    def log_parameters(self, values: Mapping[str, str]) -> None:
        """Parameters, as `parameters.parameters` makes them."""
        self._append("params", values=dict(values))

    def log_tags(self, values: Mapping[str, str]) -> None:
        self._append("tags", values=dict(values))

    def log_datasets(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """What is trained and validated on, each with MLflow's `name`, `digest`, `source_type`, `source`, `profile`
        and `schema`, and its `context`: `training` or `validation`."""
        self._append("datasets", values=[dict(one) for one in datasets])

    def log_file(self, path: Path, folder: str = "") -> None:
        """A small file, such as the resolved config, into `folder` of the run's artefacts."""
        self._append("artifact", path=str(path.absolute()), to=folder)

    def log_model_files(self, path: Path, folder: str) -> None:
        """A checkpoint or the tuned model, file by file, where `hf_mlflow_log_artifacts` asks for it."""
        if self._plan.log_artifacts.value:
            self.log_file(path, folder)

    def finish(self, status: Status, *, wait_s: float | None = None, upload_wait_s: float | None = None) -> TrackingEnd:
        """Ends the run and waits a little for what is on its way. To be called after the model was published.

        Waits `wait_s`: 10 s for a server, 60 s for a local store, whose first use makes a database and must not be cut
        short. Where model files are being copied and the server answers, the wait goes on, `upload_wait_s` (an hour)
        at most. What is not delivered then is told in one warning, and stays in the spool.
        """
        if self._finished:
            return self._outcome()
        self._append("end", status=status)
        self._finished = True
        local = self._plan.is_local
        self._wait(
            (LOCAL_WAIT_S if local else SERVER_WAIT_S) if wait_s is None else wait_s,
            (3600.0 if self._plan.log_artifacts.value else 0.0) if upload_wait_s is None else upload_wait_s,
        )
        self._size_at_end = self._writer.size
        outcome = self._outcome()
        if not outcome.delivered:
            logger.warning(
                "MLflow at %s has not taken everything (%s). The rest is kept in %s; send it with: finetuning sync %s",
                self._plan.uri.value,
                outcome.reason,
                self.spool,
                self.spool.parent,
            )
        if outcome.delivered or not local:
            self._stop_worker()
        self._writer.close()
        return outcome

    def _append(self, kind: str, **values: Any) -> None:
        """An order into the spool. A disk that takes none is told once; tracking then ends where it is."""
        if self._fault or self._finished:
            return
        try:
            self._writer.append(kind, **values)
        except OSError as error:
            self._fault = f"the spool cannot be written: {error.strerror}"
            logger.warning("MLflow: %s (%s). Training goes on untracked.", self._fault, self.spool)

    def _stop_worker(self) -> None:
        """Ends the worker: what it has written is whole at any time, and what it was sending is still in the spool."""
        try:
            self._process.wait(1.0 if self._drained() else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _drained(self) -> bool:
        delivery = self._delivery()
        return min(delivery.records_sent, delivery.files_sent) >= self._writer.size

    def _wait(self, wait_s: float, upload_wait_s: float) -> None:
        began = time.monotonic()
        while True:
            if self._process.poll() is not None or self._drained():
                return
            waited = time.monotonic() - began
            delivery = self._delivery()
            uploading = delivery.records_sent >= self._writer.size and time.time() - delivery.alive_at < SERVER_WAIT_S
            if waited > wait_s and not (uploading and waited < upload_wait_s):
                return
            time.sleep(_POLL_S)

    def _outcome(self) -> TrackingEnd:
        delivery = self._delivery()
        waiting = min(delivery.records_sent, delivery.files_sent) < self._size_at_end
        delivered = not (waiting or delivery.files_left or self._fault)
        reason = None if delivered else self._fault or delivery.error or "it does not answer"
        return TrackingEnd(delivered, delivery.run_id, delivery.run_name, delivery.url, self.spool, reason)

    def _look(self) -> None:
        """Tells once, while training goes on, that MLflow is not to be had."""
        self._next_look = time.monotonic() + _NEXT_LOOK_S
        error = self._delivery().error
        if error and not self._told:
            self._told = True
            logger.warning(
                "MLflow at %s: %s. Training goes on; what it is owed is kept in %s.",
                self._plan.uri.value,
                error,
                self.spool,
            )

    def _delivery(self) -> Delivery:
        return Delivery.read(delivery_path(self.spool))


def start_mlflow(
    plan: TrackingPlan, output_dir: Path, *, job: str, resumed: bool, tags: Mapping[str, str] | None = None
) -> MlflowTracker | None:
    """A tracker whose worker has been started; for the main process of a job whose plan is enabled.

    None, after a warning, when the spool cannot be written or no process be started: a run is never lost to that.
    A resumed job goes on with the MLflow run of its output directory, unless the address or the experiment has
    changed; what an earlier job could not deliver is delivered first.
    """
    uploads = bool(plan.log_artifacts.value)
    try:
        writer = _open_spool(plan, output_dir, job, resumed, tags or {})
        process = start_worker(writer.path, plan.uri.value, "--parent", str(os.getpid()), uploads=uploads)
    except OSError as error:
        logger.warning("MLflow: tracking cannot start: %s. Training goes on untracked.", error)
        return None
    return MlflowTracker(plan, writer, process)


def _open_spool(plan: TrackingPlan, output_dir: Path, job: str, resumed: bool, tags: Mapping[str, str]) -> SpoolWriter:
    """The spool of this directory, its `run` order written; a new one where the run is not gone on with."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / SPOOL_NAME
    before = latest_run(path)[0] if resumed else None
    if before is not None and not _same_target(plan, before, Delivery.read(delivery_path(path))):
        before = None
    umbrella = _umbrella(plan, before)
    if before is None or umbrella:
        set_aside(output_dir)
        before = None
    key = before["key"] if before else secrets.token_hex(16)
    name = plan.run_name.value or readable_name(key)
    if umbrella:
        name = f"{umbrella['name']} job {umbrella['jobs']}"
    writer = SpoolWriter(path)
    writer.append(
        "run",
        uri=plan.uri.value,
        experiment=plan.experiment.value,
        run_id=plan.run_id.value,
        run_name=before["run_name"] if before else name,
        key=key,
        umbrella=umbrella,
        parent_run_id=plan.parent_run_id.value,
        tags={"mlflow.source.name": f"finetuning {job}", "mlflow.source.type": "LOCAL", **_user(), **tags, **plan.tags},
        pid=os.getpid(),
        host=socket.gethostname(),
        uploads=bool(plan.log_artifacts.value),
        system_metrics=bool(plan.system_metrics.value),
    )
    return writer


def _umbrella(plan: TrackingPlan, before: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The run that stands for all jobs, by its key and name, and which job of it begins; None where there is none."""
    if not plan.child_runs:
        return None
    known = before.get("umbrella") if before else None
    if known:
        return {**known, "jobs": known["jobs"] + 1}
    key = secrets.token_hex(16)
    return {"key": key, "name": plan.run_name.value or readable_name(key), "jobs": 1}


def readable_name(key: str) -> str:
    """Two words and four characters, always the same for this key of hexadecimal digits.

    >>> readable_name("00ff" * 8)
    'amber-delta-00ff'
    """
    adjective, noun = (int(key[at : at + 2], 16) % 12 for at in (0, 2))
    return f"{_ADJECTIVES[adjective]}-{_NOUNS[noun]}-{key[-4:]}"


def _same_target(plan: TrackingPlan, before: Mapping[str, Any], delivery: Delivery) -> bool:
    same_run = plan.run_id.value in (None, delivery.run_id, before.get("run_id"))
    return same_run and before.get("uri") == plan.uri.value and before.get("experiment") == plan.experiment.value


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return {}
