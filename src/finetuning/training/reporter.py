"""What a run reports: to the terminal, to trackers, to telemetry, and into its record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.redaction import redact_text
from finetuning.config.sections.experiment import Experiment
from finetuning.config.validation.validate import read_controllers
from finetuning.distributed import ProcessTopology
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

    from finetuning.callbacks.checkpoint_upload import CheckpointUploader
    from finetuning.callbacks.controller.callback import ControllerSet
    from finetuning.callbacks.loss_guard import NoSignalCallback
    from finetuning.data.prepared import PreparedData
    from finetuning.model.tokenizer import LoadedTokenizer
    from finetuning.tracking.settings import TrackingPlan
    from finetuning.tracking.tracker import TrackerGroup
    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.training.final_model import FinalModel
    from finetuning.training.output_dir import RunRecord, RunResult
    from finetuning.training.resume.config_changes import ResumeTerms
    from finetuning.training.resume.find import ResumePoint
    from finetuning.training.setup import LoadedModel
    from finetuning.training.signals import StopOnSignal

logger = logging.getLogger("finetuning")

_NUM_PREVIEW_ROWS = 10


class RunReporter:
    """Reports the steps of a run as they are completed. Only the main process prints, writes and tracks.

    Args:
        report_error: called with the reason when this process is about to end although its main thread cannot.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: str,
        topology: ProcessTopology,
        tracking: TrackingPlan,
        *,
        report_error: Callable[[str], object] = logger.error,
    ):
        self._experiment = experiment
        self._report_error = report_error
        self._method = method
        self._topology = topology
        self._output_dir = Path(experiment.training_args.output_dir)
        self._started = time.monotonic()
        self._console = open_console(is_main=topology.is_main)
        self._summary = [SummaryLine("model", experiment.run_conf.model), SummaryLine("output", str(self._output_dir))]
        self._warnings: list[str] = []
        self._results: list[tuple[str, str]] = []
        """Label and value of what is known at the end only."""
        self._mlflow_ui = tracking.ui_command
        self._tracker_set = TrackerSet(experiment, method, tracking, is_main=topology.is_main)
        self._trackers: TrackerGroup | None = None
        self._telemetry = TelemetrySession(experiment, method, topology)
        self._controllers = ControllerCallbacks(experiment)
        self._uploader: CheckpointUploader | None = None
        self._trainer: Any = None
        self._stop: StopOnSignal | None = None
        self._final: FinalModel | None = None
        self._report: Path | None = None

    def run_started(self, resume: ResumePoint) -> None:
        """A new run starts, or resumes from a checkpoint. Telemetry and tracking start with it."""
        self._telemetry.begin(resume)
        self._warn(*resume.notes)
        if resume.checkpoint:
            self._add_line("resumed from", str(resume.checkpoint))
        self._tracker_set.start(resumed=resume.checkpoint is not None)
        self._tracker_set.log_tags(self._telemetry.tags())
        self._add_line("tracking", str(self._tracker_set))
        self._print_stage("Preparing data")

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return a context that measures a stage of the pipeline."""
        return self._telemetry.stage(name)

    def tokenizer_loaded(self, tokenizer: LoadedTokenizer) -> None:
        self._add_line("tokenizer", str(tokenizer))
        self._warn(*tokenizer.warnings)

    def data_prepared(self, data: PreparedData) -> None:
        """Write the row statistics and the preview into the output directory."""
        self._add_line("prepared rows", data.origin)
        self._telemetry.data_prepared(data.statistics.report())
        for line in data.statistics.lines():
            label, _, value = line.partition(": ")
            is_split = value and not line.startswith(" ")
            self._add_line(f"{label} rows" if is_split else "", value if is_split else line.strip())
        if self._topology.is_main:
            from finetuning.data.preview import to_text

            data.statistics.write(self._output_dir)
            preview = redact_text(to_text(data.preview[:_NUM_PREVIEW_ROWS]))
            (self._output_dir / PREVIEW_NAME).write_text(preview, encoding="utf-8")
            files = [self._output_dir / name for name in (PREVIEW_NAME, "data_report.json")]
            self._tracker_set.log_data(data, files)

    def planned(self, plan: Plan, arguments: TrainingArguments) -> None:
        """The plan is complete, and the process group exists."""
        self._telemetry.connect(arguments)
        self._telemetry.planned(plan)
        if plan.steps is not None and plan.steps.warning:
            self._warn(plan.steps.warning)
        state = arguments.distributed_state
        if self._topology.sharded_by == "fsdp" and state is not None and state.distributed_type == "MULTI_CPU":
            self._warn(
                "FSDP shards nothing on a CPU: accelerate trains as under ddp, with the whole model in each process"
            )
        self._summary += [SummaryLine(decision.name, decision.value, decision.reason) for decision in plan.decisions]
        self._print_stage("Loading the model")

    def model_loaded(
        self, loaded: LoadedModel, plan: Plan, data: PreparedData, resume: ResumePoint, resume_terms: ResumeTerms
    ) -> dict[str, object]:
        """Add what is trained to the summary. Return the inputs of the run for its record."""
        from finetuning.training.preflight import check_positions, compute_precision, describe_router_loss

        for note in resume_terms.notes:
            self._add_line("resumed with", note)
        if warnings := check_positions(loaded.model, self._experiment, data):
            self._add_line("longest row", "exceeds the model's context length")
            self._warn(*warnings)
        self._add_line("precision", *compute_precision(self._experiment, loaded.model))
        if (router_loss := describe_router_loss(self._experiment, loaded.model)) is not None:
            self._add_line("router loss", *router_loss)
        for note in (*loaded.notes, f"rows in a batch: {loaded.layout}"):
            label, _, value = note.partition(": ") if ": " in note else ("", "", note)
            self._add_line(label, value)
        if data.rows is not None and hasattr(self._experiment, "sft_args"):
            from finetuning.data.statistics import padding_stats

            rows: Any = data.train
            max_length = self._experiment.sft_args.max_seq_length  # pyright: ignore[reportAttributeAccessIssue]
            self._add_line("tokens", str(padding_stats(rows, max_length, plan.batch.per_device)))
        return {
            "plan": plan.as_dict(),
            "data": _data_record(data),
            "model": {
                "name": self._experiment.run_conf.model,
                "fingerprint": str(loaded.fingerprint) if loaded.fingerprint else None,
                "notes": list(loaded.notes),
                "layout": str(loaded.layout),
            },
            "resumed_from": str(resume.checkpoint) if resume.checkpoint else None,
        }

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks for the trainer.

        Raises:
            ConfigError: a controller cannot be built, or no checkpoint can be uploaded to the configured address.
        """
        from finetuning.report.terminal import progress_tracker
        from finetuning.tracking.callback import LogLastStep, TrackerCallback
        from finetuning.tracking.tracker import LossLog, MetricsLog, TrackerGroup

        trackers = [progress_tracker(self._console)]
        if self._topology.is_main:
            folder, tracking = Path(self._experiment.logging_dir or self._output_dir), self._experiment.tracking
            loss_log = LossLog(folder, tracking.training_logs_filename) if tracking else LossLog(folder)
            trackers += [loss_log, MetricsLog(self._output_dir)]
            trackers += self._tracker_set.trackers()
        self._trackers = TrackerGroup(trackers)
        return [
            *self._upload_callbacks(),
            # Telemetry first: what trackers do at the end of a step must not count as part of the step.
            *self._telemetry.callbacks(self._log_telemetry),
            TrackerCallback(self._trackers, count_tokens=lambda: self._trainer.all_tokens_seen()),
            *self._tracker_set.callbacks(),
            # Controllers last: a step that they stop at has been logged.
            *self._controllers.callbacks(),
            LogLastStep(),
        ]

    def trainer_built(self, trainer: TrainerMixin, stop: StopOnSignal) -> None:
        """Print the start summary, and let telemetry measure the trainer."""
        from transformers.trainer_callback import PrinterCallback

        self._trainer = trainer
        self._stop = stop
        self._telemetry.watch(trainer)
        trainer.remove_callback(PrinterCallback)
        if trainer.mixin_summary is not None:
            self._add_line("trainer", trainer.mixin_summary)
        print_start(self._console, f"finetuning {self._method}", self._redacted_summary())
        for warning in self._warnings:
            print_warning(self._console, warning)

    def watch_processes(self, record: RunRecord) -> AbstractContextManager[None]:
        """Return a context in which a process of a distributed run that hangs is named, and the job ended."""
        if not self._topology.is_distributed:
            return nullcontext()
        from finetuning.training.heartbeat import watch_heartbeats

        def end(reason: str) -> None:
            self._report_error(reason)
            record.finish("failed", error=reason)

        return watch_heartbeats(self._trainer, self._output_dir, self._experiment.run_conf.name_hung_after, end)

    def training_ended(self, data: PreparedData, plan: Plan) -> dict[str, object]:
        """Return the memory usage, the final row statistics and the check of the reference. Collective."""
        from finetuning.training.memory_check import measure_memory, memory_summary

        usage = measure_memory(self._trainer, plan.memory)
        for text in (memory_summary(usage), *usage["oom_retries"]):
            self._results.append(("memory", text))
        reference: str | None = getattr(self._trainer, "reference_summary", None)
        if reference is not None:
            self._results.append(("reference", reference))
        return {"memory": usage, "data": _data_record(data), "reference": reference}

    def model_saved(self, final: FinalModel) -> None:
        """The final model is saved and verified."""
        self._final = final
        folder = Path(final.folder)
        self._controllers.model_saved(self._trainer, folder)
        self._tracker_set.log_model(folder)
        if self._uploader:
            self._uploader.add_last(folder)

    def run_ended(self, error: BaseException | None) -> dict[str, object]:
        """Wait for uploads, end telemetry and trackers, and return what belongs into the record."""
        record = self._finish_uploads()
        telemetry = self._telemetry.end(error, self._log_telemetry)
        if self._trackers:
            # Before the record is written, which lists the trackers that failed at their end.
            self._trackers.close()
        if telemetry is not None:
            record["telemetry"] = telemetry
        return record | {
            "summary": [[line.label, line.value, line.reason] for line in self._redacted_summary()],
            "warnings": [*self._warnings, *self._controllers.warnings()],
            "controller_actions": self._controllers.actions(),
            "trackers": self._tracker_set.identities() if self._topology.is_main else {},
            "tracker_errors": (dict(self._trackers.failures) if self._trackers else {}) | self._tracker_set.errors,
        }

    def close(self, status: str) -> None:
        """Write the report and close the trackers; called once, after the record was written."""
        extracts: list[Path] = []
        if self._topology.is_main and self._trainer is not None:
            from finetuning.report.html import write_extracts_or_warn, write_report_or_warn

            self._report = write_report_or_warn(self._output_dir)
            extracts = write_extracts_or_warn(self._output_dir)
        files = [self._output_dir / RECORD_NAME, *([self._report] if self._report else []), *extracts]
        self._tracker_set.close(status, files)

    def print_result(self, result: RunResult) -> None:
        """Print what was created, where, and what to do with it."""
        if self._final is None:
            self._console.print(f"{self._output_dir}: {result.status}. Nothing was done.", markup=False)
            return
        from finetuning.training.final_model import next_commands

        final = self._final
        print_end(
            self._console,
            RunSummary(
                headline=f"Completed after {result.steps:,} steps",
                good=True,
                outputs=[
                    OutputFile(final.kind, Path(final.folder)),
                    *([OutputFile("report", self._report)] if self._report else []),
                    OutputFile("record", self._output_dir / RECORD_NAME),
                ],
                losses=result.losses,
                training_s=result.training_s,
                total_s=time.monotonic() - self._started,
                facts=[("controller", text) for text in self._controllers.actions()]
                + self._results
                + [("checked", "; ".join(final.checks))]
                + ([("stops at", final.stop_tokens)] if final.stop_tokens else [])
                + self._tracker_set.addresses(),
                commands=[*next_commands(final), *self._mlflow_command()],
            ),
        )

    def release_trainer(self) -> None:
        """Free the memory of the trainer and its model, to load a model again."""
        import gc

        import torch

        self._trainer = self._trackers = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _mlflow_command(self) -> list[NextCommand]:
        return [NextCommand(self._mlflow_ui, "show the run in MLflow's pages")] if self._mlflow_ui else []

    def pushed(self, text: str) -> None:
        """The final model was pushed to the Hub, or why not."""
        self._results.append(("hub", text))

    def upload(self, folder: Path) -> dict[str, object]:
        """Upload a final model that an earlier job saved. Return the outcome for the record."""
        self._upload_callbacks()
        if self._uploader:
            self._uploader.add_last(folder)
        return self._finish_uploads()

    def _upload_callbacks(self) -> list[TrainerCallback]:
        address = self._experiment.run_conf.copy_checkpoints_to
        if address is not None:
            from finetuning.callbacks.checkpoint_upload import make_uploader

            self._uploader = make_uploader(address, self._topology.is_main)
        return [self._uploader] if self._uploader else []

    def _finish_uploads(self) -> dict[str, object]:
        uploader, stop = self._uploader, self._stop
        if uploader is None:
            return {}
        from finetuning.callbacks.checkpoint_upload import wait_for_uploads

        with wait_for_uploads(uploader, lambda: stop is not None and bool(stop.received)):
            pass
        self._results.append(("uploaded", uploader.summary()))
        return {"uploaded_checkpoints": uploader.uploaded, "upload_errors": uploader.errors}

    def _log_telemetry(self, values: Mapping[str, float], step: int) -> None:
        if self._trackers:
            self._trackers.call("log_telemetry", values, step)

    def _add_line(self, label: str, value: str, reason: str = "") -> None:
        self._summary.append(SummaryLine(label, value, reason))

    def _redacted_summary(self) -> list[SummaryLine]:
        # Before they are printed: a secret that is wrapped in a table would not be recognized.
        return [SummaryLine(line.label, redact_text(line.value), redact_text(line.reason)) for line in self._summary]

    def _warn(self, *warnings: str) -> None:
        self._warnings += [redact_text(warning) for warning in warnings]

    def _print_stage(self, text: str) -> None:
        self._console.print(f"{text} ...", style="dim", markup=False)


def _data_record(data: PreparedData) -> dict[str, object]:
    """Return the rows for the record, as far as they are known at this point of a stream."""
    from finetuning.data.preview import shared_system_prompt

    return {
        "fingerprint": data.fingerprint.digest,
        "rows": data.rows,
        "statistics": data.statistics.report(),
        "system_prompt": shared_system_prompt(data.preview),
    }


class ControllerCallbacks:
    """The trainer controller and the loss guard of a run."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._controllers: ControllerSet | None = None
        self._no_signal: NoSignalCallback | None = None

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks of the controllers and the guard that are configured.

        Raises:
            ConfigError: a controller cannot be built.
        """
        callbacks: list[TrainerCallback] = []
        section = read_controllers(self._experiment.trainer_controller)
        if section is not None and section.controllers:
            from finetuning.callbacks.controller.callback import controller_callback, make_controllers

            self._controllers = make_controllers(section)
            callbacks.append(controller_callback(self._controllers))
        if self._experiment.guard.enabled:
            from finetuning.callbacks.loss_guard import LossGuardCallback, NoSignalCallback

            self._no_signal = NoSignalCallback()
            callbacks += [LossGuardCallback(self._experiment.guard), self._no_signal]
        return callbacks

    def warnings(self) -> list[str]:
        """Return the warnings that the guard gave."""
        return list(self._no_signal.warnings.values()) if self._no_signal else []

    def model_saved(self, trainer: Trainer, folder: Path) -> None:
        """Trigger the last `on_save`: the final model is saved. Only the main process calls this."""
        if self._controllers is None:
            return
        from finetuning.callbacks.controller.metrics import Event

        extra = {"path": str(folder), "is_final": True}
        event = Event("on_save", trainer.args, trainer.state, trainer.control, extra)
        self._controllers.handle(event, on_all_processes=False)

    def actions(self) -> list[str]:
        """Return a line per controller that acted: its first action, and how often it acted."""
        by_controller: dict[str, dict[tuple[int, str], list[str]]] = {}
        for action in self._controllers.actions if self._controllers else ():
            times = by_controller.setdefault(action.controller, {})
            times.setdefault((action.step, action.event), []).append(action.action)
        lines: list[str] = []
        for controller, times in by_controller.items():
            (step, event), names = next(iter(times.items()))
            more = f", and {len(times) - 1} more times" if len(times) > 1 else ""
            lines.append(f'step {step}: controller "{controller}" at {event}: {", ".join(names)}{more}')
        return lines
