"""One Logger's API: the examples of its documentation, and every name, on this package's telemetry."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from telemetry.conftest import Recorded, read

from finetuning.telemetry import one_logger, session_goodput
from finetuning.telemetry.one_logger import (
    Attributes,
    CheckPointStrategy,
    Event,
    ExportCustomizationMode,
    FileExporter,
    OneLoggerConfig,
    OneLoggerError,
    OneLoggerErrorHandlingStrategy,
    OtlpExporter,
    TrainingMetricsUpdateAttributes,
    TrainingTelemetryConfig,
    TrainingTelemetryProvider,
)

IMPORT = "from finetuning.telemetry.one_logger import *\nfrom pathlib import Path\n"

CONFIGS = """
# Initialize the telemetry provider with a default configuration
base_config = OneLoggerConfig(
    application_name="test_app",
    session_tag_or_fn="test_session",
    world_size_or_fn=5,
)

training_config = TrainingTelemetryConfig(
    world_size_or_fn=5,
    is_log_throughput_enabled_or_fn=True,
    flops_per_sample_or_fn=100,
    global_batch_size_or_fn=32,
    log_every_n_train_iterations=10,
    perf_tag_or_fn="test_perf",
)
"""

CONTEXT_MANAGERS = (
    """
@application() # < ---- telemetry context manager
def main() -> None:

    ....

    with training_loop(train_iterations_start=0): # < ---- telemetry context manager
        ...


        for epoch in range(num_epochs):
            for batch_idx, (inputs, targets) in enumerate(dataloader):
                with training_iteration(): # < ---- telemetry context manager
                    ....
"""
    + CONFIGS
    + """
# configure the telemetry library and start the main() function
(TrainingTelemetryProvider.instance()
    .with_base_config(base_config)
    .with_exporter(FileExporter(file_path=Path("training_telemetry.json")))
    .configure_provider())

@application()
def main() -> None:
    # Set training telemetry config after on_app_start is called
    TrainingTelemetryProvider.instance().set_training_telemetry_config(training_config)
    # ... rest of your training code

main()
"""
)

CALLBACKS = """
def main() -> None:
    # configure the telemetry library and start the main() function
  (TrainingTelemetryProvider.instance()
      .with_base_config(base_config)
      .with_exporter(FileExporter(file_path=Path("training_telemetry.json")))
      .configure_provider())

    on_app_start() # < ---- callback
    
    # Set training telemetry config after on_app_start is called
    TrainingTelemetryProvider.instance().set_training_telemetry_config(training_config)

    ....

        on_train_start(train_iterations_start=0) # < ---- callback
        ...
        for epoch in range(num_epochs):
            
            for batch_idx, (inputs, targets) in enumerate(dataloader):
                on_training_single_iteration_start(): # < ---- callback
                    ....
                on_training_single_iteration_end(): # < ---- callback
    on_app_end() # < ---- callback
"""

CORE_API = """
def main() -> None:
    # configure the telemetry library and start the main() function
    (TrainingTelemetryProvider.instance()
        .with_base_config(base_config)
        .with_exporter(FileExporter(file_path=Path("training_telemetry.json")))
        # If you are creating custom spans, make sure you set the export_customization_mode and span_name_filter
        # such that such spans are exported.
        .with_export_customization(export_customization_mode=ExportCustomizationMode.xxxx, 
                                   span_name_filter=[...])
        .configure_provider())

    with application() as app_span: # <---- start application span
        # Set training telemetry config after on_app_start is called
        TrainingTelemetryProvider.instance().set_training_telemetry_config(training_config)

        with training_loop(train_iterations_start=0) as span: # <---- access the span created by the context manager
        ...
        training_span.add_attribute("my_custom_attribute", "my_custom_value") # <--- Adding custom attributes

        with timed_span("my_custom_span", span_attributes=Attributes({"my_custom_attribute": "my_custom_value"})):
            # This code block is considered "my_custom_span"
            ....
            TrainingTelemetryProvider.instance().recorder.event(Event.create(...)) # <--- Firing a custom event
"""

# What is not Python in the examples: omissions, a colon after a call, indentation, placeholders and an undefined name.
COMPLETED = {
    r"\.\.\.\.": "pass",
    r"(?m)^(\s*)\.\.\.$": r"\1pass",
    r"(_(?:start|end)\(\)): #": r"\1 #",
    r"ExportCustomizationMode\.xxxx": "ExportCustomizationMode.EXPORT_ALL_SPANS",
    r"span_name_filter=\[\.\.\.\]": "span_name_filter=None",
    r"Event\.create\(\.\.\.\)": 'Event.create("my_event")',
    r"training_span\.": "span.",
    r"(?m)^  \(Training": "    (Training",
    r"\n {4}pass\n\n {8}on_train_start": "\n    if True:\n        on_train_start",
    r"\n {20}pass\n {16}on_training_single": "\n                on_training_single",
    r"(as span: #.*)\n {8}pass\n {8}span": r"\1\n          span",
    r"\n {8}with timed_span": "\n          with timed_span",
    r"(?m)^ {12}(# This code|pass$|Training)": r"              \1",
}


@pytest.fixture(autouse=True)
def new_provider() -> Iterator[None]:
    TrainingTelemetryProvider.reset()
    yield
    TrainingTelemetryProvider.reset()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs an example in an empty folder, and returns what it has recorded."""
    monkeypatch.chdir(tmp_path)

    def execute(code: str) -> Recorded:
        for pattern, text in COMPLETED.items():
            code = re.sub(pattern, text, code)
        values = {"num_epochs": 3, "dataloader": [(1, 2)] * 8}
        exec(compile(IMPORT + code, "example.py", "exec"), values)
        return read(tmp_path / "training_telemetry.json")

    return execute


def test_the_example_with_context_managers(run: Any) -> None:
    # The example defines main() twice; the second one is run. Give it the body of the first.
    body = CONTEXT_MANAGERS.split("def main() -> None:\n", 1)[1].split("# Initialize", 1)[0].split("....\n", 1)[1]
    output = run(CONTEXT_MANAGERS.replace("    # ... rest of your training code\n", body))
    assert {span["name"]: output.parent(span) for span in output.spans()} == {
        "application": None,
        "training_loop": "application",
    }
    assert [update["num_iterations"] for update in output.updates()] == [10, 20, 24]
    last = output.updates()[-1]
    assert last["num_train_samples"] == 24 * 32
    assert last["total_flops"] == 24 * 32 * 100
    expected = last["total_flops"] / (last["total_iteration_time_sec"] * 1e12 * 5)
    assert last["train_throughput_per_gpu"] == pytest.approx(expected)
    initialization = output.event("one_logger_initialization")
    assert (initialization["world_size"], initialization["session_tag"]) == (5, "test_session")
    assert output.event("update_training_telemetry_config")["perf_tag"] == "test_perf"


def test_the_example_with_callbacks(run: Any) -> None:
    output = run(CONFIGS + CALLBACKS + "\nmain()\n")
    assert {span["name"]: span["status"] for span in output.spans()} == {"application": "OK", "training_loop": "ERROR"}
    # The example does not call on_train_end: the loop is closed with the application, and says so.
    assert output.span("training_loop")["status_description"] == "left open"
    assert [update["num_iterations"] for update in output.updates()] == [10, 20]


def test_the_example_with_the_core_api(run: Any) -> None:
    output = run(CONFIGS + CORE_API + "\nmain()\n")
    assert output.span("training_loop")["attributes"]["my_custom_attribute"] == "my_custom_value"
    custom = output.span("my_custom_span")
    assert custom["attributes"]["my_custom_attribute"] == "my_custom_value"
    assert output.parent(custom) == "training_loop"
    [event] = output.events("my_event")
    assert event["span_id"] == custom["span_id"]


# Every name of the documentation and of the modules that it refers to.
NAMES = [
    "OneLoggerConfig",
    "TrainingTelemetryConfig",
    "TrainingTelemetryProvider",
    "OneLoggerProvider",
    "FileExporter",
    "LoggerExporter",
    "OTelExporter",
    "OtlpExporter",
    "ExportCustomizationMode",
    "StandardSpanName",
    "StandardTrainingJobSpanName",
    "StandardEventName",
    "StandardTrainingJobEventName",
    "StandardSpanAttributeName",
    "StandardEventAttributeName",
    "CheckPointStrategy",
    "CheckPointType",
    "Event",
    "Attributes",
    "Attribute",
    "Span",
    "TracingTimestamp",
    "TrainingRecorder",
    "LoggerConfig",
    "OneLoggerError",
    "OneLoggerErrorHandlingStrategy",
    "ApplicationType",
    "DEFAULT_SPANS_EXPORT_BLACKLIST",
    "TrainingLoopAttributes",
    "CheckpointSaveSpanAttributes",
    "OneLoggerInitializationAttributes",
    "TrainingTelemetryAttributes",
    "TrainingMetricsUpdateAttributes",
    "ValidationMetricsUpdateAttributes",
    "TestingMetricsUpdateAttributes",
    "SaveCheckpointSuccessEventAttributes",
    "SyncCheckpointMetricsUpdateAttributes",
    "application",
    "training_loop",
    "training_iteration",
    "validation_loop",
    "validation_iteration",
    "testing_loop",
    "testing_iteration",
    "data_loading",
    "model_init",
    "dataloader_init",
    "optimizer_init",
    "checkpoint_load",
    "checkpoint_save",
    "timed_span",
    "get_recorder",
    "on_app_start",
    "on_app_end",
    "on_distributed_init_start",
    "on_distributed_init_end",
    "on_dataloader_init_start",
    "on_dataloader_init_end",
    "on_model_init_start",
    "on_model_init_end",
    "on_optimizer_init_start",
    "on_optimizer_init_end",
    "on_load_checkpoint_start",
    "on_load_checkpoint_end",
    "on_train_start",
    "on_train_end",
    "on_training_single_iteration_start",
    "on_training_single_iteration_end",
    "on_validation_start",
    "on_validation_end",
    "on_validation_single_iteration_start",
    "on_validation_single_iteration_end",
    "on_testing_start",
    "on_testing_end",
    "on_save_checkpoint_start",
    "on_save_checkpoint_success",
    "on_save_checkpoint_end",
]


def test_every_name_can_be_imported() -> None:
    missing = [name for name in NAMES if not hasattr(one_logger, name)]
    assert missing == []
    assert set(one_logger.__all__) >= set(NAMES)


def test_the_package_needs_neither_torch_nor_the_engine() -> None:
    code = """
import sys
import finetuning.telemetry
from finetuning.telemetry import open_telemetry, session_goodput
from finetuning.telemetry.one_logger import *
print(*[name for name in sys.modules if name.startswith("finetuning.") or "." not in name])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert not loaded & {
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "mlflow",
        "numpy",
        "lightning",
    }
    base = {"finetuning.errors", "finetuning.distributed", "finetuning.config", "finetuning.config.redaction"}
    ours = {name for name in loaded if name.startswith("finetuning.")}
    assert {name for name in ours if not name.startswith("finetuning.telemetry")} <= base


def configure(path: Path, *, mode: Any = None, names: Any = None, training: Any = None, **base: Any) -> Any:
    values = {"application_name": "app", "session_tag_or_fn": "session"} | base
    provider = TrainingTelemetryProvider.instance().with_base_config(OneLoggerConfig(**values))
    if mode is not None:
        provider.with_export_customization(mode, names)
    provider.with_exporter(FileExporter(path)).configure_provider()
    return provider


def training(**changes: Any) -> TrainingTelemetryConfig:
    return TrainingTelemetryConfig(**{"perf_tag_or_fn": "p", "global_batch_size_or_fn": 4} | changes)


def test_spans_nest_as_in_the_table_of_the_documentation(tmp_path: Path) -> None:
    provider = configure(tmp_path / "t.json", mode=ExportCustomizationMode.EXPORT_ALL_SPANS)
    names = one_logger.StandardTrainingJobSpanName
    with one_logger.application():
        provider.set_training_telemetry_config(training())
        one_logger.on_distributed_init_start()
        one_logger.on_distributed_init_end()
        for block in (one_logger.dataloader_init, one_logger.checkpoint_load, one_logger.model_init):
            with block():
                pass
        with one_logger.optimizer_init():
            pass
        with one_logger.training_loop(train_iterations_start=0):
            for _ in range(2):
                with one_logger.training_iteration():
                    with one_logger.data_loading():
                        pass
                    for phase in (names.MODEL_FORWARD, names.MODEL_BACKWARD, names.OPTIMIZER_UPDATE):
                        with one_logger.timed_span(phase):
                            pass
                    with one_logger.checkpoint_save(global_step=1):
                        pass
            with one_logger.validation_loop(), one_logger.validation_iteration():
                pass
        with one_logger.testing_loop(), one_logger.testing_iteration():
            pass
    output = read(tmp_path / "t.json")
    assert {(span["name"], output.parent(span)) for span in output.spans()} == {
        ("application", None),
        ("distributed_code_initialization", "application"),
        ("data_loader_initialization", "application"),
        ("checkpoint_load", "application"),
        ("model_initialization", "application"),
        ("optimizer_initialization", "application"),
        ("training_loop", "application"),
        ("training_single_iteration", "training_loop"),
        ("data_loading", "training_single_iteration"),
        ("model_forward", "training_single_iteration"),
        ("model_backward", "training_single_iteration"),
        ("optimizer_update", "training_single_iteration"),
        ("checkpoint_save_sync", "training_single_iteration"),
        ("validation_loop", "training_loop"),
        ("validation_single_iteration", "validation_loop"),
        ("testing_loop", "application"),
        ("testing_single_iteration", "testing_loop"),
    }
    assert {span["status"] for span in output.spans()} == {"OK"}
    [update] = output.updates()
    assert update["avg_forward_time_sec"] > 0
    for name, events in {
        "application": ["one_logger_initialization", "update_training_telemetry_config"],
        "validation_loop": ["validation_metrics_update"],
        "testing_loop": ["testing_metrics_update"],
    }.items():
        inside = [event["name"] for event in output.events() if event["span_id"] == output.span(name)["span_id"]]
        assert inside == ["span_start", *events, "span_stop"]


def test_a_function_may_be_decorated_before_the_provider_is_configured(tmp_path: Path) -> None:
    @one_logger.model_init()
    def build() -> int:
        return 3

    @one_logger.application()
    def main() -> int:
        with pytest.raises(OneLoggerError, match="set_training_telemetry_config"):
            one_logger.on_train_start(0)
        TrainingTelemetryProvider.instance().set_training_telemetry_config(training())
        with pytest.raises(OneLoggerError, match="already"):
            TrainingTelemetryProvider.instance().set_training_telemetry_config(training())
        return build()

    with pytest.raises(OneLoggerError, match="configure_provider"):
        main()
    configure(tmp_path / "t.json")
    assert main() == 3
    assert read(tmp_path / "t.json").span("model_initialization")


def test_what_is_not_known_yet_is_asked_for_when_training_starts(tmp_path: Path) -> None:
    values: dict[str, int] = {}
    provider = configure(
        tmp_path / "t.json", world_size_or_fn=lambda: values["world"], is_baseline_run_or_fn=lambda: True
    )
    with one_logger.application():
        provider.set_training_telemetry_config(
            training(global_batch_size_or_fn=lambda: values["batch"], seq_length_or_fn=lambda: values["length"])
        )
        with pytest.raises(OneLoggerError, match="world_size_or_fn"):
            one_logger.on_train_start(0)
        values |= {"world": 8, "batch": 16, "length": 10}
        with one_logger.training_loop(2, train_iterations_target_or_fn=lambda: 5), one_logger.training_iteration():
            pass
    output = read(tmp_path / "t.json")
    initializations = output.updates("one_logger_initialization")
    assert [(item["world_size"], item["is_baseline_run"]) for item in initializations] == [(1, True), (8, True)]
    assert output.span("training_loop")["attributes"]["train_samples_start"] == 32
    assert output.span("training_loop")["attributes"]["train_iterations_target"] == 5
    assert output.updates()[0]["train_tokens"] == 160


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: OneLoggerConfig(application_name="a", session_tag_or_fn="s", world_size=3),
        lambda: OneLoggerConfig(application_name=" ", session_tag_or_fn="s"),
        lambda: OneLoggerConfig(application_name="a", session_tag_or_fn="s", world_size_or_fn=0),
        lambda: training(perf_tag="p"),
        lambda: training(global_batch_size_or_fn=0),
        lambda: training(log_every_n_train_iterations=0),
        lambda: training(is_log_throughput_enabled_or_fn=True),
        lambda: OtlpExporter("localhost:4318"),
        lambda: TrainingTelemetryProvider.instance().configure_provider(),
        lambda: TrainingTelemetryProvider.instance().with_exporter("file"),
        lambda: TrainingTelemetryProvider.instance().with_export_customization(
            ExportCustomizationMode.WHITELIST_SPANS, ["model_foward"]
        ),
        lambda: TrainingTelemetryProvider.instance().with_export_customization(
            ExportCustomizationMode.EXPORT_ALL_SPANS, ["model_forward"]
        ),
        lambda: TrainingTelemetryProvider.instance().with_export_customization(
            ExportCustomizationMode.BLACKLIST_SPANS, []
        ),
    ],
)
def test_a_wrong_configuration_is_an_error_at_once(wrong: Any) -> None:
    with pytest.raises(ValueError):
        wrong()


def test_the_error_strategy_decides_whether_wrong_use_is_raised(tmp_path: Path) -> None:
    quiet = OneLoggerErrorHandlingStrategy.DISABLE_QUIETLY_AND_REPORT_METRIC_ERROR
    provider = configure(tmp_path / "t.json", error_handling_strategy=quiet)
    with one_logger.application():
        one_logger.on_train_start(0).add_attribute("a", 1)
        with pytest.raises(TypeError):
            one_logger.on_train_start(train_iteration_start=0)
    assert "set_training_telemetry_config" in provider.telemetry.errors.messages[0]
    [mark] = read(tmp_path / "t.json").updates("telemetry_data_error")
    assert mark["error_message"] == provider.telemetry.errors.messages[0]


def test_a_disabled_rank_writes_nothing(tmp_path: Path) -> None:
    configure(tmp_path / "t.json", enable_for_current_rank=False, telemetry_config=training())
    with one_logger.application(), one_logger.training_loop(0), one_logger.training_iteration():
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_disabled_by_force_exports_no_more(tmp_path: Path) -> None:
    provider = configure(tmp_path / "t.json")
    assert provider.one_logger_enabled
    with one_logger.application():
        with one_logger.timed_span("before"):
            pass
        provider.force_disable_logging()
        with one_logger.timed_span("after"):
            pass
    assert not provider.one_logger_enabled
    assert {event["attributes"].get("span_name") for event in read(tmp_path / "t.json").events("span_start")} == {
        "application",
        "before",
    }


def test_each_rank_writes_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    configure(tmp_path / "t.json")
    with one_logger.application():
        pass
    output = read(tmp_path / "t.rank1.json")
    assert (output.resource["rank"], output.resource["world_size"]) == (1, 2)
    assert not (tmp_path / "t.json").exists()


def test_an_exception_is_recorded_and_spans_end_with_it(tmp_path: Path) -> None:
    configure(tmp_path / "t.json", telemetry_config=training(), mode=ExportCustomizationMode.EXPORT_ALL_SPANS)

    @one_logger.timed_span("mine")
    def step() -> float:
        return 1 / 0

    @one_logger.application()
    def main() -> None:
        with one_logger.training_loop(0), one_logger.training_iteration():
            step()

    with pytest.raises(ZeroDivisionError):
        main()
    output = read(tmp_path / "t.json")
    assert {span["status"] for span in output.spans()} == {"ERROR"}
    [error] = output.events("error")
    assert error["span_id"] == output.span("mine")["span_id"]
    assert error["attributes"]["exception_type"] == "ZeroDivisionError"


def test_a_resumed_job_erases_nothing_and_goodput_is_known(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for start in (0, 3):
        configure(path, telemetry_config=training())
        with one_logger.application(), one_logger.training_loop(start):
            for _ in range(4):
                with one_logger.training_iteration():
                    time.sleep(0.002)
        TrainingTelemetryProvider.reset()
    output = read(path)
    assert len(output.spans("training_loop")) == 2
    goodput = session_goodput(path)
    assert (goodput.session_tag, goodput.jobs, goodput.kept_steps, goodput.lost_steps) == ("session", 2, 7, 1)
    assert 0 < goodput.goodput < 1


def test_times_are_given_in_milliseconds(tmp_path: Path) -> None:
    configure(tmp_path / "t.json", telemetry_config=training(), mode=ExportCustomizationMode.EXPORT_ALL_SPANS)
    start = time.time() * 1000 - 3_600_000
    one_logger.on_app_start(start)
    one_logger.on_train_start(0, start_time_msec=start + 1000)
    one_logger.on_training_single_iteration_start(start + 1000)
    one_logger.on_training_single_iteration_end(start + 3500)
    one_logger.on_save_checkpoint_start(1, start + 4000)
    one_logger.on_save_checkpoint_success(1, start + 4500)
    one_logger.on_save_checkpoint_end(start + 5000)
    one_logger.on_train_end(start + 6000)
    one_logger.on_app_end(start + 7000)
    output = read(tmp_path / "t.json")
    seconds = {span["name"]: (span["end_ns"] - span["start_ns"]) / 1e9 for span in output.spans()}
    assert seconds == pytest.approx(
        {"application": 7, "training_loop": 5, "training_single_iteration": 2.5, "checkpoint_save_sync": 1}, abs=1e-3
    )
    assert output.updates()[0]["avg_iteration_time_sec"] == pytest.approx(2.5, abs=1e-3)
    success = output.event("save_checkpoint_success")
    assert success["latest_successful_save_checkpoint_timestamp_sec"] == pytest.approx((start + 4500) / 1000, abs=1e-3)
    assert success["productive_train_iterations_sec"] == pytest.approx(2.5, abs=1e-3)


def test_the_recorder_takes_events_with_and_without_their_span(tmp_path: Path) -> None:
    provider = configure(tmp_path / "t.json")
    with one_logger.application() as application:
        recorder = provider.recorder
        recorder.event(application, Event.create("with_span", Attributes({"a": [1, 2]})))
        recorder.event(Event.create("without_span"))
        span = recorder.start("mine", Attributes({"b": 1}), parent_span=application)
        assert recorder.get_active_spans_by_name("mine") == [span]
        span.add_attributes(Attributes({"c": "d"}))
        recorder.error(span, "it failed")
        recorder.stop(span)
        assert not span.active
        assert span.duration_msec() >= 0
        recorder.telemetry_data_error("incomplete")
    output = read(tmp_path / "t.json")
    assert output.event("with_span")["a"] == [1, 2]
    assert len({event["span_id"] for event in output.events() if event["name"].endswith("_span")}) == 1
    assert output.span("mine")["attributes"]["b"] == 1
    assert output.span("mine")["attributes"]["c"] == "d"
    assert output.span("mine")["status"] == "ERROR"
    assert output.event("error")["error_message"] == "it failed"
    assert output.event("telemetry_data_error")["error_message"] == "incomplete"


def test_an_asynchronous_checkpoint_succeeds_when_the_user_says_so(tmp_path: Path) -> None:
    configure(tmp_path / "t.json", telemetry_config=training(save_checkpoint_strategy=CheckPointStrategy.ASYNC))
    with one_logger.application(), one_logger.training_loop(0):
        with one_logger.checkpoint_save(1):
            pass
        one_logger.on_save_checkpoint_success(1)
    output = read(tmp_path / "t.json")
    assert output.span("checkpoint_save_async")["attributes"]["checkpoint_strategy"] == "async"
    [success] = output.events("save_checkpoint_success")
    assert success["span_id"] == output.span("application")["span_id"]


def test_attribute_classes_know_their_names() -> None:
    values = {name: 1 for name in TrainingMetricsUpdateAttributes.required}
    attributes = TrainingMetricsUpdateAttributes.create(**values, train_tokens=7)
    assert (attributes.train_tokens, attributes.latest_loss, attributes.interval) == (7, None, 1)
    assert attributes.to_json() == values | {"train_tokens": 7}
    with pytest.raises(TypeError, match="train_token"):
        TrainingMetricsUpdateAttributes.create(**values, train_token=7)
    with pytest.raises(TypeError, match="needs interval"):
        TrainingMetricsUpdateAttributes.create(**{**values, "interval": None})


def test_overrides_are_merged(tmp_path: Path) -> None:
    provider = TrainingTelemetryProvider.instance()
    provider.with_config_override({"application_name": "a", "session_tag_or_fn": "s"})
    provider.with_config_override({"telemetry_config": {"perf_tag_or_fn": "p", "global_batch_size_or_fn": 2}})
    provider.with_config_override({"telemetry_config": {"global_batch_size_or_fn": 3}, "world_size_or_fn": 2})
    provider.with_exporter(FileExporter(tmp_path / "t.json")).configure_provider()
    assert provider.config.world_size == 2
    assert provider.telemetry.config.global_batch_size == 3
    assert os.path.exists(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text().splitlines()[0])["attributes"]["world_size"] == 2


def test_a_logger_gets_the_lines_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spans")
    provider = TrainingTelemetryProvider.instance().with_base_config(
        OneLoggerConfig(application_name="app", session_tag_or_fn="session")
    )
    provider.with_exporter(FileExporter(tmp_path / "t.json"))
    provider.with_exporter(one_logger.LoggerExporter(logging.getLogger("spans"))).configure_provider()
    with one_logger.application(), one_logger.timed_span("mine"):
        pass
    logged = [json.loads(record.getMessage()) for record in caplog.records if record.name == "spans"]
    written = read(tmp_path / "t.json").lines
    assert logged[1:] == written[1:]
    assert logged[0]["attributes"] == written[0]["attributes"]


def test_an_exporter_of_the_sdk_gets_spans_and_events() -> None:
    spans, events = InMemorySpanExporter(), InMemoryLogRecordExporter()
    provider = TrainingTelemetryProvider.instance().with_base_config(
        OneLoggerConfig(application_name="app", session_tag_or_fn="session")
    )
    provider.with_exporter(one_logger.OTelExporter(spans, events)).configure_provider()
    with one_logger.application(), one_logger.timed_span("mine", Attributes({"a": 1})):
        provider.recorder.event(Event.create("my_event"))
    mine, application = spans.get_finished_spans()
    assert (mine.name, mine.attributes["a"]) == ("mine", 1)
    assert mine.parent.span_id == application.get_span_context().span_id
    [event] = [item.log_record for item in events.get_finished_logs() if item.log_record.event_name == "my_event"]
    assert event.span_id == mine.get_span_context().span_id


def test_a_path_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    provider = configure(tmp_path / "file" / "t.json", telemetry_config=training())
    with one_logger.application(), one_logger.training_loop(0):
        for _ in range(50):
            with one_logger.training_iteration():
                pass
    assert provider.telemetry.latest["num_iterations"] == 50
    assert [record.levelname for record in caplog.records] == ["WARNING"]


PAGE = Path(__file__).parents[2] / "docs" / "reference" / "one-logger.md"


def test_the_page_lists_every_name_and_attribute() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = set(re.findall(r"`([A-Za-z_]+)`", text))
    names = {*one_logger.__all__, "TelemetryCallback", "OneLoggerPTLTrainer", "TimeEventCallback", "hook_trainer_cls"}
    assert names - listed == set()
    for group in (one_logger.StandardTrainingJobSpanName, one_logger.StandardTrainingJobEventName):
        assert {str(name) for name in group} - listed == set()
    attributes = set()
    for value in vars(one_logger).values():
        if isinstance(value, type) and issubclass(value, one_logger.values.StandardAttributes):
            attributes |= {*value.required, *value.optional}
    assert len(attributes) > 60
    assert attributes - listed == set()


def test_the_page_lists_what_a_loop_records(tmp_path: Path) -> None:
    provider = configure(tmp_path / "t.json", mode=ExportCustomizationMode.EXPORT_ALL_SPANS)
    with one_logger.application():
        provider.set_training_telemetry_config(
            training(seq_length_or_fn=4, flops_per_token_or_fn=1e9, peak_tflops_or_fn=1.0, custom_metadata={"a": 1})
        )
        with one_logger.training_loop(0):
            with one_logger.training_iteration(), one_logger.data_loading():
                pass
            with one_logger.validation_loop(), one_logger.validation_iteration():
                pass
            with one_logger.checkpoint_save(1, tmp_path):
                pass
    text = PAGE.read_text(encoding="utf-8")
    listed = set(re.findall(r"`([A-Za-z_]+)`", text))
    phases = re.compile(r"(total|avg|window_avg)_(dataloader|forward|backward|optimizer|zero_grad)_time_sec")
    output = read(tmp_path / "t.json")
    recorded = {name for record in output.lines[1:] for name in record["attributes"] if not phases.fullmatch(name)}
    assert "productive_train_samples" in recorded
    assert recorded - listed == set()
