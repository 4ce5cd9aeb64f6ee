"""Orders in the batches that MLflow takes, and names as it allows them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from finetuning.tracking.mlflow.queue_file import Order
from finetuning.tracking.settings import LONGEST_KEY

if TYPE_CHECKING:
    from mlflow.entities import Metric

PARENT_TAG = "mlflow.parentRunId"
METRICS_A_BATCH = 1000
_PARAMS_A_BATCH = 100
_PARAM_CHARACTERS_A_BATCH = 150_000
_UNFIT_FOR_NAMES = re.compile(r"[^0-9A-Za-z_\-. :/]")


def batches(orders: Iterator[Order]) -> Iterator[list[Order]]:
    """Orders one by one, but runs of metrics together, until there are a thousand or so."""
    waiting: list[Order] = []
    count = 0
    for order in orders:
        if order.kind != "metrics" or count >= METRICS_A_BATCH:
            if waiting:
                yield waiting
            waiting, count = [], 0
        if order.kind == "metrics":
            waiting.append(order)
            count += len(order.fields["values"])
        else:
            yield [order]
    if waiting:
        yield waiting


def chunks(values: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    """Pairs in batches that MLflow takes: by number, and by size."""
    chunk: list[tuple[str, str]] = []
    size = 0
    for key, value in values.items():
        if len(chunk) == _PARAMS_A_BATCH or size + len(value) > _PARAM_CHARACTERS_A_BATCH:
            yield chunk
            chunk, size = [], 0
        chunk.append((key, value))
        size += len(key) + len(value)
    if chunk:
        yield chunk


def metrics_of(fields: Mapping[str, Any]) -> list[Metric]:
    """The metrics of one order."""
    from mlflow.entities import Metric

    return [
        Metric(fit(key), float(value), fields["time"], fields.get("step", 0)) for key, value in fields["values"].items()
    ]


def below(tags: Mapping[str, str], parent_id: str | None) -> dict[str, str]:
    """The tags of a run below another one, where there is one."""
    return {**tags, **({PARENT_TAG: parent_id} if parent_id else {})}


def fit(name: str) -> str:
    """The name with what MLflow does not allow in names made into `_`, and not too long."""
    return _UNFIT_FOR_NAMES.sub("_", name)[:LONGEST_KEY]
