"""Sending the orders of a spool to MLflow, each once, in order."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finetuning.config.redaction import without_user_info
from finetuning.tracking.mlflow.mlflow_batches import METRICS_A_BATCH, batches, below, chunks, fit, metrics_of
from finetuning.tracking.mlflow.queue_file import (
    SPOOL_NAME,
    Delivery,
    Order,
    delivery_path,
    latest_run,
    read_orders,
    whole_bytes,
)

KEY_TAG = "finetuning.key"
CHANGED_TAG = "finetuning.changed_on_resume"
_MOST_REFUSALS_KEPT = 100
_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""What makes MLflow's pages show an experiment as one of training, and not of prompts and traces."""
_FILE_ATTEMPTS = 3
# Pickles of the trainer's arguments hold the hub token in clear.
_NEVER_COPIED = {"training_args.bin"}


class RunUnusable(Exception):
    """The MLflow run cannot be written to: it, or its experiment, was deleted."""


class Courier:
    """Delivers one spool. Records and files are two lanes, so that a large upload never holds back the metrics.

    What MLflow refuses for what it is (HTTP 400) is noted and passed over; every other fault is raised to the caller,
    who tries again: the position moves on only after MLflow has said yes. A repeated order does no harm: the run is
    found again by its key, metrics carry their own time and a database drops the same one twice, the rest overwrites.
    """

    def __init__(self, spool: Path):
        from mlflow.tracking import MlflowClient

        run, self.ended = latest_run(spool)
        self.run: Mapping[str, Any] = run or {}
        self.spool = spool
        self.uri = str(self.run.get("uri", ""))
        self.client = MlflowClient(tracking_uri=self.uri)
        self.path = delivery_path(spool)
        self.delivery = Delivery.read(self.path)
        self._attempts = 0
        self._umbrella_id: str | None = None
        self._lock = threading.Lock()

    def deliver_records(self, limit: int | None = None) -> bool:
        """True when records were waiting and have all arrived; `limit` is the byte of the spool to stop at."""
        moved = False
        for batch in batches(read_orders(self.spool, self.delivery.records_sent, limit)):
            self._send(batch)
            self._arrived(records_sent=batch[-1].end)
            # Measured values of the machine may come after the end.
            self.ended = batch[-1].kind == "end" or (self.ended and batch[-1].kind != "run")
            moved = True
        return moved

    def deliver_files(self, limit: int | None = None) -> bool:
        """True when something was done. A file that three times did not arrive, while MLflow answers, is left over."""
        reached = self.delivery.records_sent if limit is None else min(limit, self.delivery.records_sent)
        passed = self.delivery.files_sent
        for order in read_orders(self.spool, passed, reached):
            if order.kind == "artifact":
                self._copy_or_leave(order.fields)
                self._arrived(files_sent=order.end)
                return True
            passed = order.end
        if passed > self.delivery.files_sent:
            self._save(files_sent=passed)
        return False

    def retry_files_left(self) -> None:
        """Takes up the files that an earlier worker has left over."""
        left, self.delivery.files_left = self.delivery.files_left, []
        for fields in left:
            self._copy_or_leave(fields)
        self._arrived()

    def is_drained(self, limit: int | None = None) -> bool:
        size = whole_bytes(self.spool) if limit is None else limit
        return min(self.delivery.records_sent, self.delivery.files_sent) >= size

    def close_run(self, status: str) -> None:
        """Gives the run its last status, without an order in the spool: for a training process that vanished."""
        if self.delivery.run_id is not None:
            self._terminate(status)

    def ping(self) -> None:
        """Notes that MLflow answers; raises when it does not."""
        self.client.get_run(str(self.delivery.run_id))
        self._arrived()

    def note_error(self, error: BaseException) -> None:
        """Keeps why the last attempt failed."""
        text = " ".join(str(error).split()) or type(error).__name__
        self._save(error=without_user_info(text)[:500])

    def _arrived(self, **positions: int) -> None:
        self._save(error=None, alive_at=time.time(), **positions)

    def _save(self, **changes: Any) -> None:
        with self._lock:
            vars(self.delivery).update(changes)
            self.delivery.write(self.path)

    def _send(self, batch: Sequence[Order]) -> None:
        order = batch[0]
        if order.kind == "run":
            self._open_run(order.fields)
        elif order.kind == "params":
            self._send_params(order.fields["values"])
        elif order.kind == "metrics":
            self._send_metrics(batch)
        elif order.kind == "tags":
            self._send_tags(order.fields["values"])
        elif order.kind == "end":
            self._terminate(order.fields["status"], order.fields["time"])
        elif order.kind == "datasets":
            self._send_datasets(order.fields["values"])
        elif order.kind != "artifact":
            self._refuse("order", order.kind, "not known")

    def _open_run(self, fields: Mapping[str, Any]) -> None:
        run_id = self.delivery.run_id or fields.get("run_id")
        parent_id = fields.get("parent_run_id")
        tags = {str(key): str(value) for key, value in fields.get("tags", {}).items()}
        if umbrella := fields.get("umbrella"):
            parent_id = self._run_by_key(umbrella["key"], umbrella["name"], fields, below(tags, parent_id))
            if self._is_newest():
                self._running(parent_id)
        if run_id is None:
            run_id = self._run_by_key(fields["key"], fields.get("run_name"), fields, below(tags, parent_id))
        run = self._running(run_id)
        self._umbrella_id = parent_id if umbrella else None
        address = self.uri.rstrip("/") if self.uri.startswith("http") else None
        self._save(
            run_id=run_id,
            run_name=run.info.run_name,
            experiment_id=run.info.experiment_id,
            url=address and f"{address}/#/experiments/{run.info.experiment_id}/runs/{run_id}",
        )

    def _run_by_key(self, key: str, name: str | None, fields: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """The id of the run that was made for this key, now or before."""
        experiment_id = self._experiment(fields.get("experiment") or "Default")
        known = self.client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if known:
            return known[0].info.run_id
        return self.client.create_run(experiment_id, fields["time"], {KEY_TAG: key, **tags}, name).info.run_id

    def _running(self, run_id: str) -> Any:
        run = self._usable_run(run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        return run

    def _terminate(self, status: str, at_ms: int | None = None) -> None:
        for run_id in (self.delivery.run_id, self._umbrella()):
            if run_id is not None:
                self.client.set_terminated(run_id, status, at_ms)

    def _umbrella(self) -> str | None:
        """The id of the run that stands for all jobs; looked for where another process has opened this job's run."""
        umbrella = self.run.get("umbrella")
        if not umbrella or not self._is_newest():
            return None
        if self._umbrella_id is None:
            self._umbrella_id = self._run_by_key(umbrella["key"], umbrella["name"], self.run, {})
        return self._umbrella_id

    def _is_newest(self) -> bool:
        """False for the spool of a job that another has followed: the run above them is then that one's to tell of."""
        return self.spool.name == SPOOL_NAME

    def _usable_run(self, run_id: str) -> Any:
        run = self.client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            raise RunUnusable(f"the MLflow run {run_id} was deleted")
        return run

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, tags=_TRAINING)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise RunUnusable(f'the MLflow experiment "{name}" was deleted')
        return found.experiment_id

    def _send_params(self, values: Mapping[str, str]) -> None:
        """MLflow never changes a parameter: what a resumed run has changed becomes a tag, which names old and new."""
        from mlflow.entities import Param

        run_id = str(self.delivery.run_id)
        known = self.client.get_run(run_id).data.params
        values = {fit(key): value for key, value in values.items()}
        changed = [f"{key}: {known[key]} -> {value}" for key, value in values.items() if known.get(key, value) != value]
        for chunk in chunks({key: value for key, value in values.items() if key not in known}):
            params = [Param(key, value) for key, value in chunk]
            if not self._accepted("params", "", self.client.log_batch, run_id, params=params, synchronous=True):
                for key, value in chunk:
                    self._accepted("param", key, self.client.log_param, run_id, key, value, synchronous=True)
        if changed:
            self._send_tags({CHANGED_TAG: "\n".join(changed)[:5000]})

    def _send_metrics(self, batch: Sequence[Order]) -> None:
        run_id = str(self.delivery.run_id)
        waiting = iter([metric for order in batch for metric in metrics_of(order.fields)])
        while chunk := list(islice(waiting, METRICS_A_BATCH)):
            if self._accepted("metrics", "", self.client.log_batch, run_id, chunk, synchronous=True):
                continue
            for metric in chunk:
                one = (run_id, metric.key, metric.value, metric.timestamp, metric.step)
                self._accepted("metric", metric.key, self.client.log_metric, *one, synchronous=True)

    def _send_datasets(self, values: Sequence[Mapping[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        run_id = str(self.delivery.run_id)
        for value in values:
            fields = {key: item for key, item in value.items() if key != "context"}
            one = DatasetInput(Dataset(**fields), [InputTag(MLFLOW_DATASET_CONTEXT, value["context"])])
            self._accepted("dataset", value["name"], self.client.log_inputs, run_id, [one])

    def _send_tags(self, values: Mapping[str, str]) -> None:
        run_id = str(self.delivery.run_id)
        for key, value in values.items():
            self._accepted("tag", key, self.client.set_tag, run_id, fit(key), value, synchronous=True)

    def _accepted(self, what: str, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
        """False when MLflow refuses this for what it is. A refusal of one thing is noted; of a batch it is not."""
        from mlflow.exceptions import MlflowException

        try:
            call(*arguments, **options)
        except MlflowException as error:
            if error.get_http_status_code() != 400:
                raise
            self._usable_run(str(self.delivery.run_id))
            if name:
                self._refuse(what, name, str(error))
            return False
        return True

    def _refuse(self, what: str, name: str, reason: str) -> None:
        refused = self.delivery.refused
        if len(refused) < _MOST_REFUSALS_KEPT:
            self._save(refused=[*refused, {"what": what, "name": name, "reason": without_user_info(reason)[:300]}])

    def _copy_or_leave(self, fields: Mapping[str, Any]) -> None:
        try:
            self._copy(Path(fields["path"]), fields.get("to") or None)
        except FileNotFoundError:
            self._save(files_gone=[*self.delivery.files_gone, fields["path"]])
        except Exception as error:
            self.ping()  # raises where nothing arrives, which is no fault of this file
            self.note_error(error)
            self._attempts += 1
            if self._attempts < _FILE_ATTEMPTS:
                raise
            self._save(files_left=[*self.delivery.files_left, dict(fields)])
        self._attempts = 0

    def _copy(self, source: Path, target: str | None) -> None:
        """One file, or the files of a folder below `target`.

        Raises:
            FileNotFoundError: it is gone; checkpoints are rotated away while they wait.
        """
        run_id = str(self.delivery.run_id)
        if not source.is_dir():
            if not source.exists():
                raise FileNotFoundError(source)
            self.client.log_artifact(run_id, str(source), target)
            return
        for folder, _, names in os.walk(source):
            inside = Path(folder).relative_to(source).as_posix()
            place = "/".join(part for part in (target, inside) if part and part != ".") or None
            for name in sorted(set(names) - _NEVER_COPIED):
                self.client.log_artifact(run_id, os.path.join(folder, name), place)
                self._arrived()
