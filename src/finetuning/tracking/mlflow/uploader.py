"""Uploads the records of a queue to MLflow."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from finetuning.tracking.mlflow.queue import QUEUE_NAME, QueuedRecord, UploadState, latest_run, read_records
from finetuning.tracking.settings import MAX_KEY_LENGTH

_KEY_TAG, _CHANGED_TAG = "finetuning.key", "finetuning.changed_on_resume"
# MLflow takes 1 MB per request: many metrics, but few texts of 6000 characters.
_BATCH_SIZES = {"metrics": 1000, "params": 20, "tags": 20}
# MLflow shows such an experiment as one of model training, not of prompts and traces.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class Uploader:
    """Uploads one queue, in order; files when no record is waiting, so that a checkpoint does not delay metrics.

    The offset advances after MLflow has accepted a record: one may be sent twice, which is harmless (a run is looked up
    by its key, metrics carry time and step, the rest overwrites), but is never lost. What MLflow rejects as invalid
    (HTTP 400) is noted and skipped; every other error is raised, and the caller tries again.
    """

    def __init__(self, queue: Path):
        self.queue = queue
        run, self.ended = latest_run(queue)
        self.run = run or QueuedRecord("run", {}, 0)
        self.client = MlflowClient(tracking_uri=self.run.fields.get("uri", ""))
        self.state = UploadState.read(queue)
        self._is_newest = queue.name == QUEUE_NAME  # an older job does not end the parent run

    def upload_next(self) -> bool:
        """Upload the next record, the next metrics or the next file; return False if there is none."""
        records = read_records(self.queue, self.state.offset)
        _, group = next(groupby(records, lambda record: record.kind == "metrics" or record.end), (0, ()))
        batch = list(islice(group, 100))
        is_next_job = bool(batch) and batch[0].kind == "run" and batch[0].end > self.run.end
        if batch and not is_next_job:  # which has an uploader of its own
            self._upload(batch)
            self.state.offset = batch[-1].end
        elif self.state.pending_files:
            self._upload_file(self.state.pending_files.pop(0))
        else:
            return False
        self.state.error = None
        self.state.write(self.queue)
        return True

    def close_run(self, status: str, at_ms: int | None = None) -> None:
        """Set the final status of the run, and of its parent run."""
        parent_id = self._parent_run(self.run.fields, {}) if self._is_newest else None
        for run_id in filter(None, (self.state.run_id, parent_id)):
            self.client.set_terminated(run_id, status, at_ms)

    def _upload(self, batch: Sequence[QueuedRecord]) -> None:
        kind, fields = batch[0].kind, batch[0].fields
        if kind == "run":
            self._open_run(fields)
        elif kind == "params":
            self._log_params({_allowed(key): value for key, value in fields["values"].items()})
        elif kind == "metrics":
            metrics = [(record.fields, *item) for record in batch for item in record.fields["values"].items()]
            self._log(kind, [Metric(_allowed(k), float(v), of["time"], of.get("step", 0)) for of, k, v in metrics])
        elif kind == "tags":
            self._log(kind, [RunTag(_allowed(key), value) for key, value in fields["values"].items()])
        elif kind == "datasets":
            for values in fields["values"]:
                tags = [InputTag(MLFLOW_DATASET_CONTEXT, values.pop("context"))]
                inputs = [DatasetInput(Dataset(**values), tags)]
                self._accepted(f"dataset {values['name']}", self.client.log_inputs, datasets=inputs)
        elif kind == "artifact":
            self.state.pending_files.append(fields)
        elif kind == "end":
            self.close_run(fields["status"], fields["time"])
            self.ended = self.ended or batch[0].end > self.run.end

    def _open_run(self, fields: Mapping[str, Any]) -> None:
        state, name, parent_id = self.state, fields["run_name"], fields["parent_run_id"]
        tags = {**fields["tags"], **({MLFLOW_PARENT_RUN_ID: parent_id} if parent_id else {})}
        if parent_id := self._parent_run(fields, tags):
            parent = self._set_running(parent_id) if self._is_newest else self.client.get_run(parent_id)
            name = name or f"{parent.info.run_name} job {fields['parent']['jobs']}"
            tags[MLFLOW_PARENT_RUN_ID] = parent_id
        run_id = state.run_id or fields["run_id"] or self._run_by_key(fields["key"], name, fields, tags)
        info, uri = self._set_running(run_id).info, fields["uri"].rstrip("/")
        state.run_id, state.run_name = run_id, info.run_name
        state.url = f"{uri}/#/experiments/{info.experiment_id}/runs/{run_id}" if uri.startswith("http") else None

    def _parent_run(self, fields: Mapping[str, Any], tags: Mapping[str, str]) -> str | None:
        """Return the id of the run that groups the jobs of a session; None if jobs are not child runs."""
        parent = fields.get("parent")
        return self._run_by_key(parent["key"], parent["name"], fields, tags) if parent else None

    def _run_by_key(self, key: str, name: str | None, fields: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Return the id of the run with this key; create it if there is none."""
        label, create = fields["experiment"] or "Default", self.client.create_experiment
        experiment = self.client.get_experiment_by_name(label)
        experiment_id = experiment.experiment_id if experiment else create(label, None, _EXPERIMENT_TAGS)
        runs = self.client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        run = runs[0] if runs else self.client.create_run(experiment_id, fields["time"], {_KEY_TAG: key, **tags}, name)
        return run.info.run_id

    def _set_running(self, run_id: str) -> Run:
        """Return the run, marked as running; raise if it was deleted."""
        self.client.update_run(run_id, status="RUNNING")
        return self.client.get_run(run_id)

    def _log_params(self, values: Mapping[str, str]) -> None:
        """Log the new parameters. MLflow cannot change one, so a tag lists what a resumed job has changed."""
        logged = self.client.get_run(str(self.state.run_id)).data.params
        self._log("params", [Param(key, value) for key, value in values.items() if key not in logged])
        changed = [f"{key}: {logged[key]} -> {new}" for key, new in values.items() if logged.get(key, new) != new]
        if changed:
            self._log("tags", [RunTag(_CHANGED_TAG, "\n".join(changed)[:5000])])

    def _log(self, kind: str, items: Sequence[Any]) -> None:
        """Log metrics, params or tags in batches; one by one if MLflow rejects a batch."""
        for start in range(0, len(items), _BATCH_SIZES[kind]):
            batch = items[start : start + _BATCH_SIZES[kind]]
            if not self._accepted(None, self.client.log_batch, **{kind: batch}):
                for item in batch:
                    self._accepted(f"{kind} {item.key}", self.client.log_batch, **{kind: [item]})

    def _accepted(self, name: str | None, log: Callable[..., object], **items: object) -> bool:
        """Return False if MLflow rejects the items as invalid; note the rejection if they have a name."""
        try:
            log(str(self.state.run_id), **items)
        except MlflowException as error:
            if error.get_http_status_code() != 400:
                raise
            self._set_running(str(self.state.run_id))  # raises if the run was deleted: it may be restored
            if name is not None:
                self.state.rejected.append(f"{name}: {str(error)[:300]}")
            return False
        return True

    def _upload_file(self, file: dict[str, str]) -> None:
        """Upload a file, or make the files of a folder pending. A file that fails goes to the end of the line."""
        path, folder = Path(file["path"]), file["to"]
        if path.is_dir():
            for inner in sorted(path.rglob("*")):
                if inner.is_file() and inner.name != "training_args.bin":  # which holds the hub token in clear
                    target = Path(folder, inner.relative_to(path).parent).as_posix()
                    self.state.pending_files.append({"path": str(inner), "to": target})
        elif path.exists():
            self.state.pending_files.append(file)
            self.client.log_artifact(str(self.state.run_id), str(path), folder or None)
            self.state.pending_files.pop()
        else:
            self.state.rejected.append(f"{path}: deleted before it was uploaded")


def _allowed(name: str) -> str:
    """Return the name with `_` for each character that MLflow does not allow in names."""
    return re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name)[:MAX_KEY_LENGTH]
