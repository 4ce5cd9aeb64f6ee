"""Telemetry of a training job: spans, events and metrics on OpenTelemetry, with the names of NVIDIA's One Logger.

A library for any training loop. It imports neither torch nor the rest of the engine.

    from finetuning.telemetry import JobIdentity, TrainingConfig, open_telemetry

`finetuning.telemetry.one_logger` has the API of One Logger itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetuning.telemetry.config import JobIdentity, ProcessTotals, TrainingConfig
    from finetuning.telemetry.error_guard import TelemetryErrors, TelemetryUsageError
    from finetuning.telemetry.exporters import OtlpExport
    from finetuning.telemetry.goodput import Goodput, session_goodput
    from finetuning.telemetry.hf_callback import TelemetryCallback, TrainerPhases
    from finetuning.telemetry.session import open_telemetry
    from finetuning.telemetry.spans import export_all, export_all_but, export_only
    from finetuning.telemetry.telemetry import Telemetry

__all__ = [
    "Goodput",
    "JobIdentity",
    "OtlpExport",
    "ProcessTotals",
    "Telemetry",
    "TelemetryCallback",
    "TelemetryErrors",
    "TelemetryUsageError",
    "TrainerPhases",
    "TrainingConfig",
    "export_all",
    "export_all_but",
    "export_only",
    "open_telemetry",
    "session_goodput",
]

# Imported when it is asked for: the callbacks need transformers, and a module of names should stay light.
_MODULES = {
    "config": ("JobIdentity", "ProcessTotals", "TrainingConfig"),
    "error_guard": ("TelemetryErrors", "TelemetryUsageError"),
    "exporters": ("OtlpExport",),
    "goodput": ("Goodput", "session_goodput"),
    "hf_callback": ("TelemetryCallback", "TrainerPhases"),
    "session": ("open_telemetry",),
    "spans": ("export_all", "export_all_but", "export_only"),
    "telemetry": ("Telemetry",),
}


def __getattr__(name: str) -> object:
    """Return a public name of one of the modules."""
    for module, public in _MODULES.items():
        if name in public:
            return getattr(import_module(f"finetuning.telemetry.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
