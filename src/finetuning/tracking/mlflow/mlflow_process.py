"""The worker's process: how it is started, and the environment that it runs in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

_QUICK_S, _UPLOAD_S = "5", "60"


def start_worker(spool: Path, uri: str, *arguments: str, uploads: bool) -> subprocess.Popen[bytes]:
    """A worker on this spool, in a session of its own: Ctrl-C at the terminal is the training process's to handle.

    It stands in the folder of a SQLite store, because MLflow puts that store's files below the working directory.
    """
    folder = _local_folder(uri) or spool.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "finetuning.tracking.mlflow.worker", str(spool.absolute()), *arguments],
        cwd=folder,
        env=worker_environment(os.environ, uri, uploads=uploads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def worker_environment(environ: Mapping[str, str], uri: str, *, uploads: bool) -> dict[str, str]:
    """The environment with MLflow's waits cut down, where the user has not set them, and its file store allowed.

    A request waits 5 s, or 60 s where model files are copied: a server answers an upload when it has passed it on.
    """
    ours = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": _UPLOAD_S if uploads else _QUICK_S,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    forced = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": uri, "PYTHONSAFEPATH": "1"}
    return {**ours, **environ, **forced}


def _local_folder(uri: str) -> Path | None:
    parts = urlsplit(uri)
    return Path(parts.path.removeprefix("/")).parent if parts.scheme == "sqlite" else None
