"""`telemetry` and `tracking`, and the experiment trackers by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal, get_args

from pydantic import Field, SecretStr, StringConstraints

from finetuning.config.sections.section import ConfigSection, PathName

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
"""The spans that the engine records."""


class OtlpConfig(ConfigSection):
    """An OpenTelemetry collector, reached with OTLP over HTTP."""

    endpoint: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$")]
    """URL of the collector, such as `http://localhost:4318`. `/v1/traces` and `/v1/logs` are appended."""
    headers: dict[str, SecretStr] = Field(default_factory=dict, exclude=True)
    """HTTP headers, such as an authorization header. Never logged or saved."""
    timeout_s: float = Field(default=2.0, gt=0, le=10)
    """Timeout of a request, in seconds. Also how long the end of a run waits for pending requests."""


class TelemetryConfig(ConfigSection):
    """Performance telemetry. Written to files in the output folder, and sent elsewhere only if `otlp` is set."""

    enabled: bool = True
    """Record spans, events and metrics as JSON Lines in the folder `telemetry` of the output folder."""
    application_name: str = Field(default="finetuning", min_length=1)
    """Name of the application, recorded with every span and event."""
    session_tag: str | None = Field(default=None, min_length=1)
    """Groups the jobs that train one model. By default generated for a new run and kept when it resumes."""
    perf_tag: Annotated[str, StringConstraints(min_length=1)] | list[str] | None = None
    """Groups runs whose steps should take equally long. One tag or several. Defaults to a hash of what affects the time
    of a step: the config without paths, seeds, learning rates, logging, evaluation and saving; the shape of the model;
    the mean length of the training rows; the package versions; the device and the number of processes."""
    is_baseline_run: bool = False
    """Mark the run as a baseline for comparisons."""
    custom_metadata: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Custom names and values to record with the run."""
    log_every_n_train_iterations: int = Field(default=50, gt=0)
    """Optimizer steps between two updates of the training metrics. With several processes, each update needs a small
    collective operation."""
    spans: Literal["default", "per_step", "all", "none"] = "default"
    """Spans to record: `default` all but those inside a training step, `per_step` also the steps themselves, `all`, or
    `none` only `include_spans`. Does not affect the metrics."""
    include_spans: list[SpanName] = Field(default_factory=list[SpanName])
    """Spans to record in addition."""
    exclude_spans: list[SpanName] = Field(default_factory=list[SpanName])
    """Spans not to record."""
    ranks: Literal["zero", "local_zero", "all"] = "zero"
    """Processes that record telemetry: rank `zero`, local rank zero of each node (`local_zero`), or `all`."""
    flops_per_token: float | None = Field(default=None, gt=0)
    """Floating-point operations per trained token, forward and backward pass. By default counted from the model if the
    count is known to be correct: SFT with full fine-tuning or LoRA."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of one device, for the model FLOPs utilization (MFU). By default looked up for known GPUs."""
    otlp: OtlpConfig | None = None
    """OpenTelemetry collector to also send telemetry to. Requires the extra `otlp`."""


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


class TrackingConfig(ConfigSection):
    """Experiment tracking. MLflow is enabled by its server address, other trackers by name."""

    mlflow_server_uri: str | None = None
    """MLflow tracking URI: a server or a local store, `http://…`, `sqlite:///…` or `file:///…`. MLflow is disabled
    without it."""
    experiment_name: str | None = None
    """Name of the MLflow experiment."""
    run_id: str | None = None
    """Id of an existing MLflow run to continue. Defaults to the run that was started for this output folder, or a new
    run."""
    run_name: str | None = None
    """Name of the MLflow run."""
    hf_mlflow_log_artifacts: bool = False
    """Upload checkpoints and the final model to MLflow as artifacts."""
    parent_run_id: str | None = None
    """Id of the parent MLflow run, such as that of a sweep."""
    resumed_jobs: Literal["same run", "child runs"] = "same run"
    """How a resumed job is tracked in MLflow: `same run` continues the run; with `child runs` every job, including the
    first, is a child run of one parent run."""
    log_system_metrics: bool = False
    """Log CPU, memory, disk, network and GPU usage to MLflow, with MLflow's own system metrics."""
    trackers: list[TrackerName] = Field(default_factory=list[TrackerName])
    """Additional trackers: `tensorboard`, `wandb`, `aim`, `clearml`, `trackio`, `swanlab`, `comet_ml`, `dvclive`, and
    `hf_resource_scanner`, which writes time and memory of a training step to a file. `mlflow` requires
    `mlflow_server_uri`; `file_logger` means `training_logs.jsonl`, which is always written."""
    exp_metadata: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Custom names and values to record with every tracker: as tags in MLflow, as parameters in others."""
    aim_repo: str | None = None
    """Folder or `aim://` URL of the Aim repository."""
    aim_remote_server_ip: str | None = None
    """Host of an Aim server, instead of `aim_repo`."""
    aim_remote_server_port: int | None = Field(default=None, gt=0, lt=65536)
    """Port of the Aim server. Defaults to 53800."""
    clearml_project: str | None = None
    """ClearML project. Defaults to `experiment_name`."""
    clearml_task: str | None = None
    """ClearML task. Defaults to `run_name`."""
    training_logs_filename: PathName = "training_logs.jsonl"
    """Name of the training log in `logging_dir`."""
    scanner_output_filename: PathName = "scanner_output.json"
    """Name of the file in the output folder that `hf_resource_scanner` writes."""
    run_uri_export_path: str | None = None
    """Folder for the files `NAME_tracker.json`, which hold the run id or URL of each tracker. Defaults to
    `output_dir`."""


@dataclass(frozen=True)
class TrackerPackage:
    """The module that a tracker is imported as, and the command that installs it."""

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
"""Trackers that are implemented by a tracker class of accelerate."""
TRANSFORMERS_TRACKERS: dict[str, TrackerPackage] = {
    "azure_ml": TrackerPackage("azureml", "pip install azureml-core"),
    "codecarbon": TrackerPackage("codecarbon", "pip install codecarbon"),
    "dagshub": TrackerPackage("dagshub", "pip install dagshub"),
    "flyte": TrackerPackage("flytekit", "pip install flytekit"),
    "neptune": TrackerPackage("neptune", "pip install neptune"),
}
"""Values of `report_to` that are implemented by a callback of transformers."""
BUILTIN_TRACKERS = frozenset({"mlflow", "file_logger", "hf_resource_scanner"})
"""Trackers that need no additional package."""
TRACKER_NAMES: tuple[str, ...] = get_args(TrackerName)


def report_to_trackers(report_to: str | Iterable[str]) -> list[str]:
    """Return the names in `training_args.report_to`, except `none` and `mlflow`, which `tracking` configures."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return [name for name in names if name not in ("none", "mlflow")]


def _installed_trackers(tracking: TrackingConfig | None) -> list[str]:
    """Return the trackers that `report_to: all` means: those that are installed, Aim only if it has a repository."""
    has_aim = tracking is not None and bool(tracking.aim_repo or tracking.aim_remote_server_ip)
    return [
        name
        for name, package in ACCELERATE_TRACKERS.items()
        if (has_aim or name != "aim") and find_spec(package.module) is not None
    ]


def requested_trackers(tracking: TrackingConfig | None, report_to: str | Iterable[str]) -> list[str]:
    """Return the trackers of an experiment: those of `tracking.trackers`, then those of `training_args.report_to`."""
    named: list[str] = [*tracking.trackers] if tracking else []
    for name in report_to_trackers(report_to):
        named += _installed_trackers(tracking) if name == "all" else [name]
    return list(dict.fromkeys(named))


def tracker_key(tracking: TrackingConfig | None, name: str) -> str:
    """Return the config key that requests a tracker."""
    named = tracking is not None and name in tracking.trackers
    return "tracking.trackers" if named else "training_args.report_to"
