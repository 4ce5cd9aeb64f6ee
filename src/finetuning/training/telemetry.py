"""A run's telemetry, from the first step of the road to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning import __version__
from finetuning.config.sections.experiment import Experiment
from finetuning.config.yaml.dump import dump_values
from finetuning.distributed import ProcessTopology
from finetuning.plan.plan import Plan
from finetuning.training.output_dir import installed_versions
from finetuning.training.resume.find import ResumePoint

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from finetuning.telemetry.config import ProcessTotals, TrainingConfig
    from finetuning.telemetry.flops import FlopsCount
    from finetuning.telemetry.session import TelemetryJob
    from finetuning.telemetry.telemetry import Telemetry

Tell = Callable[[Mapping[str, float], int], None]
_COUNTED_METHODS = ("sft",)


class TelemetrySession:
    """Starts telemetry, tells it the stages of the road, and ends it. Switched off, it does nothing and imports
    nothing.

    The main process begins the job; the others join it once they are connected, and share its trace.
    """

    def __init__(self, experiment: Experiment, method: str, topology: ProcessTopology):
        self._experiment = experiment
        self._section = experiment.telemetry
        self._method = method
        self._topology = topology
        self._output_dir = Path(experiment.training_args.output_dir)
        self._started = time.monotonic()
        self._job: TelemetryJob | None = None
        self._telemetry: Telemetry | None = None
        self._device: Any = None
        self._trainer: Any = None

    def begin(self, resume: ResumePoint) -> None:
        """The job begins; on the main process."""
        if not self._section.enabled or not self._topology.is_main:
            return
        from finetuning.telemetry.session import begin_job, is_disabled

        if is_disabled():
            return
        wanted = str(self._experiment.run_conf.resume_from_checkpoint).lower()
        resumed = resume.checkpoint is not None or wanted == "auto"
        self._start(begin_job(self._section, self._output_dir, resumed=resumed, checkpoint=resume.checkpoint))

    def tags(self) -> dict[str, str]:
        """The names of the session and of this job, which trackers keep, too; nothing without telemetry."""
        if self._job is None:
            return {}
        return {"finetuning.session_tag": self._job.session_tag, "finetuning.job_id": self._job.job_id}

    def _start(self, job: TelemetryJob) -> None:
        from finetuning.telemetry.error_guard import TelemetryErrors
        from finetuning.telemetry.session import start_telemetry

        self._job = job
        self._telemetry = TelemetryErrors().attempt(
            "starting", lambda: start_telemetry(self._section, job, self._output_dir, self._topology)
        )
        if self._telemetry is None:
            return
        passed_ns = int((time.monotonic() - self._started) * 1e9)
        self._telemetry.on_app_start(self._telemetry.recorder.clock.now_ns() - passed_ns)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage of the road, as a span."""
        if self._telemetry is None:
            yield
            return
        with self._telemetry.standard_span(name):
            yield

    def connect(self, arguments: TrainingArguments) -> None:
        """The processes find each other; each gets its device, and the others learn which job they belong to."""
        with self.stage("distributed_code_initialization"):
            self._device = arguments.device
        if not self._section.enabled or not self._topology.is_distributed:
            return
        from accelerate.utils import broadcast_object_list

        [job] = broadcast_object_list([self._shared_job()])
        if job is not None and self._telemetry is None:
            self._start(job)

    def _shared_job(self) -> TelemetryJob | None:
        """The job as the other processes shall know it: with the main one's application as the root of theirs."""
        if self._telemetry is None or self._job is None:
            return None
        span = self._telemetry.active("application")
        if span is None or not span.is_exported:
            return self._job
        return replace(
            self._job, traceparent=f"00-{span.span_context.trace_id:032x}-{span.span_context.span_id:016x}-01"
        )

    def planned(self, plan: Plan) -> None:
        """What the metrics need to know of the training."""
        telemetry = self._telemetry
        if telemetry is None:
            return
        config = telemetry.errors.attempt("describing the training", lambda: self._config(plan))
        if config is not None:
            telemetry.set_training_config(config)

    def _config(self, plan: Plan) -> TrainingConfig:
        from finetuning.telemetry.config import TrainingConfig
        from finetuning.telemetry.metrics import device_name
        from finetuning.telemetry.session import perf_tag

        experiment, section = self._experiment, self._section
        versions = installed_versions() | {"finetuning": __version__}
        name = device_name(self._device) if self._device is not None else "unknown"
        steps = plan.steps.total if plan.steps else None
        return TrainingConfig(
            perf_tag=section.perf_tag
            or perf_tag(dump_values(experiment), experiment.run_conf.model, versions, name, self._topology.world_size),
            global_batch_size=plan.batch.total,
            micro_batch_size=plan.batch.per_device,
            log_every_n_train_iterations=section.log_every_n_train_iterations,
            seq_length=experiment.sft_args.max_seq_length if hasattr(experiment, "sft_args") else None,
            flops_per_token=section.flops_per_token,
            peak_tflops=section.peak_tflops or self._peak_tflops(name),
            train_iterations_target=steps,
            train_samples_target=steps * plan.batch.total if steps else None,
            custom_metadata=section.custom_metadata,
        )

    def _peak_tflops(self, device: str) -> float | None:
        """Return the device's peak TFLOP/s, which is known for 16-bit training only."""
        args = self._experiment.training_args
        if not (args.bf16 or args.fp16):
            return None
        from finetuning.telemetry.flops import peak_tflops

        return peak_tflops(device)

    def callbacks(self, tell: Tell) -> list[TrainerCallback]:
        """What the trainer is to call; `tell` is given the figures that people follow."""
        if self._telemetry is None:
            return []
        from finetuning.telemetry.hf_callback import TelemetryCallback

        return [
            TelemetryCallback(
                self._telemetry,
                gather=self._gather if self._topology.is_distributed else None,
                log_metrics=tell if self._topology.is_main else None,
                with_phases=True,
            )
        ]

    def watch(self, trainer: Trainer) -> None:
        """The trainer is built: it tells its phases from here on."""
        if self._telemetry is None:
            return
        from finetuning.telemetry.hf_callback import TrainerPhases

        self._trainer = trainer
        trainer.phases = TrainerPhases(self._telemetry, lambda: trainer.state.global_step, self._folder)
        flops = self._telemetry.errors.attempt("counting FLOPs", lambda: self._flops(trainer))
        if flops is not None:
            trainer.count_work()
        self._telemetry.measure_with(lambda: self._measured(flops))

    def _flops(self, trainer: Trainer) -> FlopsCount | None:
        """What the model's training costs, where that is worth knowing and known."""
        wanted = trainer.args.device.type == "cuda" or self._section.peak_tflops is not None
        if self._section.flops_per_token is not None or self._method not in _COUNTED_METHODS or not wanted:
            return None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return None
        from finetuning.telemetry.flops import count_flops

        return count_flops(trainer.model)

    def _measured(self, flops: FlopsCount | None) -> ProcessTotals:
        from finetuning.telemetry.config import ProcessTotals
        from finetuning.telemetry.metrics import peak_memory

        trainer = self._trainer
        tokens = trainer.tokens_seen
        done = None
        if flops is not None:
            scored, squares = trainer.work_done()
            done = flops.total(tokens, scored if getattr(trainer, "selects_logits", False) else tokens, squares)
        return ProcessTotals(tokens, done, trainer.step_loss, peak_memory(trainer.args.device))

    def _gather(self, sample: list[float]) -> Sequence[Sequence[float]]:
        import torch

        row = torch.tensor([sample], dtype=torch.float64, device=self._trainer.args.device)
        return self._trainer.accelerator.gather(row).tolist()

    def _folder(self, step: int) -> Path | None:
        return self._output_dir / f"checkpoint-{step}" if self._topology.is_main else None

    def end(self, error: BaseException | None, tell: Tell) -> dict[str, Any] | None:
        """Ends the job's telemetry, and gives what belongs into the record; None without telemetry."""
        telemetry, self._telemetry = self._telemetry, None
        if telemetry is None or self._job is None:
            return None
        telemetry.close(error)
        if not self._topology.is_main:
            return None
        return telemetry.errors.attempt("summing up", lambda: self._told(telemetry, self._job, tell))

    def _told(self, telemetry: Telemetry, job: TelemetryJob, tell: Tell) -> dict[str, Any]:
        """What belongs into the record of a job whose telemetry has ended."""
        from finetuning.telemetry.goodput import try_session_goodput

        told: dict[str, Any] = {
            "job_id": job.job_id,
            "session_tag": job.session_tag,
            "perf_tag": telemetry.config.perf_tag,
            **telemetry.summary(),
        }
        goodput = try_session_goodput(telemetry.errors, self._output_dir, job.session_tag)
        if goodput is not None:
            told["session"] = goodput.as_dict()
            badput = {f"badput_{name}_s": seconds for name, seconds in goodput.badput_s.items()}
            tell({"goodput": goodput.goodput, **badput}, telemetry.progress.step)
        if telemetry.errors.messages:
            told["faults"] = list(telemetry.errors.messages)
        return told
