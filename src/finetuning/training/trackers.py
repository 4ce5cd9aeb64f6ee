"""What a run tells its trackers: MLflow, those that accelerate knows, and those that transformers knows."""

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

    from finetuning.data.prepared import PreparedData
    from finetuning.tracking.mlflow.queue import UploadState
    from finetuning.tracking.mlflow.tracker import MlflowTracker
    from finetuning.tracking.settings import TrackingPlan
    from finetuning.tracking.tracker import Tracker

_STATUS = {"completed": "FINISHED", "interrupted": "KILLED"}
_LONGEST_DIGEST = 36
_DESCRIPTION, _README = "mlflow.note.content", "README.md"


class TrackerSet:
    """The trackers of one run, on the main process; on the others it does nothing."""

    def __init__(self, experiment: Experiment, method: str, plan: TrackingPlan, *, is_main: bool):
        self._experiment = experiment
        self._method = method
        self._plan = plan
        self._is_main = is_main
        self._output_dir = Path(experiment.training_args.output_dir)
        self._section = experiment.tracking or TrackingConfig()
        self._names = requested_trackers(experiment)
        self._mlflow: MlflowTracker | None = None
        self._is_resumed = False
        self.failures: dict[str, str] = {}
        """Trackers of transformers' that were switched off, and why."""

    def __str__(self) -> str:
        others = [name for name in self._names if name not in BUILTIN_TRACKERS or name == "hf_resource_scanner"]
        mlflow = [str(self._plan)] if self._plan.enabled or not others else []
        return "; ".join([*mlflow, *others])

    def begin(self, *, resumed: bool) -> None:
        """The run starts, afresh or from a checkpoint."""
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

    def tags(self, values: Mapping[str, str]) -> None:
        """What names the job among others."""
        if self._mlflow and values:
            self._mlflow.queue.append("tags", values=values)

    def rows(self, data: PreparedData, files: Sequence[Path]) -> None:
        """What is trained on, and files about it."""
        if self._mlflow:
            for path in files:
                self._mlflow.log_file(path)
            self._mlflow.queue.append("datasets", values=datasets_of(self._experiment, data))

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
        """What the trainer is to call besides."""
        found: list[TrainerCallback] = []
        if "hf_resource_scanner" in self._names:
            from finetuning.callbacks.resource_scanner import scanner_callback
            from finetuning.tracking.hf_integrations import GuardedCallback

            path = self._output_dir / self._section.scanner_output_filename
            found.append(GuardedCallback("hf_resource_scanner", scanner_callback(path), self.failures))
        foreign = [name for name in self._names if name not in ACCELERATE_TRACKERS and name not in BUILTIN_TRACKERS]
        if foreign:
            from finetuning.tracking.hf_integrations import integration_callbacks

            found += integration_callbacks(foreign, self.failures)
        return found

    def published(self, folder: Path) -> None:
        """The tuned model is saved."""
        if self._mlflow:
            self._mlflow.log_model_files(folder)

    def close(self, status: str, files: Sequence[Path]) -> None:
        """The run has ended; nothing is told after it."""
        if self._mlflow is None:
            return
        from finetuning.report.html import CARD_NAME, PLOTS_NAME

        for path in files:
            if path.name == CARD_NAME:
                description = _without_front(path.read_text(encoding="utf-8"))
                self._mlflow.queue.append("tags", values={_DESCRIPTION: description})
            if path.name != _README:
                self._mlflow.log_file(path, PLOTS_NAME if path.parent.name == PLOTS_NAME else "")
        end = self._mlflow.finish(_STATUS.get(status, "FAILED"))
        self._export(end)

    def places(self) -> dict[str, dict[str, Any]]:
        """Where each tracker's run is, by the tracker's name."""
        from finetuning.tracking.tracker import read_identities

        names = [*self._names, *(["mlflow"] if self._mlflow else [])]
        return read_identities(self._output_dir, list(dict.fromkeys(names)))

    def addresses(self) -> list[tuple[str, str]]:
        """Trackers, and where a browser or a command finds their runs."""
        places = self.places() if self._is_main else {}
        shown = (
            (name, next((place[key] for key in ("run_uri", "task_uri", "folder", "run_hash") if place.get(key)), None))
            for name, place in places.items()
        )
        return [(name, where) for name, where in shown if where]

    def _export(self, end: UploadState) -> None:
        from finetuning.tracking.tracker import write_identity

        identity = {"run_id": end.run_id, "run_name": end.run_name, "run_uri": end.url}
        write_identity(self._output_dir, self._section, "mlflow", identity)


def datasets_of(experiment: Experiment, data: PreparedData) -> list[dict[str, str]]:
    """The rows by parts, as MLflow describes datasets: where they are from, their digest, and how many they are."""
    config = experiment.data_conf
    sources = {"training": [source.path for source in config.training_data.datasets]}
    sources["validation"] = [source.path for source in getattr(config.validation_data, "datasets", [])]
    columns = {"training": data.train, "validation": data.validation}
    told = []
    for part in data.statistics.report():
        context = part["split"]
        paths = sources.get(context) or sources["training"]
        rows = columns.get(context)
        profile = {"num_rows": part["kept"], "num_rows_read": part["rows"], "num_tokens": part["tokens"]}
        profile |= {"num_trained_tokens": part["trained_tokens"]} if part["trained_tokens"] else {}
        told.append(
            {
                "name": ", ".join(dict.fromkeys(Path(path).name or path for path in paths))[:500],
                "digest": data.fingerprint.data[:_LONGEST_DIGEST],
                "source_type": "local" if all(Path(path).exists() for path in paths) else "hugging_face",
                "source": json.dumps({"uri": ", ".join(paths)}),
                "schema": json.dumps({"columns": list(rows.column_names)} if rows is not None else {}),
                "profile": json.dumps(profile),
                "context": context,
            }
        )
    return told


def _without_front(card: str) -> str:
    """The card as a description: without the lines that only the model hub reads."""
    return card.partition("\n---\n")[2].strip()
