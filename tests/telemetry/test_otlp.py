"""OTLP to a collector in a separate process, which parses it with the protocol's messages."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import MissingPackageError

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address of a collector, and the file that it writes."""
    file = tmp_path / "received.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("receiver.py")), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", file
        process.kill()


def attributes(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {item["key"]: next(iter(item["value"].values())) for item in values}


def test_a_collector_receives_all_spans_and_events(
    train: Any, sft_values: Any, recorded: Any, collector: tuple[str, Path], tmp_path: Path
) -> None:
    address, file = collector
    otlp = {"endpoint": address, "headers": {"x-key": "s3cret"}, "timeout_s": 5.0}
    train(sft_values({"telemetry": {"spans": "all", "otlp": otlp, "application_name": "mine"}}))
    received = [json.loads(line) for line in file.read_text().splitlines()]
    assert {request["key"] for request in received} == {"s3cret"}
    spans, events = [], []
    for request in received:
        for kind, scopes, records, into in (
            ("resourceSpans", "scopeSpans", "spans", spans),
            ("resourceLogs", "scopeLogs", "logRecords", events),
        ):
            for group in request.get(kind, []):
                resource = attributes(group["resource"]["attributes"])
                assert (resource["service.name"], resource["rank"], resource["world_size"]) == ("mine", "0", "1")
                into += [record for scope in group[scopes] for record in scope[records]]
    output = recorded(tmp_path / "out")

    def hexed(text: str) -> str:
        return base64.b64decode(text).hex()

    sent = {(span["name"], hexed(span["spanId"]), hexed(span.get("parentSpanId", "")) or None) for span in spans}
    assert sent == {(span["name"], span["span_id"], span["parent_id"]) for span in output.spans()}
    named = sorted((event["eventName"], int(event["timeUnixNano"]), hexed(event["spanId"])) for event in events)
    assert named == sorted((event["name"], event["time_ns"], event["span_id"]) for event in output.events())
    update = next(
        attributes(event["attributes"]) for event in events if event["eventName"] == "training_metrics_update"
    )
    assert int(update["num_iterations"]) == 3


def test_a_collector_receives_what_one_loggers_api_records(collector: tuple[str, Path]) -> None:
    from finetuning.telemetry import one_logger

    address, file = collector
    provider = one_logger.TrainingTelemetryProvider
    provider.reset()
    base = one_logger.OneLoggerConfig(application_name="mine", session_tag_or_fn="s")
    exporter = one_logger.OtlpExporter(address, {"x-key": "s3cret"}, timeout_s=5.0)
    provider.instance().with_base_config(base).with_exporter(exporter).configure_provider()
    with one_logger.application(), one_logger.timed_span("my_span"):
        provider.instance().recorder.event(one_logger.Event.create("my_event"))
    provider.reset()
    received = [json.loads(line) for line in file.read_text().splitlines()]
    assert {request["key"] for request in received} == {"s3cret"}
    text = file.read_text()
    assert all(f'"{name}"' in text for name in ("my_span", "my_event", "application", "mine"))


def test_a_missing_exporter_names_the_package_to_install(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingPackageError, match=r"finetuning\[otlp\]"):
        train(sft_values({"telemetry": {"otlp": {"endpoint": "http://127.0.0.1:9"}}}))
