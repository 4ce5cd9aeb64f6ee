"""What telemetry costs a step, and whether that grows with the number of steps.

    python benchmarks/telemetry.py [--steps 10000] [--every 50] [--micro-batches 2] [--rounds 5]

A step tells what the engine's trainer tells: that it begins, its parts (data loading, forward and backward for each
micro-batch, optimizer, zeroing), and that it ends; every N steps the metrics are told. The steps compute nothing, so
that all time is telemetry's. Prints one line of JSON for each setting: microseconds a step, the median of the rounds,
over the first 100 steps, over 1000 around the middle and over the last 1000; bytes on disk a step; and, apart, the
time of one update of the metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from finetuning.telemetry import names
from finetuning.telemetry.config import JobIdentity, ProcessTotals, TrainingConfig
from finetuning.telemetry.session import open_telemetry
from finetuning.telemetry.telemetry import Telemetry

SETTINGS = {
    "counting, nothing written": None,
    "default": "default",
    "a span a step": "per_step",
    "all spans": "all",
}


def step(telemetry: Telemetry, micro_batches: int) -> None:
    """One step, as a trainer tells it."""
    telemetry.on_training_single_iteration_start()
    telemetry.begin_phase(names.DATA_LOADING)
    telemetry.end_phase(names.DATA_LOADING)
    for _ in range(micro_batches):
        for part in (names.MODEL_FORWARD, names.MODEL_BACKWARD):
            telemetry.begin_phase(part)
            telemetry.end_phase(part)
    for part in (names.OPTIMIZER_UPDATE, names.ZERO_GRAD):
        telemetry.begin_phase(part)
        telemetry.end_phase(part)
    telemetry.on_training_single_iteration_end()


def measure(preset: str | None, options: argparse.Namespace, folder: Path) -> tuple[list[float], float, float]:
    """Seconds of each step, bytes a step, and seconds of one update."""
    exports = names.preset_filter(preset or "default")
    telemetry = open_telemetry(JobIdentity("benchmark", "job", "session"), folder if preset else None, exports)
    telemetry.on_app_start()
    telemetry.set_training_config(
        TrainingConfig(
            global_batch_size=8, log_every_n_train_iterations=options.every, flops_per_token=6e9, peak_tflops=989.4
        )
    )
    telemetry.measure_with(lambda: ProcessTotals(tokens=4096.0, loss=1.0))
    telemetry.on_train_start()
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        step(telemetry, options.micro_batches)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    telemetry.update_training_metrics()
    update = time.perf_counter() - began
    telemetry.on_train_end()
    telemetry.close()
    size = sum(path.stat().st_size for path in folder.rglob("*.jsonl")) if folder.exists() else 0
    return seconds, size / options.steps, update


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=50, help="steps between two updates of the metrics")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for title, preset in SETTINGS.items():
        rounds = []
        with tempfile.TemporaryDirectory() as folder:
            for number in range(options.rounds):
                rounds.append(measure(preset, options, Path(folder) / str(number)))
        middle = options.steps // 2
        windows = {
            "first_100": slice(0, 100),
            "middle_1000": slice(middle - 500, middle + 500),
            "last_1000": slice(options.steps - 1000, options.steps),
            "all": slice(0, options.steps),
        }
        told = {
            f"{name}_us": round(statistics.median(statistics.fmean(seconds[part]) for seconds, _, _ in rounds) * 1e6, 1)
            for name, part in windows.items()
        }
        told["bytes_a_step"] = round(statistics.median(size for _, size, _ in rounds))
        told["one_update_us"] = round(statistics.median(update for _, _, update in rounds) * 1e6)
        print(json.dumps({"setting": title, **told}))


if __name__ == "__main__":
    main()
