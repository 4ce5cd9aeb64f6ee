"""The trackers of a run: MLflow, those of accelerate, and those of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.tracking import (
    ACCELERATE_TRACKERS,
    BUILTIN_TRACKERS,
    TrackingConfig,
    requested_trackers,
)
from finetuning.config.yaml.dump import dump_values
from finetuning.report.run_folder import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetuning.config.sections.data import DatasetSource
    from finetuning.data.prepared import PreparedData
    from finetuning.tracking.mlflow.queue import UploadState
    from finetuning.tracking.mlflow.tracker import MlflowTracker
    from finetuning.tracking.settings import TrackingPlan
    from finetuning.tracking.tracker import RunIdentity, Tracker

_MLFLOW_STATUS = {"completed": "FINISHED", "interrupted": "KILLED"}
_MAX_DIGEST_LENGTH = 36
"""MLflow's limit."""
_DESCRIPTION_TAG, _README = "mlflow.note.content", "README.md"


class TrackerSet:
    """The trackers of a run. Does nothing except on the main process."""

    def __init__(self, experiment: Experiment, method: str, plan: TrackingPlan, *, is_main: bool):
        self._experiment = experiment
        self._method = method
        self._plan = plan
        self._is_main = is_main
        self._output_dir = Path(experiment.training_args.output_dir)
        self._section = experiment.tracking or TrackingConfig()
        self._names = requested_trackers(experiment.tracking, experiment.training_args.report_to)
        self._mlflow: MlflowTracker | None = None
        self._is_resumed = False
        self.errors: dict[str, str] = {}
        """Trackers of transformers that were switched off, and why."""

    def __str__(self) -> str:
        names = [name for name in self._names if name not in BUILTIN_TRACKERS or name == "hf_resource_scanner"]
        mlflow = [str(self._plan)] if self._plan.enabled or not names else []
        return "; ".join([*mlflow, *names])

    def start(self, *, resumed: bool) -> None:
        """Start tracking a new or resumed run."""
        self._is_resumed = resumed
        if not (self._is_main and self._plan.enabled):
            return
        from finetuning.tracking.mlflow.tracker import start_mlflow
        from finetuning.tracking.settings import parameters, version_tags

        self._mlflow = start_mlflow(
            self._plan, self._output_dir, job=self._method, resumed=resumed, tags=version_tags()
        )
        if self._mlflow:
            flatten = bool(self._plan.flatten_params.value)
            self._mlflow.queue.append("params", values=parameters(dump_values(self._experiment), flatten=flatten))
            self._mlflow.log_file(self._output_dir / CONFIG_NAME)

    def log_tags(self, values: Mapping[str, str]) -> None:
        """Log names that identify the job."""
        if self._mlflow and values:
            self._mlflow.queue.append("tags", values=values)

    def log_data(self, data: PreparedData, files: Sequence[Path]) -> None:
        """Log the datasets, and files about them."""
        if self._mlflow:
            for path in files:
                self._mlflow.log_file(path)
            self._mlflow.queue.append("datasets", values=mlflow_datasets(self._experiment, data))

    def trackers(self) -> list[Tracker]:
        """Return the trackers that receive every log."""
        if not self._is_main:
            return []
        trackers: list[Tracker] = [self._mlflow] if self._mlflow else []
        if any(name in ACCELERATE_TRACKERS for name in self._names):
            from finetuning.tracking.accelerate_trackers import make_trackers
            from finetuning.tracking.settings import parameters

            values = parameters(dump_values(self._experiment))
            trackers += make_trackers(self._experiment, self._method, values, resumed=self._is_resumed)
        return trackers

    def callbacks(self) -> list[TrainerCallback]:
        """Return callbacks for the trainer, in addition to the trackers."""
        callbacks: list[TrainerCallback] = []
        if "hf_resource_scanner" in self._names:
            from finetuning.callbacks.resource_scanner import scanner_callback
            from finetuning.tracking.hf_integrations import GuardedCallback

            path = self._output_dir / self._section.scanner_output_filename
            callbacks.append(GuardedCallback("hf_resource_scanner", scanner_callback(path), self.errors))
        integrations = [
            name for name in self._names if name not in ACCELERATE_TRACKERS and name not in BUILTIN_TRACKERS
        ]
        if integrations:
            from finetuning.tracking.hf_integrations import integration_callbacks

            callbacks += integration_callbacks(integrations, self.errors)
        return callbacks

    def log_model(self, folder: Path) -> None:
        """Log the final model."""
        if self._mlflow:
            self._mlflow.log_model_files(folder)

    def close(self, status: str, files: Sequence[Path]) -> None:
        """Log the last files and finish the MLflow run; called once, when the run has ended."""
        if self._mlflow is None:
            return
        from finetuning.report.html import CARD_NAME, PLOTS_NAME

        for path in files:
            if path.name == CARD_NAME:
                description = _without_front_matter(path.read_text(encoding="utf-8"))
                self._mlflow.queue.append("tags", values={_DESCRIPTION_TAG: description})
            if path.name != _README:
                self._mlflow.log_file(path, PLOTS_NAME if path.parent.name == PLOTS_NAME else "")
        self._write_identity(self._mlflow.finish(_MLFLOW_STATUS.get(status, "FAILED")))

    def identities(self) -> dict[str, RunIdentity]:
        """Return what identifies the run in each tracker, by the tracker's name."""
        from finetuning.tracking.tracker import read_identities

        names = [*self._names, *(["mlflow"] if self._mlflow else [])]
        return read_identities(self._output_dir, list(dict.fromkeys(names)))

    def addresses(self) -> list[tuple[str, str]]:
        """Return trackers, and the URL, folder or id where their runs are found."""
        addresses: list[tuple[str, str]] = []
        for name, identity in (self.identities() if self._is_main else {}).items():
            values = [identity[key] for key in ("run_uri", "task_uri", "folder", "run_hash") if identity.get(key)]
            if values:
                addresses.append((name, str(values[0])))
        return addresses

    def _write_identity(self, end: UploadState) -> None:
        from finetuning.tracking.tracker import write_identity

        identity = {"run_id": end.run_id, "run_name": end.run_name, "run_uri": end.url}
        write_identity(self._output_dir, self._section, "mlflow", identity)


def mlflow_datasets(experiment: Experiment, data: PreparedData) -> list[dict[str, str]]:
    """Return the splits as MLflow describes datasets: name, digest, source, schema, profile and context."""
    config = experiment.data_conf
    sources = {
        "training": _paths(config.training_data.datasets),
        "validation": _paths(getattr(config.validation_data, "datasets", [])),
    }
    splits: dict[str, Any] = {"training": data.train, "validation": data.validation}
    described: list[dict[str, str]] = []
    for statistics in data.statistics.report():
        context = statistics["split"]
        paths = sources.get(context) or sources["training"]
        rows = splits.get(context)
        profile = {
            "num_rows": statistics["kept"],
            "num_rows_read": statistics["rows"],
            "num_tokens": statistics["tokens"],
        }
        profile |= {"num_trained_tokens": statistics["trained_tokens"]} if statistics["trained_tokens"] else {}
        described.append(
            {
                "name": ", ".join(dict.fromkeys(Path(path).name or path for path in paths))[:500],
                "digest": data.fingerprint.data[:_MAX_DIGEST_LENGTH],
                "source_type": "local" if all(Path(path).exists() for path in paths) else "hugging_face",
                "source": json.dumps({"uri": ", ".join(paths)}),
                "schema": json.dumps({"columns": list(rows.column_names)} if rows is not None else {}),
                "profile": json.dumps(profile),
                "context": context,
            }
        )
    return described


def _paths(datasets: Sequence[DatasetSource]) -> list[str]:
    paths: list[str] = []
    for dataset in datasets:
        paths += [dataset.path] if isinstance(dataset.path, str) else dataset.path
    return paths


def _without_front_matter(card: str) -> str:
    """Return the model card without its YAML front matter."""
    return card.partition("\n---\n")[2].strip()
