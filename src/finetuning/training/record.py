"""run.json: what went in, what came out, what was proven."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from finetuning import __version__

RECORD_NAME = "run.json"
CONFIG_NAME = "config.resolved.yaml"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "mlflow")


class RunRecord:
    """The record of one output directory, rewritten whole at each change of state.

    A resumed job goes on with the record that it finds and adds itself to `jobs`.
    """

    def __init__(self, output_dir: Path, method: str, writes: bool):
        self._path = output_dir / RECORD_NAME
        self._writes = writes
        self.values: dict[str, Any] = read_record(output_dir) or {"jobs": []}
        self.values |= {"engine": f"finetuning {__version__}", "method": method, "status": "running"}
        self._job: dict[str, Any] = {
            "started": _now(),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": installed_versions(),
            "pid": os.getpid(),
            "host": platform.node(),
        }
        self.values["jobs"] = [*self.values.get("jobs", []), self._job]

    def update(self, **values: Any) -> None:
        """Adds values to the record and writes it."""
        self.values |= values
        self._write()

    def finish(self, status: str, **values: Any) -> None:
        """Writes the end of this job: completed, stopped, interrupted or failed."""
        self._job |= {"ended": _now(), "status": status}
        self.update(status=status, **values)

    def _write(self) -> None:
        if not self._writes:
            return
        temporary = self._path.with_name(f".{RECORD_NAME}.partial")
        temporary.write_text(json.dumps(self.values, indent=2, default=str) + "\n", encoding="utf-8")
        temporary.replace(self._path)


def read_record(output_dir: Path) -> dict[str, Any] | None:
    """The record of an output directory; None when there is none that can be read."""
    try:
        record = json.loads((output_dir / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
