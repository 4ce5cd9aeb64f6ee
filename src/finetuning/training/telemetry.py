"""The telemetry of a run: started with it, measuring its stages and its training, ended with it."""

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
from finetuning.distributed import ProcessTopology, announce_wait
from finetuning.plan.plan import Plan
from finetuning.training.output_dir import installed_versions
from finetuning.training.resume.find import ResumePoint

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback, TrainingArguments

    from finetuning.data.statistics import SplitReport
    from finetuning.telemetry.config import ProcessTotals, TrainingConfig
    from finetuning.telemetry.flops import FlopsCount
    from finetuning.telemetry.session import TelemetryJob
    from finetuning.telemetry.telemetry import Telemetry
    from finetuning.trainer.mixin import TrainerMixin

LogValues = Callable[[Mapping[str, float], int], None]
"""Called with values by name, and the step."""
_METHODS_WITH_FLOPS = ("sft",)


class TelemetrySession:
    """Starts and ends telemetry, and connects it to the trainer. Does and imports nothing if telemetry is off.

    The main process starts the job. The other processes join once the process group exists, and share its trace.
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
        self._device: torch.device | None = None
        self._trainer: Any = None
        self._tokens_per_row: float | None = None

    def begin(self, resume: ResumePoint) -> None:
        """Start the job, on the main process."""
        if not self._section.enabled or not self._topology.is_main:
            return
        from finetuning.telemetry.session import begin_job, is_disabled

        if is_disabled():
            return
        is_auto = str(self._experiment.run_conf.resume_from_checkpoint).lower() == "auto"
        resumed = resume.checkpoint is not None or is_auto
        self._start(begin_job(self._section, self._output_dir, resumed=resumed, checkpoint=resume.checkpoint))

    def tags(self) -> dict[str, str]:
        """Return the names of the session and the job for the trackers; none without telemetry."""
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
        """Measure a stage of the pipeline as a span."""
        if self._telemetry is None:
            yield
            return
        with self._telemetry.standard_span(name):
            yield

    def data_prepared(self, report: Sequence[SplitReport]) -> None:
        """Note how long the training rows are; of a stream that is not known."""
        for split in report:
            if split["split"] == "training" and split["kept"]:
                self._tokens_per_row = split["tokens"] / split["kept"]

    def connect(self, arguments: TrainingArguments) -> None:
        """Create the process group, and let the other processes join the job."""
        with self.stage("distributed_code_initialization"):
            self._device = arguments.device
        if not self._section.enabled or not self._topology.is_distributed:
            return
        from accelerate.utils import broadcast_object_list

        with announce_wait("the other processes of the job, which prepare their data"):
            [job] = broadcast_object_list([self._shared_job()])
        if job is not None and self._telemetry is None:
            self._start(job)

    def _shared_job(self) -> TelemetryJob | None:
        """Return the job for the other processes, with the main process's application span as the parent of theirs."""
        if self._telemetry is None or self._job is None:
            return None
        span = self._telemetry.active("application")
        if span is None or not span.is_exported:
            return self._job
        context = span.span_context
        return replace(self._job, traceparent=f"00-{context.trace_id:032x}-{context.span_id:016x}-01")

    def planned(self, plan: Plan) -> None:
        """Pass what the metrics need to know about the training."""
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
            or perf_tag(
                dump_values(experiment),
                experiment.run_conf.model,
                versions,
                name,
                self._topology.world_size,
                self._tokens_per_row,
            ),
            global_batch_size=plan.batch.total,
            micro_batch_size=plan.batch.per_device,
            log_every_n_train_iterations=section.log_every_n_train_iterations,
            seq_length=getattr(getattr(experiment, "sft_args", None), "max_seq_length", None),
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

    def callbacks(self, log: LogValues) -> list[TrainerCallback]:
        """Return the callbacks for the trainer.

        Args:
            log: receives the values that trackers show.
        """
        if self._telemetry is None:
            return []
        from finetuning.telemetry.hf_callback import TelemetryCallback

        return [
            TelemetryCallback(
                self._telemetry,
                gather=self._gather if self._topology.is_distributed else None,
                log_metrics=log if self._topology.is_main else None,
                with_phases=True,
            )
        ]

    def watch(self, trainer: TrainerMixin) -> None:
        """Start to measure the phases of the trainer."""
        if self._telemetry is None:
            return
        from finetuning.telemetry.hf_callback import TrainerPhases

        self._trainer = trainer
        phases: Any = TrainerPhases(self._telemetry, lambda: trainer.state.global_step, self._folder)
        trainer.hooks = phases
        flops = self._telemetry.errors.attempt("counting FLOPs", lambda: self._flops(trainer))
        if flops is not None:
            trainer.enable_flop_counters()
        self._telemetry.measure_with(lambda: self._measure(flops))

    def _flops(self, trainer: TrainerMixin) -> FlopsCount | None:
        """Return the FLOPs per token of the model, where they are known and a peak to compare them with is."""
        has_peak = trainer.args.device.type == "cuda" or self._section.peak_tflops is not None
        is_counted = self._section.flops_per_token is None and self._method in _METHODS_WITH_FLOPS
        if not has_peak or not is_counted:
            return None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return None
        from finetuning.telemetry.flops import count_flops

        model: Any = trainer.model
        return count_flops(model)

    def _measure(self, flops: FlopsCount | None) -> ProcessTotals:
        from finetuning.telemetry.config import ProcessTotals
        from finetuning.telemetry.metrics import peak_memory

        trainer = self._trainer
        tokens = trainer.tokens_seen
        num_flops = None
        if flops is not None:
            loss_positions, squared_lengths = trainer.flop_counters()
            num_logits = loss_positions if getattr(trainer, "uses_logits_to_keep", False) else tokens
            num_flops = flops.total(tokens, num_logits, squared_lengths)
        return ProcessTotals(tokens, num_flops, trainer.step_loss, peak_memory(trainer.args.device))

    def _gather(self, sample: list[float]) -> Sequence[Sequence[float]]:
        import torch

        row = torch.tensor([sample], dtype=torch.float64, device=self._trainer.args.device)
        return self._trainer.accelerator.gather(row).tolist()

    def _folder(self, step: int) -> Path | None:
        return self._output_dir / f"checkpoint-{step}" if self._topology.is_main else None

    def end(self, error: BaseException | None, log: LogValues) -> dict[str, object] | None:
        """End the job's telemetry. Return what belongs into the record; None without telemetry."""
        telemetry, self._telemetry = self._telemetry, None
        job = self._job
        if telemetry is None or job is None:
            return None
        telemetry.close(error)
        if not self._topology.is_main:
            return None
        return telemetry.errors.attempt("summing up", lambda: self._summary(telemetry, job, log))

    def _summary(self, telemetry: Telemetry, job: TelemetryJob, log: LogValues) -> dict[str, object]:
        from finetuning.telemetry.goodput import try_session_goodput

        summary: dict[str, object] = {
            "job_id": job.job_id,
            "session_tag": job.session_tag,
            "perf_tag": telemetry.config.perf_tag,
            **telemetry.summary(),
        }
        goodput = try_session_goodput(telemetry.errors, self._output_dir, job.session_tag)
        if goodput is not None:
            summary["session"] = goodput.as_dict()
            badput = {f"badput_{name}_s": seconds for name, seconds in goodput.badput_s.items()}
            log({"goodput": goodput.goodput, **badput}, telemetry.progress.step)
        if telemetry.errors.messages:
            summary["faults"] = list(telemetry.errors.messages)
        return summary
