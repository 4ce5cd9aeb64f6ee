"""Trackers other than MLflow that accelerate has a class for, each in a thread of its own.

A resumed job continues the tracker's run that `NAME_tracker.json` names. `BACKENDS` is the table of trackers; adding
one that accelerate supports is one entry.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.redaction import redact_values
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.tracking import ACCELERATE_TRACKERS, TrackingConfig, requested_trackers
from finetuning.config.sections.training import TrainingArgs
from finetuning.tracking.tracker import (
    LogEvent,
    RunIdentity,
    StepMetrics,
    TelemetryNames,
    Tracker,
    read_identities,
    summary_totals,
    write_identity,
)

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

CLOSE_TIMEOUT_S = 60.0
_QUEUE_SIZE = 10_000
_NAME_GROUPS = {"eval_": "eval/", "test_": "test/"}


@dataclass(frozen=True)
class TrackerRun:
    """What a tracker needs to know to open its run.

    `parameters` maps dotted config keys to text, and holds the user's metadata.
    """

    output_dir: Path
    project: str
    name: str
    parameters: Mapping[str, object]
    section: TrackingConfig
    identities: Mapping[str, RunIdentity]
    """The runs of an earlier job to continue, by tracker; empty for a new run."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard's event files, if the config or the environment says it."""


@dataclass(frozen=True)
class Backend:
    """How a tracker's run is opened, and what identifies it to a resumed job."""

    settings: Callable[[TrackerRun, RunIdentity], dict[str, object]] = lambda run, identity: {"run_name": run.project}
    """Keyword arguments of accelerate's class, from the run and the identity to continue (empty for a new run)."""
    identity: Callable[[Any], RunIdentity] = lambda run: {}
    """The identity of the opened run, from accelerate's `GeneralTracker.tracker`."""
    has_groups: bool = True
    """Whether the tracker groups `train/loss` and `eval/loss` by the part before the slash."""
    step_name: str | None = None
    """The metric that carries the step, where the tracker refuses a step twice; None to pass the step by itself."""


def make_trackers(
    experiment: Experiment, method: str, parameters: Mapping[str, str], *, resumed: bool
) -> list[Tracker]:
    """Return a tracker for each one that the experiment requests and accelerate has a class for."""
    names = [
        name
        for name in requested_trackers(experiment.tracking, experiment.training_args.report_to)
        if name in ACCELERATE_TRACKERS
    ]
    if not names:
        return []
    section = experiment.tracking or TrackingConfig()
    output_dir = Path(experiment.training_args.output_dir)
    metadata = {f"exp_metadata.{key}": value for key, value in redact_values(section.exp_metadata).items()}
    run = TrackerRun(
        output_dir=output_dir,
        project=section.experiment_name or "finetuning",
        name=section.run_name or f"{method}-{output_dir.absolute().name}",
        parameters={**parameters, **metadata},
        section=section,
        identities=read_identities(output_dir, names) if resumed else {},
        tensorboard_dir=_tensorboard_dir(experiment.training_args, os.environ),
    )
    return [BackgroundTracker(AccelerateTracker(name, run)) for name in names]


class AccelerateTracker(Tracker):
    """One run in one tracker, opened when training begins, so that a run that fails earlier leaves nothing behind."""

    def __init__(self, name: str, run: TrackerRun):
        self.name = name
        self._backend = BACKENDS[name]
        self._run = run
        self._tracker: GeneralTracker | None = None
        self._telemetry_names = TelemetryNames()

    def on_train_begin(self, metrics: StepMetrics) -> None:
        if self._tracker is not None:
            return
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers read it
        settings = self._backend.settings(self._run, dict(self._run.identities.get(self.name, {})))
        tracker = LOGGER_TYPE_TO_CLASS[self.name](**settings)
        tracker.start()
        self._tracker = tracker
        tracker.store_init_configuration(dict(self._run.parameters))
        if self._backend.step_name:
            tracker.tracker.define_metric("*", step_metric=self._backend.step_name, step_sync=True)
        if identity := self._backend.identity(tracker.tracker):
            write_identity(self._run.output_dir, self._run.section, self.name, identity)

    def log(self, event: LogEvent) -> None:
        values = dict(event.values)
        if event.kind == "training" and event.metrics.tokens_per_s is not None:
            values["tokens_per_second"] = event.metrics.tokens_per_s
        if event.kind == "summary":
            values = summary_totals(values)
        elif self._backend.has_groups:
            values = {_group_name(name): value for name, value in values.items()}
        self._send(values, event.metrics.step)

    def log_telemetry(self, values: Mapping[str, float], step: int) -> None:
        self._send(self._telemetry_names.rename(values), step)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.finish()

    def _send(self, values: Mapping[str, float], step: int) -> None:
        if self._tracker is None or not values:
            return
        if self._backend.step_name:
            self._tracker.log({**values, self._backend.step_name: step}, step=None)
        else:
            self._tracker.log(dict(values), step=step)


class BackgroundTracker(Tracker):
    """Forwards calls to another tracker from a thread, in order, and waits for it only in `close`.

    An error there is raised by the next call here, in the training thread, where `TrackerGroup` handles it.
    """

    def __init__(self, tracker: Tracker, close_timeout_s: float = CLOSE_TIMEOUT_S):
        self.name = tracker.name
        self._tracker = tracker
        self._close_timeout_s = close_timeout_s
        self._queue: queue.Queue[tuple[str, tuple[object, ...]]] = queue.Queue(_QUEUE_SIZE)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._forward, daemon=True, name=f"tracker {self.name}")

    def on_train_begin(self, metrics: StepMetrics) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._put("on_train_begin", metrics)

    def log(self, event: LogEvent) -> None:
        self._put("log", event)

    def log_telemetry(self, values: Mapping[str, float], step: int) -> None:
        self._put("log_telemetry", dict(values), step)

    def close(self) -> None:
        """Wait until everything was sent.

        Raises:
            TimeoutError: the tracker did not finish in time.
        """
        if self._thread.ident is None:
            return
        if self._thread.is_alive():
            self._queue.put(("close", ()), timeout=self._close_timeout_s)
        self._thread.join(self._close_timeout_s)
        self._raise_error()
        if self._thread.is_alive():
            raise TimeoutError(f"no response within {self._close_timeout_s:.0f} s; metrics not sent by then are lost")

    def _put(self, method: str, *arguments: object) -> None:
        self._raise_error()
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            raise TimeoutError(f"no response, with {_QUEUE_SIZE} messages queued") from None

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _forward(self) -> None:
        method = ""
        while method != "close":
            method, arguments = self._queue.get()
            try:
                getattr(self._tracker, method)(*arguments)
            except Exception as error:  # noqa: BLE001  raised again in the training thread
                self._error = error
                return


def _group_name(name: str) -> str:
    """
    >>> _group_name("eval_loss"), _group_name("loss")
    ('eval/loss', 'train/loss')
    """
    for prefix, group in _NAME_GROUPS.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"


def _tensorboard_dir(args: TrainingArgs, environ: Mapping[str, str]) -> str | None:
    """Return the folder of TensorBoard's events; None for one in the output folder, or in the shared one.

    As in the Silogen engine, whose chart serves that folder, a run in ./checkpoints has its events in ./logs.
    """
    if args.logging_dir or environ.get("TENSORBOARD_LOGGING_DIR"):
        return args.logging_dir
    return environ.get("LOGS_PATH") or (None if "output_dir" in args.model_fields_set else "./logs")


def _tensorboard(run: TrackerRun, identity: RunIdentity) -> dict[str, object]:
    if run.tensorboard_dir:
        return {"run_name": "", "logging_dir": run.tensorboard_dir}
    shared = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if shared:
        return {"run_name": run.output_dir.absolute().name, "logging_dir": shared}
    return {"run_name": "", "logging_dir": str(run.output_dir / "tensorboard")}


def _wandb(run: TrackerRun, identity: RunIdentity) -> dict[str, object]:
    import wandb

    resume = {"id": identity["run_id"], "resume": "allow"} if identity.get("run_id") else {}
    folder = {} if os.environ.get("WANDB_DIR") else {"dir": str(run.output_dir)}
    # wandb's console capture would break the progress display into lines.
    settings = wandb.Settings(console="off", silent=True)
    return {
        "run_name": os.environ.get("WANDB_PROJECT") or run.project,
        "name": run.name,
        "settings": settings,
        **resume,
        **folder,
    }


def _aim(run: TrackerRun, identity: RunIdentity) -> dict[str, object]:
    section = run.section
    port = section.aim_remote_server_port or 53800
    target = {"run_hash": identity["run_hash"]} if identity.get("run_hash") else {"experiment": run.project}
    return {
        **target,
        "run_name": run.name,
        "logging_dir": section.aim_repo or f"aim://{section.aim_remote_server_ip}:{port}",
        "capture_terminal_logs": False,
    }


def _clearml(run: TrackerRun, identity: RunIdentity) -> dict[str, object]:
    resume = {"continue_last_task": identity["task_id"]} if identity.get("task_id") else {}
    return {
        **resume,
        "project_name": run.section.clearml_project or os.environ.get("CLEARML_PROJECT") or run.project,
        "task_name": run.section.clearml_task or os.environ.get("CLEARML_TASK") or run.name,
        "auto_connect_arg_parser": False,
        "auto_connect_frameworks": False,
        "auto_connect_streams": False,
    }


def _dvclive(run: TrackerRun, identity: RunIdentity) -> dict[str, object]:
    return {"dir": str(run.output_dir / "dvclive"), "resume": bool(identity), "save_dvc_exp": False}


BACKENDS: dict[str, Backend] = {
    "tensorboard": Backend(_tensorboard, lambda run: {"folder": str(run.log_dir)}),
    "wandb": Backend(
        _wandb,
        lambda run: {
            "run_id": run.id,
            "run_name": run.name,
            "run_uri": run.url,
            "folder": str(Path(run.dir).parent),
        },
        step_name="train/global_step",
    ),
    "aim": Backend(_aim, lambda run: {"run_hash": run.hash}, has_groups=False),
    "clearml": Backend(
        _clearml, lambda run: {"task_id": run.id, "task_uri": run.get_output_log_web_page()}, has_groups=False
    ),
    **{name: Backend() for name in ("trackio", "swanlab", "comet_ml")},
    "dvclive": Backend(_dvclive, lambda run: {"folder": str(run.dir)}),
}
"""The trackers that are driven through a class of accelerate, by their names in the config."""
