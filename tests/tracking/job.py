"""A training job's main process without the training: tracks, logs, ends, and writes what it saw as JSON."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from finetuning.config.sections.tracking import TrackingConfig
from finetuning.tracking.mlflow.tracker import start_mlflow
from finetuning.tracking.settings import TrackingOptions, resolve_tracking


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--first-step", type=int, default=0)
    parser.add_argument("--resumed", action="store_true")
    parser.add_argument("--status", default="FINISHED")
    parser.add_argument("--wait-s", type=float, help="how long the end waits for the server, as a run by default")
    parser.add_argument("--pause-at", type=int)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--artifacts", default=None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tracking", type=json.loads, default={}, help="keys of `tracking`")
    options = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    section = TrackingConfig(**options.tracking)
    environ = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    plan = resolve_tracking(TrackingOptions(options.uri, "faults", options.artifacts), section, environ)
    tracker = start_mlflow(plan, options.output, job="sft", resumed=options.resumed, tags={"version.test": "1"})
    assert tracker is not None
    tracker.queue.append("params", values={"training_args.learning_rate": "5e-05"})
    calls = []
    for step in range(options.first_step, options.first_step + options.steps):
        began = time.perf_counter()
        tracker.queue.append("metrics", values={"loss": 1.0 / (step + 1), "learning_rate": 5e-5}, step=step)
        calls.append(time.perf_counter() - began)
        if step == options.pause_at:
            (options.output / "paused").touch()
            while (options.output / "paused").exists():
                time.sleep(0.02)
        if step == options.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)
    if options.model:
        tracker.log_model_files(options.model)
    began = time.perf_counter()
    end = tracker.finish(options.status, wait_s=options.wait_s)
    report = {
        "slowest_call_s": max(calls),
        "median_call_s": sorted(calls)[len(calls) // 2],
        "finish_s": time.perf_counter() - began,
        "delivered": end.error is None,
        "run_id": end.run_id,
        "run_name": end.run_name,
        "url": end.url,
        "reason": end.error,
        "imported_mlflow": "mlflow" in sys.modules,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
