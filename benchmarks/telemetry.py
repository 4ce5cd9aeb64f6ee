"""What telemetry costs per step, and whether that grows with the number of steps.

    python benchmarks/telemetry.py [--steps 5000] [--every 50 10 1] [--micro-batches 2] [--rounds 3]

The steps compute nothing, so that all time is telemetry's. Prints one line of JSON for each setting: microseconds of
CPU time per step, the median of the rounds, over the first 100 steps, over 1000 around the middle and over the last
1000; and bytes on disk per step.

The first settings report the phases of a step, as the engine's trainer does. The others run one loop of One Logger's
context managers, without phases, on `finetuning.telemetry.one_logger` and on nv-one-logger if that is installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetuning.telemetry import (
    JobIdentity,
    ProcessTotals,
    Telemetry,
    TrainingConfig,
    names,
    one_logger,
    open_telemetry,
)
from finetuning.telemetry.spans import preset_filter

PRESETS = {
    "counted, nothing written": None,
    "default": "default",
    "a span per step": "per_step",
    "all spans": "all",
}
NV_MODULES = (
    "api.config",
    "exporter.file_exporter",
    "training_telemetry.api.callbacks",
    "training_telemetry.api.config",
    "training_telemetry.api.context",
    "training_telemetry.api.training_telemetry_provider",
)
Measured = tuple[list[float], float]
"""CPU seconds of each step, and bytes per step."""


def step(telemetry: Telemetry, micro_batches: int) -> None:
    """Report one step, as a trainer does."""
    telemetry.on_training_single_iteration_start()
    for phase in (
        names.DATA_LOADING,
        *[names.MODEL_FORWARD, names.MODEL_BACKWARD] * micro_batches,
        names.OPTIMIZER_UPDATE,
        names.ZERO_GRAD,
    ):
        telemetry.begin_phase(phase)
        telemetry.end_phase(phase)
    telemetry.on_training_single_iteration_end()


def timed(run: Callable[[], object], steps: int) -> list[float]:
    """Return the seconds of CPU time that each call took, in this thread: other processes do not add to it."""
    seconds = []
    for _ in range(steps):
        started = time.thread_time()
        run()
        seconds.append(time.thread_time() - started)
    return seconds


def measure_preset(preset: str | None, every: int, options: argparse.Namespace, folder: Path) -> Measured:
    """Measure steps with phases."""
    span_filter = preset_filter(preset or "default")
    telemetry = open_telemetry(JobIdentity("benchmark", "job", "session"), folder if preset else None, span_filter)
    telemetry.on_app_start()
    telemetry.set_training_config(
        TrainingConfig(global_batch_size=8, log_every_n_train_iterations=every, flops_per_token=6e9, peak_tflops=989.4)
    )
    telemetry.measure_with(lambda: ProcessTotals(tokens=4096.0, loss=1.0))
    telemetry.on_train_start()
    seconds = timed(lambda: step(telemetry, options.micro_batches), options.steps)
    telemetry.on_train_end()
    telemetry.close()
    return seconds, size_of(folder) / options.steps


def measure_api(api: Any, every: int, options: argparse.Namespace, folder: Path) -> Measured:
    """Measure steps of One Logger's context manager."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    provider = api.TrainingTelemetryProvider.instance()
    provider.with_base_config(
        api.OneLoggerConfig(application_name="benchmark", session_tag_or_fn="session", world_size_or_fn=1)
    ).with_exporter(api.FileExporter(Path("telemetry.json"))).configure_provider()
    api.on_app_start()
    provider.set_training_telemetry_config(
        api.TrainingTelemetryConfig(
            perf_tag_or_fn="p",
            global_batch_size_or_fn=8,
            log_every_n_train_iterations=every,
            is_log_throughput_enabled_or_fn=True,
            flops_per_sample_or_fn=10**9,
            train_iterations_target_or_fn=options.steps,
            train_samples_target_or_fn=8 * options.steps,
        )
    )
    api.on_train_start(train_iterations_start=0)

    def iteration() -> None:
        with api.training_iteration():
            pass

    seconds = timed(iteration, options.steps)
    api.on_train_end()
    api.on_app_end()
    return seconds, size_of(folder) / options.steps


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.json*")) if folder.exists() else 0


def nv_one_logger() -> Any:
    """Return the names of nv-one-logger in one place, with nothing configured; None if it is not installed."""
    try:
        from nv_one_logger.core.internal.singleton import SingletonMeta
    except ImportError:
        return None
    SingletonMeta._instances.clear()
    values: dict[str, Any] = {}
    for module in NV_MODULES:
        values |= vars(importlib.import_module(f"nv_one_logger.{module}"))
    return argparse.Namespace(**values)


def report(setting: str, every: int, options: argparse.Namespace, measure: Callable[[Path], Measured]) -> None:
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        rounds = [measure(Path(folder, str(number))) for number in range(options.rounds)]
        os.chdir("/")
    middle = options.steps // 2
    windows = {
        "first_100": slice(0, 100),
        "middle_1000": slice(middle - 500, middle + 500),
        "last_1000": slice(options.steps - 1000, options.steps),
        "all": slice(0, options.steps),
    }
    values = {
        f"{name}_us": round(statistics.median(statistics.fmean(seconds[part]) for seconds, _ in rounds) * 1e6, 1)
        for name, part in windows.items()
    }
    values["bytes_per_step"] = round(statistics.median(size for _, size in rounds))
    print(json.dumps({"setting": setting, "every": every, **values}), flush=True)


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--every", type=int, nargs="+", default=[50, 10, 1], help="steps between two updates")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for every in options.every:
        for title, preset in PRESETS.items():
            report(title, every, options, lambda folder, p=preset, n=every: measure_preset(p, n, options, folder))

        def ours(folder: Path, every: int = every) -> Measured:
            one_logger.TrainingTelemetryProvider.reset()
            return measure_api(one_logger, every, options, folder)

        report("finetuning.telemetry.one_logger", every, options, ours)
        if nv_one_logger() is None:
            print("nv-one-logger is not installed", flush=True)
            continue
        report(
            "nv-one-logger", every, options, lambda folder, n=every: measure_api(nv_one_logger(), n, options, folder)
        )


if __name__ == "__main__":
    main()
