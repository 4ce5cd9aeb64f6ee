"""One loop on NVIDIA's One Logger 2.3.1 and on this package: the same names, structure and values.

Skipped where it is not installed: pip install nv-one-logger-core==2.3.1 nv-one-logger-training-telemetry==2.3.1 pyyaml
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from telemetry.conftest import read

pytest.importorskip("nv_one_logger.training_telemetry", reason="nv-one-logger-training-telemetry is not installed")

from nv_one_logger.exporter.exporter import BaseExporter
from overrides import override

from finetuning.telemetry import one_logger

# What is different, and why.
DIFFERENT = {
    "one_logger_training_telemetry_version": "the version of the package",
    "train_throughput_per_gpu_max": "of a single step, as documented; One Logger computes that of the running mean",
    "train_throughput_per_gpu_min": "of a single step, as documented; One Logger computes that of the running mean",
    "timestamp_msec": "the events of metrics have the time at which they are recorded",
}
# One Logger starts the span of a checkpoint now, whatever time it is given.
WRONG_START = {"checkpoint_save_sync"}


@dataclass
class Job:
    """What one of the two has recorded, in the order in which spans began."""

    parents: list[tuple[str, str | None]] = field(default_factory=list)
    span_attributes: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Span, name and attributes of each event."""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """A time in milliseconds that both may begin at."""
    from nv_one_logger.core.internal.singleton import SingletonMeta

    # Its log files go into the present folder.
    monkeypatch.chdir(tmp_path)
    SingletonMeta._instances.clear()
    one_logger.TrainingTelemetryProvider.reset()
    yield time.time() * 1000 - 300_000
    SingletonMeta._instances.clear()
    one_logger.TrainingTelemetryProvider.reset()


def nv_api() -> SimpleNamespace:
    """Return the names of One Logger's modules in one place."""
    import nv_one_logger

    names: dict[str, Any] = {}
    for package in ("api", "core", "exporter", "recorder", "training_telemetry.api"):
        module = importlib.import_module(f"nv_one_logger.{package}")
        for item in pkgutil.iter_modules(module.__path__):
            if not item.ispkg:
                names |= vars(importlib.import_module(f"nv_one_logger.{package}.{item.name}"))
    assert nv_one_logger is not None
    return SimpleNamespace(**names)


def loop(api: Any, provider: Any, base: float) -> None:
    """A resumed training job. Times are seconds since the base."""

    def at(seconds: float) -> float:
        return base + 1000 * seconds

    api.on_app_start(at(0))
    provider.set_training_telemetry_config(
        api.TrainingTelemetryConfig(
            perf_tag_or_fn=["a", "b"],
            global_batch_size_or_fn=lambda: 32,
            micro_batch_size_or_fn=4,
            seq_length_or_fn=128,
            flops_per_sample_or_fn=10**9,
            train_iterations_target_or_fn=100,
            train_samples_target_or_fn=3200,
            log_every_n_train_iterations=5,
            is_log_throughput_enabled_or_fn=True,
            custom_metadata={"team": "search"},
        )
    )
    for number, name in enumerate(("distributed_init", "model_init", "dataloader_init", "optimizer_init")):
        getattr(api, f"on_{name}_start")(at(1 + number))
        getattr(api, f"on_{name}_end")(at(1.5 + number))
    api.on_load_checkpoint_start(at(6))
    api.on_load_checkpoint_end(at(8))
    api.on_train_start(train_iterations_start=10, start_time_msec=at(9))
    now = 10.0
    for step in range(11, 21):
        api.on_training_single_iteration_start(at(now))
        now += 1 + 0.25 * (step % 3)
        api.on_training_single_iteration_end(at(now))
        if step % 4 == 0:
            api.on_validation_start(at(now))
            for _ in range(2):
                api.on_validation_single_iteration_start(at(now))
                now += 0.5
                api.on_validation_single_iteration_end(at(now))
            api.on_validation_end(at(now + 0.25))
            now += 0.5
        if step % 5 == 0:
            api.on_save_checkpoint_start(global_step=step, start_time_msec=at(now))
            now += step / 10
            api.on_save_checkpoint_success(global_step=step, time_msec=at(now))
            api.on_save_checkpoint_end(at(now))
    api.on_train_end(at(now + 1))
    api.on_testing_start(at(now + 2))
    api.on_testing_end(at(now + 3))
    api.on_app_end(at(now + 4))


def base_config(api: Any) -> Any:
    return api.OneLoggerConfig(
        application_name="app", session_tag_or_fn=lambda: "session", world_size_or_fn=4, custom_metadata={"a": 1}
    )


class Collector(BaseExporter):
    """Keeps everything."""

    def __init__(self) -> None:
        super().__init__()
        self.job = Job()
        self._numbers: dict[Any, int] = {}

    @override(check_signature=False)
    def export_start(self, span: Any) -> None:
        self._numbers[span.id] = len(self.job.parents)
        self.job.parents.append((str(span.name), str(span.parent_span.name) if span.parent_span else None))
        self.job.span_attributes.append({})
        self.export_event(span.start_event, span)

    @override(check_signature=False)
    def export_stop(self, span: Any) -> None:
        self.job.span_attributes[self._numbers[span.id]] = span.attributes.to_json()
        self.export_event(span.stop_event, span)

    @override(check_signature=False)
    def export_event(self, event: Any, span: Any) -> None:
        self.job.events.append((str(span.name), str(event.name), dict(event.attributes.to_json())))

    @override(check_signature=False)
    def export_error(self, event: Any, span: Any) -> None:
        raise AssertionError(event.attributes.to_json())

    @override(check_signature=False)
    def export_telemetry_data_error(self, error: Any) -> None:
        raise AssertionError(error.attributes.to_json())


def record_nv(base: float) -> Job:
    api, collector = nv_api(), Collector()
    provider = api.TrainingTelemetryProvider.instance().with_base_config(base_config(api))
    provider.with_exporter(collector).configure_provider()
    loop(api, provider, base)
    return collector.job


def record_ours(base: float, folder: Path) -> Job:
    provider = one_logger.TrainingTelemetryProvider.instance().with_base_config(base_config(one_logger))
    provider.with_exporter(one_logger.FileExporter(folder / "ours.json")).configure_provider()
    loop(one_logger, provider, base)
    output = read(folder / "ours.json")
    spans = {span["span_id"]: span for span in output.spans()}
    job = Job()
    for event in output.events("span_start"):
        span = spans[event["span_id"]]
        job.parents.append((span["name"], output.parent(span)))
        job.span_attributes.append(span["attributes"])
    for event in output.events():
        job.events.append((spans[event["span_id"]]["name"], event["name"], event["attributes"]))
    return job


def plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list) else getattr(value, "value", value)


def differences(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> list[str]:
    problems = []
    for name, value in theirs.items():
        if name in DIFFERENT or (name == "duration_msec" and where in WRONG_START):
            continue
        expected, actual = plain(value), ours.get(name)
        if isinstance(expected, int | float) and not isinstance(expected, bool):
            # One Logger's durations are whole milliseconds, cut off, and its clock is accurate to about one.
            tolerance = 1.01 if name == "duration_msec" else 2e-3 if name.endswith("_sec") else 0.0
            expected = pytest.approx(expected, abs=tolerance, rel=1e-3 if isinstance(expected, float) else 0.0)
        if actual != expected:
            problems.append(f"{where}: {name} is {actual!r}, One Logger's {value!r}")
    return problems


def test_one_loop_gives_the_same_spans_events_and_values(base: float, tmp_path: Path) -> None:
    theirs, ours = record_nv(base), record_ours(base, tmp_path)
    assert ours.parents == theirs.parents
    assert len(ours.parents) == 13
    assert [event[:2] for event in ours.events] == [event[:2] for event in theirs.events]
    problems = []
    for (name, _), their_span, our_span in zip(
        theirs.parents, theirs.span_attributes, ours.span_attributes, strict=True
    ):
        problems += differences(their_span, our_span, name)
    for (_, name, their_event), (_, _, our_event) in zip(theirs.events, ours.events, strict=True):
        problems += differences(their_event, our_event, name)
    assert problems == []
    updates = [attributes for _, name, attributes in theirs.events if name == "training_metrics_update"]
    assert [update["current_iteration"] for update in updates] == [14, 19]
    assert updates[-1]["train_tokens"] == 10 * 32 * 128
    ours_last = next(event[2] for event in reversed(ours.events) if event[1] == "training_metrics_update")
    # The fastest step took 1 s; the best running mean that One Logger reports is lower.
    assert ours_last["train_throughput_per_gpu_max"] == pytest.approx(32e9 / (1e12 * 4), rel=1e-2)
    assert updates[-1]["train_throughput_per_gpu_max"] < 0.9 * ours_last["train_throughput_per_gpu_max"]


def test_every_public_name_of_nv_one_logger_is_here() -> None:
    api = nv_api()
    theirs = {
        name
        for name, value in vars(api).items()
        if getattr(value, "__module__", "").startswith("nv_one_logger.") and not name.startswith("_")
    }
    # What its exporters and its implementation are made of, and what is not needed here.
    internal = {
        "BaseExporter", "BaseJsonExporter", "DefaultRecorder", "ErrorEvent", "ExportError", "ExporterConfig",
        "ExporterConfigManager", "MetricSummarizer", "MultiWindowTimer", "NVTXColor", "Recorder", "RecordType",
        "SingletonMeta", "TelemetryConfig", "TelemetryDataError", "Timer", "assert_that", "evaluate_value",
        "get_logger", "get_version", "safely_execute", "exception_guard", "OneLoggerAssertionError",
    }  # fmt: skip
    assert sorted(name for name in theirs - internal if not hasattr(one_logger, name)) == []


def test_every_argument_of_its_functions_is_accepted() -> None:
    api = nv_api()
    functions = [name for name in vars(api) if name.startswith("on_") or name in one_logger.__all__]
    compared = 0
    for name in functions:
        theirs, ours = getattr(api, name), getattr(one_logger, name)
        if not inspect.isfunction(theirs):
            continue
        compared += 1
        missing = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(ours).parameters)[: len(missing)] == missing, name
    assert compared == 38


def test_every_field_of_its_configs_is_accepted() -> None:
    api = nv_api()
    for name in ("OneLoggerConfig", "TrainingTelemetryConfig", "LoggerConfig"):
        theirs, ours = getattr(api, name).model_fields, getattr(one_logger, name).model_fields
        assert set(theirs) - set(ours) == set(), name
        for field_name, info in theirs.items():
            if not info.is_required() and info.default is not None and isinstance(info.default, bool | int | str):
                assert plain(ours[field_name].default) == plain(info.default), field_name
        properties = [key for key, value in vars(getattr(api, name)).items() if isinstance(value, property)]
        values = {
            "application_name": "a",
            "session_tag_or_fn": "s",
            "perf_tag_or_fn": "p",
            "global_batch_size_or_fn": 1,
        }
        if name != "LoggerConfig":
            config = getattr(one_logger, name)(**{key: value for key, value in values.items() if key in ours})
            assert [key for key in properties if not hasattr(config, key)] == []


def test_every_attribute_of_its_classes_is_known() -> None:
    api = nv_api()
    compared = 0
    for name, theirs in vars(api).items():
        ours = getattr(one_logger, name, None)
        if name.endswith("Attributes") and hasattr(ours, "required"):
            compared += 1
            parameters = inspect.signature(theirs.create).parameters.values()
            required = tuple(item.name for item in parameters if item.default is inspect.Parameter.empty)
            optional = tuple(item.name for item in parameters if item.default is not inspect.Parameter.empty)
            assert (ours.required, ours.optional) == (required, optional), name
    assert compared == 9


def test_every_member_of_its_enumerations_has_the_same_value() -> None:
    api = nv_api()
    compared = 0
    for name, theirs in vars(api).items():
        ours = getattr(one_logger, name, None)
        if isinstance(theirs, type) and issubclass(theirs, Enum) and ours is not None:
            compared += 1
            expected = {item.name: item.value for item in theirs}
            if "TESTING_SINGLE_ITERATION" in expected:
                expected["TESTING_SINGLE_ITERATION"] = "testing_single_iteration"
            assert {item.name: item.value for item in ours} == expected
    assert compared >= 10
