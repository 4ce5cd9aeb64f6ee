"""What a run tells, on its way down the road: to the terminal, to the loss log, to MLflow.

What steers a run while it trains: the user's rules, and the guard."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.pretrained_config import quantization_method
from finetuning.config.sections.experiment import Experiment
from finetuning.config.validation.validate import read_controllers
from finetuning.distributed import ProcessTopology
from finetuning.errors import FinetuningError
from finetuning.plan.plan import Plan
from finetuning.report.console import open_console
from finetuning.report.run_folder import PREVIEW_NAME, RECORD_NAME
from finetuning.report.terminal import (
    NextCommand,
    OutputFile,
    RunSummary,
    SummaryLine,
    print_end,
    print_start,
    print_warning,
)
from finetuning.training.telemetry import TelemetrySession
from finetuning.training.trackers import TrackerSet

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from finetuning.callbacks.controller.callback import ControllerSet
    from finetuning.data.prepared import PreparedData
    from finetuning.tracking.settings import TrackingPlan
    from finetuning.training.final_model import FinalModel
    from finetuning.training.resume.find import ResumePoint


class ControllerCallbacks:
    """The trainer controller and the guard of one run, the same on every process."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._controllers: ControllerSet | None = None

    def callbacks(self) -> list[TrainerCallback]:
        """What the trainer is to call.

        Raises:
            ConfigError: a controller cannot be made.
        """
        from finetuning.callbacks.loss_guard import LossGuardCallback

        found: list[Any] = []
        section = read_controllers(self._experiment.trainer_controller)
        if section is not None and section.controllers:
            from finetuning.callbacks.controller.callback import controller_callback, make_controllers

            self._controllers = make_controllers(section)
            found.append(controller_callback(self._controllers))
        if self._experiment.guard.enabled:
            found.append(LossGuardCallback(self._experiment.guard))
        return found

    def published(self, trainer: Trainer, folder: Path) -> None:
        """The tuned model is saved: the last `on_save`, which only this process sees."""
        if self._controllers is None:
            return
        from finetuning.callbacks.controller.metrics import Event

        extra = {"path": str(folder), "is_final": True}
        self._controllers.handle(
            Event("on_save", trainer.args, trainer.state, trainer.control, extra), on_all_processes=False
        )

    def taken(self) -> list[str]:
        """What rules did, one line a rule: what it did first, and how often it acted."""
        acted: dict[str, dict[tuple[int, str], list[str]]] = {}
        for action in self._controllers.actions if self._controllers else ():
            acted.setdefault(action.controller, {}).setdefault((action.step, action.event), []).append(action.action)
        told = []
        for controller, times in acted.items():
            (step, event), actions = next(iter(times.items()))
            again = f", and {len(times) - 1} times more" if len(times) > 1 else ""
            told.append(f'step {step}: rule "{controller}" held at {event}: {", ".join(actions)}{again}')
        return told


logger = logging.getLogger("finetuning")

_SHOWN_ROWS = 10


class RunReporter:
    """Told of each step of a run as it is taken. Only the main process says or writes anything."""

    def __init__(self, experiment: Experiment, method: str, topology: ProcessTopology, tracking: TrackingPlan):
        self._experiment = experiment
        self._method = method
        self._is_main = topology.is_main
        self._tracked = TrackerSet(experiment, method, tracking, is_main=topology.is_main)
        self._output_dir = Path(experiment.training_args.output_dir)
        self._console = open_console(is_main=topology.is_main)
        self._lines = [SummaryLine("model", experiment.run_conf.model), SummaryLine("output", str(self._output_dir))]
        self._warnings: list[str] = []
        self._found: list[tuple[str, str]] = []
        self._trackers: Any = None
        self._trainer: Any = None
        self._artifact: FinalModel | None = None
        self._started = time.monotonic()
        self._measuring = TelemetrySession(experiment, method, topology)
        self._steering = ControllerCallbacks(experiment)
        self._report: Path | None = None

    def resuming(self, resume: ResumePoint) -> None:
        """The run starts, afresh or from a checkpoint. Tracking starts here, beside all that follows."""
        self._measuring.begin(resume)
        self._warn(*resume.notes)
        if resume.checkpoint:
            self._lines.append(SummaryLine("resumed from", str(resume.checkpoint)))
        self._tracked.begin(resumed=resume.checkpoint is not None)
        self._tracked.tags(self._measuring.tags())
        self._lines.append(SummaryLine("tracking", str(self._tracked)))
        self._stage("Reading rows, rendering them, proving their masks")

    def told(self, label: str, value: str, reason: str = "", *, warnings: Sequence[str] = ()) -> None:
        """One fact about the run."""
        self._lines.append(SummaryLine(label, value, reason))
        self._warn(*warnings)

    def found(self, label: str, value: str) -> None:
        """One fact that only the end of the training knows."""
        self._found.append((label, value))

    def prepared(self, data: PreparedData) -> None:
        """The rows are ready: their fates and the first of them are written into the output directory."""
        self._lines.append(SummaryLine("prepared rows", data.origin))
        for line in data.statistics.lines():
            label, _, value = line.partition(": ")
            is_part = value and not line.startswith(" ")
            self._lines.append(SummaryLine(f"{label} rows", value) if is_part else SummaryLine("", line.strip()))
        if self._is_main:
            from finetuning.data.preview import to_text

            data.statistics.write(self._output_dir)
            (self._output_dir / PREVIEW_NAME).write_text(to_text(data.preview[:_SHOWN_ROWS]), encoding="utf-8")
            self._tracked.rows(data, [self._output_dir / name for name in (PREVIEW_NAME, "data_report.json")])

    def stage(self, name: str) -> AbstractContextManager[None]:
        """One stage of the road, measured."""
        return self._measuring.stage(name)

    def planned(self, plan: Plan, arguments: TrainingArguments) -> None:
        """The plan stands, and the processes of the job find each other."""
        self._measuring.connect(arguments)
        self._measuring.planned(plan)
        self._lines += [SummaryLine(decision.name, decision.value, decision.reason) for decision in plan.decisions]
        self._stage("Loading the model")

    def callbacks(self) -> list[TrainerCallback]:
        """What the trainer is to call."""
        from finetuning.report.terminal import progress_tracker
        from finetuning.tracking.callback import TrackerCallback
        from finetuning.tracking.tracker import LossLog, MetricsLog, TrackerGroup

        trackers = [progress_tracker(self._console)]
        if self._is_main:
            trackers += [LossLog(Path(self._experiment.logging_dir or self._output_dir)), MetricsLog(self._output_dir)]
            trackers += self._tracked.trackers()
        self._trackers = TrackerGroup(trackers)
        # Measuring comes first, so that what the trackers do at the end of a step is no part of the step.
        measuring = self._measuring.callbacks(self._tell_figures)
        telling = TrackerCallback(self._trackers, count_tokens=lambda: self._trainer.all_tokens_seen())
        # What steers comes last: what it stops has been told.
        return [*measuring, telling, *self._tracked.callbacks(), *self._steering.callbacks()]

    def _tell_figures(self, figures: Mapping[str, float], step: int) -> None:
        if self._trackers:
            self._trackers.call("log_telemetry", figures, step)

    def watch(self, trainer: Trainer) -> None:
        """The trainer is ready: the start summary is shown."""
        from transformers.trainer_callback import PrinterCallback

        self._trainer = trainer
        self._measuring.watch(trainer)
        trainer.remove_callback(PrinterCallback)
        print_start(self._console, f"finetuning {self._method}", self._lines)
        for warning in self._warnings:
            print_warning(self._console, warning)

    def published(self, artifact: FinalModel) -> None:
        """The tuned model is saved and checked."""
        self._artifact = artifact
        self._steering.published(self._trainer, Path(artifact.folder))
        self._tracked.published(Path(artifact.folder))

    def measured(self, error: BaseException | None) -> dict[str, Any]:
        """Telemetry ends. Gives what belongs into the record: its figures, and what was told at the start."""
        measured = self._measuring.end(error, self._tell_figures)
        if self._trackers:
            # Before the record is written, so that it says which of them failed at their ends.
            self._trackers.close()
        told = {
            "summary": [[line.label, line.value, line.reason] for line in self._lines],
            "warnings": self._warnings,
            "controller_actions": self._steering.taken(),
            "trackers": self._tracked.places() if self._is_main else {},
        }
        return told if measured is None else {"telemetry": measured, **told}

    def close(self, status: str) -> None:
        """The run has ended, one way or the other; called once, after the record was written."""
        extracts: list[Path] = []
        if self._is_main and self._trainer is not None:
            from finetuning.report.html import write_extracts_or_warn, write_report_or_warn

            self._report = write_report_or_warn(self._output_dir)
            extracts = write_extracts_or_warn(self._output_dir)
        self._tracked.close(status, [*filter(None, [self._output_dir / RECORD_NAME, self._report]), *extracts])

    @property
    def failures(self) -> dict[str, str]:
        """The places that could not be told and were switched off, and why."""
        return (dict(self._trackers.failures) if self._trackers else {}) | self._tracked.failures

    def closing(self, status: str, steps: int, final_loss: float | None, training_s: float | None) -> None:
        """What was made, where, and the next commands to type."""
        if self._artifact is None:
            self._console.print(f"{self._output_dir}: {status}. Nothing was done.", markup=False)
            return
        artifact = self._artifact
        print_end(
            self._console,
            RunSummary(
                headline=f"Completed after {steps:,} steps",
                good=True,
                outputs=[
                    OutputFile(artifact.kind, Path(artifact.folder)),
                    *([OutputFile("report", self._report)] if self._report else []),
                    OutputFile("record", self._output_dir / RECORD_NAME),
                ],
                final_loss=final_loss,
                training_s=training_s,
                total_s=time.monotonic() - self._started,
                facts=[("by rule", text) for text in self._steering.taken()]
                + self._found
                + [("checked", "; ".join(artifact.checks))]
                + ([("stops at", artifact.stop_tokens)] if artifact.stop_tokens else [])
                + [(name, where) for name, where in self._tracked.addresses()],
                commands=next_commands(artifact),
            ),
        )

    def _stage(self, text: str) -> None:
        self._console.print(f"{text} ...", style="dim", markup=False)

    def _warn(self, *warnings: str) -> None:
        self._warnings += warnings


def _mergeable(folder: str) -> str | None:
    """The type of an adapter that can become part of its base model's weights; None for any other."""
    from finetuning.export.inputs import read_adapter
    from finetuning.export.merge.with_peft import check_mergeable

    try:
        adapter = read_adapter(folder)
        check_mergeable(adapter)
    except FinetuningError:
        return None
    return adapter.peft_type


def next_commands(artifact: FinalModel) -> list[NextCommand]:
    """What can be done with what a run made."""
    if artifact.stop_tokens is None:
        return []
    folder = shlex.quote(artifact.folder)
    try_it = NextCommand(f"generate --model {folder} --text 'Hello'", "try it")
    if artifact.kind == "adapter":
        kind = _mergeable(artifact.folder)
        if kind is None:
            return [try_it]
        merged = shlex.quote(f"{artifact.folder}-merged")
        base, what = shlex.quote(artifact.base or "BASE"), "one model of both"
        if quantization_method(artifact.base or "") == "gptq":
            # Its packed weights take no merging, and another base has another fingerprint.
            base, what = "--force UNQUANTISED_BASE", "one model of it and the base before GPTQ"
        serve = NextCommand(f"create_vllm_compatible_adapter {folder}", "serve the adapter with vLLM")
        merge = NextCommand(f"merge_adapter {base} {folder} {merged}", what)
        return [try_it, merge, *([serve] if kind == "LORA" else [])]
    return [
        try_it,
        NextCommand(f"vllm serve {folder}", "serve it with vLLM"),
        NextCommand(f"lm_eval --model hf --model_args pretrained={folder} --tasks arc_easy", "evaluate it"),
    ]
