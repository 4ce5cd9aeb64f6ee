"""What the machine is doing, measured by MLflow's own monitors in the worker, and put into the spool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetuning.tracking.mlflow.queue_file import SpoolWriter, plain_metrics, read_orders

_PREFIX = "system/"


class MachineMeter:
    """Measures in a thread of its own, so that a server that does not answer leaves no hole in the curves.

    `system/…` metrics by MLflow's names; their steps count intervals since the run was first opened, and so go on
    where an earlier job has ended. The interval is MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, 10 s by default.
    """

    def __init__(self, spool: Path):
        from mlflow.environment_variables import (
            MLFLOW_SYSTEM_METRICS_NODE_ID,
            MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
        )

        self._writer = SpoolWriter(spool)
        self._interval_s = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10)
        self._node = MLFLOW_SYSTEM_METRICS_NODE_ID.get()
        self._began_ms = next((order.fields.get("time", 0) for order in read_orders(spool, 0)), 0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing more is measured once this returns."""
        self._stopping.set()
        self._thread.join()

    def _measure(self) -> None:
        monitors = _monitors()
        prefix = _PREFIX + (f"{self._node}/" if self._node else "")
        while not self._stopping.wait(self._interval_s):
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= {prefix + name: value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            step = int((time.time_ns() // 1_000_000 - self._began_ms) / (1000 * self._interval_s))
            try:
                self._writer.append("metrics", values=plain_metrics(values), step=step)
            except OSError:  # the disk is full; the training process says so
                return


def _monitors() -> list[Any]:
    """MLflow's monitors, a GPU's where its library finds one."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    made = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    kinds: tuple[Callable[[], Any], ...] = (GPUMonitor, ROCMMonitor)
    for kind in kinds:
        try:
            return [*made, kind()]
        except Exception:  # noqa: BLE001  no such GPU, no such library: each fails in a way of its own
            continue
    return made
