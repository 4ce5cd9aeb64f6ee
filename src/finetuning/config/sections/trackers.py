"""The trackers besides MLflow, by name: what each is imported by, and the line that installs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

TrackerName = Literal[
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "file_logger",
    "hf_resource_scanner",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]


@dataclass(frozen=True)
class TrackerPackage:
    """A tracker's package by the name that it is imported by, and its install line."""

    module: str
    install: str


PACKAGES: dict[str, TrackerPackage] = {
    "aim": TrackerPackage("aim", "pip install 'finetuning[aim]'"),
    "clearml": TrackerPackage("clearml", "pip install 'finetuning[clearml]'"),
    "comet_ml": TrackerPackage("comet_ml", "pip install comet-ml"),
    "dvclive": TrackerPackage("dvclive", "pip install dvclive"),
    "swanlab": TrackerPackage("swanlab", "pip install swanlab"),
    "tensorboard": TrackerPackage("tensorboard", "pip install 'finetuning[tensorboard]'"),
    "trackio": TrackerPackage("trackio", "pip install trackio"),
    "wandb": TrackerPackage("wandb", "pip install 'finetuning[wandb]'"),
}
"""The trackers that are told by a class of accelerate's."""
FOREIGN: dict[str, TrackerPackage] = {
    "azure_ml": TrackerPackage("azureml", "pip install azureml-core"),
    "codecarbon": TrackerPackage("codecarbon", "pip install codecarbon"),
    "dagshub": TrackerPackage("dagshub", "pip install dagshub"),
    "flyte": TrackerPackage("flytekit", "pip install flytekit"),
    "neptune": TrackerPackage("neptune", "pip install neptune"),
}
"""The names of `report_to` that are told by a callback of transformers'."""
BUILT_IN = frozenset({"mlflow", "file_logger", "hf_resource_scanner"})
"""The trackers that need no package besides."""
NAMES: tuple[str, ...] = get_args(TrackerName)


def reported_to(report_to: str | Iterable[str]) -> list[str]:
    """The names in `training_args.report_to`, without `none` and `mlflow`, which has an address of its own."""
    wanted = [report_to] if isinstance(report_to, str) else list(report_to)
    return [name for name in wanted if name not in ("none", "mlflow")]


def wanted_trackers(run: Any) -> list[str]:
    """The trackers of an experiment: those of `tracking.trackers`, then those of `training_args.report_to`."""
    named = run.tracking.trackers if run.tracking else []
    return list(dict.fromkeys([*named, *reported_to(run.training_args.report_to)]))


def asking_key(run: Any, name: str) -> str:
    """The key of the config that asks for a tracker."""
    named = run.tracking is not None and name in run.tracking.trackers
    return "tracking.trackers" if named else "training_args.report_to"
