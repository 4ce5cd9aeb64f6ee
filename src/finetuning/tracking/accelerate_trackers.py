"""Trackers besides MLflow, told by accelerate's classes for them, each in a thread of its own.

Each goes on with its own run when a job is resumed, by what `NAME_tracker.json` says of it.

A sink in a thread of its own, for trackers that open connections and take their time."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.tracking import PACKAGES, requested_trackers
from finetuning.config.sections.training import TrackingConfig
from finetuning.tracking.tracker import LogEvent, MetricNames, StepMetrics, Tracker, totals

CLOSE_WAIT_S = 60.0
_MOST_WAITING = 10_000


class BackgroundTracker(Tracker):
    """Passes what it is told to another sink, in order, and waits for it only when it is closed.

    What goes wrong there is raised by the next call, here, where the guard of the sinks sees it.
    """

    def __init__(self, sink: Tracker, close_wait_s: float = CLOSE_WAIT_S):
        self.name = sink.name
        self._sink = sink
        self._close_wait_s = close_wait_s
        self._waiting: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(_MOST_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {self.name}")

    def begin(self, metrics: StepMetrics) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._put("begin", metrics)

    def log(self, event: LogEvent) -> None:
        self._put("log", event)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._put("figures", dict(values), step)

    def close(self) -> None:
        """Waits for what is under way.

        Raises:
            TimeoutError: the tracker did not come to an end.
        """
        if self._thread.ident is None:
            return
        if self._thread.is_alive():
            self._waiting.put(("close", ()), timeout=self._close_wait_s)
        self._thread.join(self._close_wait_s)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"it did not answer within {self._close_wait_s:.0f} s; what it had not sent is lost")

    def _put(self, method: str, *arguments: Any) -> None:
        self._raise()
        try:
            self._waiting.put_nowait((method, arguments))
        except queue.Full:
            raise TimeoutError(f"it does not answer, and {_MOST_WAITING} messages wait for it") from None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        method = ""
        while method != "close":
            method, arguments = self._waiting.get()
            try:
                getattr(self._sink, method)(*arguments)
            except Exception as error:  # noqa: BLE001  trackers fail in any way; told in the run's own thread
                self._error = error
                return


Identity = dict[str, Any]
_PREFIXES = {"eval_": "eval/", "test_": "test/"}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its first number.

    `parameters` are texts by dotted keys, and the user's own values.
    """

    output_dir: Path
    project: str
    name: str
    parameters: Mapping[str, Any]
    section: TrackingConfig
    before: Mapping[str, Identity]
    """What an earlier job of this run has left, by tracker; empty for a fresh start."""


@dataclass(frozen=True)
class Kind:
    """How one tracker is opened, and what of it another job needs, to go on with its run."""

    settings: Callable[[TrackedRun, Identity], dict[str, Any]] = lambda run, before: {"run_name": run.project}
    identity: Callable[[Any], Identity] = lambda tracker: {}
    groups: bool = True
    """Whether names are put as `train/loss` and `eval/loss`, by which it groups its curves."""
    step_name: str | None = None
    """The value that carries the step, where a step may come twice; None where steps are given apart."""


def _tensorboard(run: TrackedRun, before: Identity) -> dict[str, Any]:
    shared = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if shared:
        return {"run_name": run.output_dir.absolute().name, "logging_dir": shared}
    return {"run_name": "", "logging_dir": str(run.output_dir / "tensorboard")}


def _wandb(run: TrackedRun, before: Identity) -> dict[str, Any]:
    import wandb

    known = {"id": before["run_id"], "resume": "allow"} if before.get("run_id") else {}
    folder = {} if os.environ.get("WANDB_DIR") else {"dir": str(run.output_dir)}
    # Its capture of the terminal would cut the progress display into lines.
    quiet = wandb.Settings(console="off", silent=True)
    return {"run_name": os.environ.get("WANDB_PROJECT") or run.project, "name": run.name, "settings": quiet} | (
        known | folder
    )


def _aim(run: TrackedRun, before: Identity) -> dict[str, Any]:
    section = run.section
    port = section.aim_remote_server_port or 53800
    known = {"run_hash": before["run_hash"]} if before.get("run_hash") else {"experiment": run.project}
    return known | {
        "run_name": run.name,
        "logging_dir": section.aim_repo or f"aim://{section.aim_remote_server_ip}:{port}",
        "capture_terminal_logs": False,
    }


def _clearml(run: TrackedRun, before: Identity) -> dict[str, Any]:
    known = {"continue_last_task": before["task_id"]} if before.get("task_id") else {}
    return known | {
        "project_name": run.section.clearml_project or os.environ.get("CLEARML_PROJECT") or run.project,
        "task_name": run.section.clearml_task or os.environ.get("CLEARML_TASK") or run.name,
        "auto_connect_arg_parser": False,
        "auto_connect_frameworks": False,
        "auto_connect_streams": False,
    }


KINDS: dict[str, Kind] = {
    "tensorboard": Kind(_tensorboard, lambda tracker: {"folder": str(tracker.log_dir)}),
    "wandb": Kind(
        _wandb,
        lambda tracker: {
            "run_id": tracker.id,
            "run_name": tracker.name,
            "run_uri": tracker.url,
            "folder": str(Path(tracker.dir).parent),
        },
        step_name="train/global_step",
    ),
    "aim": Kind(_aim, lambda tracker: {"run_hash": tracker.hash}, groups=False),
    "clearml": Kind(
        _clearml, lambda tracker: {"task_id": tracker.id, "task_uri": tracker.get_output_log_web_page()}, groups=False
    ),
    **{name: Kind() for name in ("trackio", "swanlab", "comet_ml")},
    "dvclive": Kind(
        lambda run, before: {"dir": str(run.output_dir / "dvclive"), "resume": bool(before), "save_dvc_exp": False},
        lambda tracker: {"folder": str(tracker.dir)},
    ),
}
"""The trackers that are told by a class of accelerate's."""


class AccelerateTracker(Tracker):
    """One run in one tracker, opened when training begins: a run that fails before leaves nothing there."""

    def __init__(self, name: str, run: TrackedRun):
        self.name = name
        self._kind = KINDS[name]
        self._run = run
        self._tracker: Any = None
        self._figures = MetricNames()

    def begin(self, metrics: StepMetrics) -> None:
        if self._tracker is not None:
            return
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()
        settings = self._kind.settings(self._run, dict(self._run.before.get(self.name, {})))
        tracker = LOGGER_TYPE_TO_CLASS[self.name](**settings)
        tracker.start()
        self._tracker = tracker
        tracker.store_init_configuration(dict(self._run.parameters))
        if self._kind.step_name:
            tracker.tracker.define_metric("*", step_metric=self._kind.step_name, step_sync=True)
        if identity := self._kind.identity(tracker.tracker):
            write_identity(self._run.output_dir, self._run.section, self.name, identity)

    def log(self, event: LogEvent) -> None:
        values = dict(event.values)
        if event.kind == "training" and event.metrics.tokens_per_s is not None:
            values["tokens_per_second"] = event.metrics.tokens_per_s
        if event.kind == "summary":
            values = totals(values)
        elif self._kind.groups:
            values = {_grouped(name): value for name, value in values.items()}
        self._send(values, event.metrics.step)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._send(self._figures.of(values), step)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.finish()

    def _send(self, values: Mapping[str, float], step: int) -> None:
        if self._tracker is None or not values:
            return
        if self._kind.step_name:
            self._tracker.log({**values, self._kind.step_name: step})
        else:
            self._tracker.log(dict(values), step=step)


def write_identity(output_dir: Path, section: TrackingConfig, name: str, identity: Identity) -> None:
    """`NAME_tracker.json`: where a tracker's run is. In `output_dir`, and in the folder that the config names."""
    folders = [output_dir, *([Path(section.run_uri_export_path)] if section.run_uri_export_path else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}_tracker.json").write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def read_identities(output_dir: Path, names: Sequence[str]) -> dict[str, Identity]:
    """What earlier jobs of this output directory have left of each tracker's run."""
    found: dict[str, Identity] = {}
    for name in names:
        try:
            value = json.loads((output_dir / f"{name}_tracker.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(value, dict):
            found[name] = value
    return found


def make_trackers(
    experiment: Experiment, method: str, parameters: Mapping[str, str], *, resumed: bool
) -> list[Tracker]:
    """A sink for each tracker that the experiment asks for and that accelerate has a class for."""
    names = [name for name in requested_trackers(experiment) if name in PACKAGES]
    if not names:
        return []
    section = experiment.tracking or TrackingConfig()
    output_dir = Path(experiment.training_args.output_dir)
    metadata = {f"exp_metadata.{key}": value for key, value in section.exp_metadata.items()}
    run = TrackedRun(
        output_dir=output_dir,
        project=section.experiment_name or "finetuning",
        name=section.run_name or f"{method}-{output_dir.absolute().name}",
        parameters={**parameters, **metadata},
        section=section,
        before=read_identities(output_dir, names) if resumed else {},
    )
    return [BackgroundTracker(AccelerateTracker(name, run)) for name in names]


def _grouped(name: str) -> str:
    """
    >>> _grouped("eval_loss"), _grouped("loss")
    ('eval/loss', 'train/loss')
    """
    for prefix, group in _PREFIXES.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"
