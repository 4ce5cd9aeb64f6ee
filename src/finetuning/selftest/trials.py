"""Trials: a few steps of the user's config, in processes of their own, and what they left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning.config.sections.experiment import Experiment
from finetuning.errors import ConfigError, GuardStopped
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS

STEPS = 4
"""Optimizer steps of a trial."""
SAVED_STEP = 2
"""The step whose checkpoint the interrupted trial resumes from."""
_POLL_SECONDS = 0.05
_FINETUNING = ("finetuning.cli.main",)
WORKER = "finetuning.cli.selftest"
"""The module whose processes do what the self-test needs inside a run."""


class TrialFailed(GuardStopped):
    """A trial ended with an exit code other than 0."""


@dataclass(frozen=True)
class Trial:
    """What a trial logged and saved."""

    folder: Path
    final: Path
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    """Before clipping, one per step."""

    @property
    def is_adapter(self) -> bool:
        return (self.final / ADAPTER_WEIGHTS).is_file()


@dataclass(frozen=True)
class TrialRunner:
    """Runs trials of one config."""

    method: str
    config: Path
    overrides: tuple[str, ...]
    """The user's own, then those that make a trial of the config."""
    folder: Path
    final_name: str
    launch: tuple[str, ...] = ()
    """Arguments of `finetuning launch`; without them a trial is a single process."""

    def run(self, name: str, *changes: str, entry: Sequence[str] = _FINETUNING) -> Trial:
        """Run a trial to its end.

        Raises:
            TrialFailed: its exit code was not 0.
        """
        process = self._start(name, changes, entry)
        self._wait(name, process)
        return self._read(name)

    def run_interrupted(self, name: str) -> Trial:
        """Kill a trial (SIGKILL) after its first checkpoint, and run it again so that it resumes.

        Raises:
            TrialFailed: the resumed trial's exit code was not 0, or the first one ended before it was killed.
        """
        process = self._start(name, ())
        log = self.folder / name / "training_logs.jsonl"
        while process.poll() is None and not self._is_past_checkpoint(name, log):
            time.sleep(_POLL_SECONDS)
        if process.poll() is not None:
            raise TrialFailed(f"trial {name} ended before it could be killed: {self._last_line(name)}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (self.folder / f"{name}.log").rename(self.folder / f"{name}-killed.log")
        self._wait(name, self._start(name, ("run_conf.resume_from_checkpoint=true",)))
        return self._read(name)

    def _is_past_checkpoint(self, name: str, log: Path) -> bool:
        """Return whether the first checkpoint is complete: a later step was logged."""
        saved = self.folder / name / f"checkpoint-{SAVED_STEP}"
        try:
            return saved.is_dir() and len(log.read_text(encoding="utf-8").splitlines()) > SAVED_STEP
        except OSError:
            return False

    def _start(self, name: str, changes: Sequence[str], entry: Sequence[str] = _FINETUNING) -> subprocess.Popen[bytes]:
        changes = [f"training_args.output_dir={json.dumps(str(self.folder / name))}", *changes]
        command = [sys.executable, "-m", *entry, *self.launch, self.method, str(self.config), *self.overrides, *changes]
        environment = {key: value for key, value in os.environ.items() if key not in _REMOVED_VARIABLES}
        with (self.folder / f"{name}.log").open("wb") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if code:
            raise TrialFailed(f"trial {name} ended with exit code {code}: {self._last_line(name)}")

    def _last_line(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["no output"])[0]

    def _read(self, name: str) -> Trial:
        folder = self.folder / name
        state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text(encoding="utf-8"))
        logged = [entry for entry in state["log_history"] if "loss" in entry]
        return Trial(
            folder,
            folder / self.final_name,
            tuple(entry["loss"] for entry in logged),
            tuple(entry["grad_norm"] for entry in logged if "grad_norm" in entry),
        )

    def remove(self, trial: Trial) -> None:
        """Delete the checkpoints of a trial that is no longer needed."""
        shutil.rmtree(trial.folder, ignore_errors=True)


# Trackers and reports of the surrounding job are not for trials; nor are the ranks of a launcher around the self-test.
_REMOVED_VARIABLES = frozenset(
    {"MLFLOW_TRACKING_URI", "CHECKPOINTS_PATH", "TERMINATION_LOG_FILE", "FINETUNING_ERROR_FILE"}
)


def trial_overrides(experiment: Experiment, world_size: int, dropouts: Mapping[str, float]) -> tuple[str, ...]:
    """Return the overrides that turn the user's config into a trial of a few steps.

    Args:
        dropouts: probabilities of dropout in the model's config. Dropout draws other numbers for other micro-batches,
            so that trials could not be compared.

    Raises:
        ConfigError: the data is streamed, or quantities of the config do not fit a short trial.
    """
    if experiment.data_conf.streaming:
        raise ConfigError("selftest: data_conf.streaming is not supported", hint="Set data_conf.streaming: false.")
    total = rows_per_step(experiment, world_size)
    values: dict[str, object] = {
        "training_args.max_steps": STEPS,
        "training_args.logging_strategy": "steps",
        "training_args.logging_steps": 1,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": SAVED_STEP,
        "training_args.save_total_limit": None,
        "training_args.warmup_steps": 0,
        "training_args.eval_strategy": "no",
        "training_args.load_best_model_at_end": False,
        "training_args.report_to": "none",
        "batchsize_conf.total_train_batch_size": total,
        "batchsize_conf.max_per_device_train_batch_size": total // world_size,
        "run_conf.resume_from_checkpoint": False,
        "run_conf.memory_check": False,
        "run_conf.max_time": None,
        "run_conf.copy_checkpoints_to": None,
        "telemetry.enabled": False,
        "tracking": None,
        "trainer_controller": None,
        "logging_dir": None,
        "save_model_dir": None,
    }
    extra = experiment.training_args.model_extra or {}
    values |= {f"training_args.{key}": value for key, value in _TRIAL_VALUES.items() if key in extra}
    values |= {f"run_conf.model_args.{key}": 0 for key, value in dropouts.items() if value}
    arguments = getattr(experiment.peft_conf, "peft_kwargs", {})
    values |= {
        f"peft_conf.peft_kwargs.{key}": 0 for key, value in arguments.items() if key.endswith("dropout") and value
    }
    return tuple(f"{key}={json.dumps(value)}" for key, value in values.items())


_TRIAL_VALUES = {"push_to_hub": False, "warmup_ratio": 0, "save_only_model": False, "eval_on_start": False}


def rows_per_step(experiment: Experiment, world_size: int) -> int:
    """Return the total batch size of a trial: 4 rows for each process, or a whole group of completions."""
    generations = int(getattr(experiment.training_args, "num_generations", 1))
    rows = 4 * world_size
    return rows if rows % generations == 0 else rows * generations


def dropouts_of(config: Mapping[str, object]) -> dict[str, float]:
    """Return the dropout probabilities of a model's config that are not 0."""
    return {
        key: float(value)
        for key, value in config.items()
        if (key.endswith("_pdrop") or "dropout" in key) and isinstance(value, (int, float)) and value
    }


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the safetensors files of a model or adapter."""
    yield from sorted(folder.glob("*.safetensors"))
