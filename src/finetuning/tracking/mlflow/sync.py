"""Delivering what a run could not: the spools that it has left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import ConfigError, Location
from finetuning.tracking.mlflow.mlflow_process import start_worker
from finetuning.tracking.mlflow.queue_file import Delivery, delivery_path, latest_run, read_orders, spools, whole_bytes


@dataclass(frozen=True)
class SyncResult:
    """One spool: how many orders were waiting, how many still are, and what became of the run.

    `problems` are things that MLflow refuses or that are gone; they will not arrive at any time.
    """

    spool: Path
    uri: str
    waiting_before: int
    waiting: int
    run_id: str | None
    url: str | None
    error: str | None
    problems: tuple[str, ...]

    @property
    def delivered(self) -> bool:
        return self.waiting == 0 and self.error is None


def sync_run(folder: Path, *, patience_s: float = 30.0) -> list[SyncResult]:
    """Delivers every spool in a run's folder, the oldest first; gives up after `patience_s` without a sign of MLflow.

    What has been delivered is not sent again, so that it may be called at any time and as often as one likes. The
    address is the run's own.

    Raises:
        ConfigError: the folder holds no spool.
    """
    found = spools(folder) if folder.is_dir() else []
    if not found:
        raise ConfigError("no run with an MLflow spool here; nothing to send", place=Location(file=str(folder)))
    return [_sync(spool, patience_s) for spool in found]


def _sync(spool: Path, patience_s: float) -> SyncResult:
    from finetuning.tracking.mlflow.worker import EXIT_BUSY, EXIT_DELIVERED

    run, ended = latest_run(spool)
    before = _waiting(spool)
    uri = str((run or {}).get("uri", ""))
    code = EXIT_DELIVERED
    if run and (before or not ended):
        arguments = ("--once", "--patience", str(patience_s))
        process = start_worker(spool, uri, *arguments, uploads=bool(run.get("uploads")))
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    delivery = Delivery.read(delivery_path(spool))
    error = delivery.error or f"the worker ended with code {code}"
    if code == EXIT_BUSY:
        error = "the run is sending it right now"
    return SyncResult(
        spool=spool,
        uri=uri,
        waiting_before=before,
        waiting=_waiting(spool),
        run_id=delivery.run_id,
        url=delivery.url,
        error=None if code == EXIT_DELIVERED else error,
        problems=_problems(delivery),
    )


def _problems(delivery: Delivery) -> tuple[str, ...]:
    def refusal(item: dict[str, Any]) -> str:
        return f"{item['what']} {item['name']}: {item['reason']}"

    gone = (f"{path}: gone before it could be copied" for path in delivery.files_gone)
    return (*(refusal(item) for item in delivery.refused), *gone)


def _waiting(spool: Path) -> int:
    """Orders that have not arrived, files left over included."""
    delivery = Delivery.read(delivery_path(spool))
    count = len(delivery.files_left)
    size = whole_bytes(spool)
    position = min(delivery.records_sent, delivery.files_sent)
    while position < size and (batch := list(read_orders(spool, position))):
        position = batch[-1].end
        for order in batch:
            sent = delivery.files_sent if order.kind == "artifact" else delivery.records_sent
            count += order.end > sent
    return count
