"""`telemetry`.

The trackers besides MLflow, by name: what each is imported by, and the line that installs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SecretStr, StringConstraints

from finetuning.config.sections.section import ConfigSection

SpanName = Literal[
    "application",
    "distributed_code_initialization",
    "data_preparation",
    "data_loader_initialization",
    "model_initialization",
    "optimizer_initialization",
    "checkpoint_load",
    "training_loop",
    "training_single_iteration",
    "data_loading",
    "model_forward",
    "model_backward",
    "optimizer_update",
    "zero_grad",
    "checkpoint_save_sync",
    "checkpoint_save_async",
    "checkpoint_save_finalization",
    "validation_loop",
    "validation_single_iteration",
    "testing_loop",
    "testing_single_iteration",
    "model_publication",
]
"""The spans that the engine itself records."""


class OtlpConfig(ConfigSection):
    """A collector that speaks OTLP over HTTP."""

    endpoint: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$")]
    """Address of the collector, such as `http://localhost:4318`; `/v1/traces` and `/v1/logs` are appended."""
    headers: dict[str, SecretStr] = Field(default_factory=dict, exclude=True)
    """HTTP headers, such as an authorization. They are never shown or written."""
    timeout_s: float = Field(default=2.0, gt=0, le=10)
    """Seconds that one request may take, and that the end of a run waits for what is on its way."""


class TelemetryConfig(ConfigSection):
    """What a run tells about its own speed. It goes into files of the output directory, and nowhere else unless `otlp`
    names a place."""

    enabled: bool = True
    """Record spans and metrics, as JSON lines, in the folder `telemetry` of the output directory."""
    application_name: str = Field(default="finetuning", min_length=1)
    """Name of the application in every record."""
    session_tag: str | None = Field(default=None, min_length=1)
    """Names the jobs that together make one model. By default new for a fresh start, and kept by a resumed run."""
    perf_tag: str | None = Field(default=None, min_length=1)
    """Names the jobs whose speed can be compared. By default a digest of what moves the speed: the config without
    paths, seeds and learning rates, the packages, the device and the number of processes."""
    is_baseline_run: bool = False
    """Marks a run that others are to be compared with."""
    custom_metadata: dict[str, str] = Field(default_factory=dict)
    """Your own names and values, recorded with the run."""
    log_every_n_train_iterations: int = Field(default=50, gt=0)
    """Optimizer steps between two updates of the training metrics. With several processes each update is a small
    exchange between them."""
    spans: Literal["default", "per_step", "all", "none"] = "default"
    """Which spans are written: all but those inside of a step; with the steps themselves; all; or only those that
    `include_spans` names. The metrics are the same whichever are written."""
    include_spans: list[SpanName] = Field(default_factory=list)
    """Spans to write besides."""
    exclude_spans: list[SpanName] = Field(default_factory=list)
    """Spans to leave out."""
    ranks: Literal["zero", "local_zero", "all"] = "zero"
    """Which processes write: the main one, the first of each machine, or all."""
    flops_per_token: float | None = Field(default=None, gt=0)
    """Floating point operations that one trained token costs, forward and backward. By default counted from the model,
    where that is known to be right: supervised fine-tuning of all weights or of a LoRA."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of one device, for the model FLOPs utilisation (MFU). By default looked up, for known GPUs."""
    otlp: OtlpConfig | None = None
    """Sends everything to a collector, too. Needs the extra `otlp`."""


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


ACCELERATE_TRACKERS: dict[str, TrackerPackage] = {
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
TRANSFORMERS_TRACKERS: dict[str, TrackerPackage] = {
    "azure_ml": TrackerPackage("azureml", "pip install azureml-core"),
    "codecarbon": TrackerPackage("codecarbon", "pip install codecarbon"),
    "dagshub": TrackerPackage("dagshub", "pip install dagshub"),
    "flyte": TrackerPackage("flytekit", "pip install flytekit"),
    "neptune": TrackerPackage("neptune", "pip install neptune"),
}
"""The names of `report_to` that are told by a callback of transformers'."""
BUILTIN_TRACKERS = frozenset({"mlflow", "file_logger", "hf_resource_scanner"})
"""The trackers that need no package besides."""
TRACKER_NAMES: tuple[str, ...] = get_args(TrackerName)


def report_to_trackers(report_to: str | Iterable[str]) -> list[str]:
    """The names in `training_args.report_to`, without `none` and `mlflow`, which has an address of its own."""
    wanted = [report_to] if isinstance(report_to, str) else list(report_to)
    return [name for name in wanted if name not in ("none", "mlflow")]


def requested_trackers(run: Any) -> list[str]:
    """The trackers of an experiment: those of `tracking.trackers`, then those of `training_args.report_to`."""
    named = run.tracking.trackers if run.tracking else []
    return list(dict.fromkeys([*named, *report_to_trackers(run.training_args.report_to)]))


def tracker_key(run: Any, name: str) -> str:
    """The key of the config that asks for a tracker."""
    named = run.tracking is not None and name in run.tracking.trackers
    return "tracking.trackers" if named else "training_args.report_to"
