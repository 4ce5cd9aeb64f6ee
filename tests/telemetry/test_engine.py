"""Telemetry of runs of the engine, read from the files of the output directory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from telemetry.conftest import read

from finetuning.telemetry import session_goodput
from finetuning.telemetry.hf_callback import TelemetryCallback

LAST = "training_metrics_update"


@pytest.fixture
def run(train: Any, sft_values: Any) -> Any:
    """A function that trains with these changes to the config."""

    def start(changes: dict[str, Any] | None = None, values: Any = None) -> Any:
        return train((values or sft_values)(changes or {}))

    return start


def test_the_spans_of_a_run(run: Any, recorded: Any, tmp_path: Path) -> None:
    run(
        {
            "telemetry": {"spans": "all", "log_every_n_train_iterations": 2},
            "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
            "training_args.eval_strategy": "steps",
            "training_args.eval_steps": 2,
            "training_args.save_strategy": "steps",
            "training_args.save_steps": 2,
        }
    )
    output = recorded(tmp_path / "out")
    parents = {(span["name"], output.parent(span)) for span in output.spans()}
    assert parents == {
        ("application", None),
        ("data_preparation", "application"),
        ("distributed_code_initialization", "application"),
        ("model_initialization", "application"),
        ("data_loader_initialization", "application"),
        ("optimizer_initialization", "application"),
        ("training_loop", "application"),
        ("training_single_iteration", "training_loop"),
        ("data_loading", "training_single_iteration"),
        ("model_forward", "training_single_iteration"),
        ("model_backward", "training_single_iteration"),
        ("optimizer_update", "training_single_iteration"),
        ("zero_grad", "training_single_iteration"),
        ("validation_loop", "training_loop"),
        ("validation_single_iteration", "validation_loop"),
        ("checkpoint_save_sync", "training_loop"),
        ("model_publication", "application"),
    }
    assert {span["status"] for span in output.spans()} == {"OK"}
    # Batches of four rows in micro-batches of two.
    assert [len(output.spans(name)) for name in ("training_single_iteration", "model_forward", "model_backward")] == [
        3,
        6,
        6,
    ]
    order = sorted(output.spans(), key=lambda span: span["start_ns"])
    step = output.spans("training_single_iteration")[0]
    inside = [span["name"] for span in order if span["parent_id"] == step["span_id"]]
    micro = ["model_forward", "model_backward"]
    assert inside == ["data_loading", *micro, *micro, "optimizer_update", "zero_grad"]
    assert [update["interval"] for update in output.updates()] == [2, 1]


def test_by_default_no_span_is_recorded_per_step(run: Any, recorded: Any, tmp_path: Path) -> None:
    run({"training_args.max_steps": 4})
    output = recorded(tmp_path / "out")
    assert {span["name"] for span in output.spans()} == {
        "application",
        "data_preparation",
        "distributed_code_initialization",
        "model_initialization",
        "data_loader_initialization",
        "optimizer_initialization",
        "training_loop",
        "model_publication",
    }
    [update] = output.updates()
    assert update["num_iterations"] == 4
    for part in ("dataloader", "forward", "backward", "optimizer"):
        assert 0 < update[f"avg_{part}_time_sec"] < update["avg_iteration_time_sec"]


def test_tokens_and_loss_match_training(run: Any, recorded: Any, tmp_path: Path) -> None:
    trained = run({"telemetry": {"log_every_n_train_iterations": 1, "flops_per_token": 1e6, "peak_tflops": 0.01}})
    updates = recorded(tmp_path / "out").updates()
    assert [update["latest_loss"] for update in updates] == pytest.approx(trained.losses, abs=1e-4)
    assert updates[-1]["train_tokens"] == trained.trainer.tokens_seen > 0
    assert updates[-1]["num_train_samples"] == 12
    assert updates[-1]["mfu"] == pytest.approx(updates[-1]["tokens_per_second_per_device"] * 1e6 / 0.01e12, rel=1e-6)
    assert updates[-1]["peak_host_memory_bytes"] > 10_000_000


def test_losses_are_identical_with_and_without_telemetry(run: Any, tmp_path: Path) -> None:
    losses = {}
    for name, section in {
        "off": {"enabled": False},
        "on": {},
        "all": {"spans": "all", "log_every_n_train_iterations": 1, "peak_tflops": 1.0},
    }.items():
        trained = run({"telemetry": section, "training_args.output_dir": str(tmp_path / name)})
        losses[name] = trained.losses
    assert len(losses["off"]) == 3
    assert losses["off"] == losses["on"] == losses["all"]


def test_disabled_telemetry_writes_nothing(run: Any, tmp_path: Path) -> None:
    run({"telemetry": {"enabled": False}})
    assert not (tmp_path / "out" / "telemetry").exists()
    assert "telemetry" not in json.loads((tmp_path / "out" / "run.json").read_text())


def test_checkpoints_of_a_run(run: Any, recorded: Any, tmp_path: Path) -> None:
    run({"training_args.save_strategy": "steps", "training_args.save_steps": 1})
    output = recorded(tmp_path / "out")
    successes = output.updates("save_checkpoint_success")
    assert [success["save_checkpoint_success_count"] for success in successes] == [1, 2, 3]
    assert [success["productive_train_iterations"] for success in successes] == [1, 2, 3]
    for step, success in enumerate(successes, 1):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        assert success["checkpoint_directory"] == str(folder)
        assert success["checkpoint_size"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_an_exception_in_a_step_is_recorded(run: Any, recorded: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import torch

    real, calls = torch.nn.functional.cross_entropy, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("bad step")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", fails)
    with pytest.raises(ValueError, match="bad step"):
        run({"telemetry": {"spans": "all"}})
    output = recorded(tmp_path / "out")
    [error] = output.events("error")
    inner = next(span for span in output.spans() if span["span_id"] == error["span_id"])
    assert (inner["name"], inner["status"]) == ("model_forward", "ERROR")
    assert output.span("application")["status"] == output.span("training_loop")["status"] == "ERROR"
    assert "fails" in error["attributes"]["exception_traceback"]
    assert not output.events("save_checkpoint_success")


def test_a_failed_checkpoint_is_not_a_success(run: Any, recorded: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from finetuning.trainer import checkpointing

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, "publish", full)
    run({"training_args.save_strategy": "steps", "training_args.save_steps": 2})
    output = recorded(tmp_path / "out")
    saves = output.spans("checkpoint_save_sync")
    assert [save["status"] for save in saves] == ["ERROR"] * len(saves) and saves
    assert saves[0]["attributes"]["save_checkpoint_attempt_count"] == 1
    assert not output.events("save_checkpoint_success")
    assert output.events("error")[0]["span_id"] == saves[0]["span_id"]


def test_the_run_record_and_trackers_get_the_metrics(run: Any, tmp_path: Path) -> None:
    run(
        {
            "telemetry": {"log_every_n_train_iterations": 1},
            "tracking": {"mlflow_server_uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment_name": "figures"},
        }
    )
    record = json.loads((tmp_path / "out" / "run.json").read_text())["telemetry"]
    assert record["session"]["goodput"] > 0
    assert record["session"]["kept_steps"] == 3
    assert record["tokens_per_second_per_device"] > 0
    queue = [json.loads(line) for line in (tmp_path / "out" / "mlflow_queue.jsonl").read_text().splitlines()]
    logged = {(name, item["step"]) for item in queue if item["kind"] == "metrics" for name in item["values"]}
    assert {("telemetry/tokens_per_second_per_device", step) for step in (1, 2, 3)} <= logged
    assert ("totals/goodput", 3) in logged
    assert [name for name, _ in sorted(logged) if name == "totals/first_step_s"] == ["totals/first_step_s"]
    tags = {name: value for item in queue if item["kind"] == "tags" for name, value in item["values"].items()}
    assert tags["finetuning.session_tag"] == record["session_tag"]
    [data] = [item["values"] for item in queue if item["kind"] == "datasets"]
    assert [(item["context"], item["name"]) for item in data] == [("training", "sft.jsonl")]
    assert json.loads(data[0]["profile"])["num_rows"] == 24


def test_preference_training_is_measured(run: Any, recorded: Any, tmp_path: Path, dpo_values: Any) -> None:
    run({"telemetry": {"spans": "all"}, "training_args.max_steps": 2}, dpo_values)
    output = recorded(tmp_path / "out")
    assert len(output.spans("model_forward")) == len(output.spans("model_backward")) == 4
    assert output.updates()[-1]["train_tokens"] > 0
    assert "mfu" not in output.updates()[-1]


class PlainTrainer:
    """The parts of a run without the engine: transformers' Trainer on random token ids."""

    def __init__(self, folder: Path, model_dir: Path):
        import torch
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
        rows = [torch.randint(0, 200, (6,), generator=torch.Generator().manual_seed(n)) for n in range(24)]
        self.rows = [{"input_ids": row, "labels": row} for row in rows]
        self.folder = folder

    def arguments(self, **changes: Any) -> Any:
        import transformers

        values = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True} | changes
        return transformers.TrainingArguments(str(self.folder / "plain"), disable_tqdm=True, **values)


@pytest.fixture
def plain(tmp_path: Path, chatml_llama_dir: Path) -> PlainTrainer:
    return PlainTrainer(tmp_path, chatml_llama_dir)


def test_the_callback_works_with_any_trainer(
    plain: PlainTrainer, telemetry: Any, recorded: Any, tmp_path: Path
) -> None:
    import transformers

    observer = telemetry()
    trainer = transformers.Trainer(
        plain.model,
        plain.arguments(eval_strategy="steps", eval_steps=2, save_steps=2, gradient_accumulation_steps=2),
        train_dataset=plain.rows,
        eval_dataset=plain.rows[:4],
        callbacks=[TelemetryCallback(observer)],
    )
    with observer.application():
        trainer.train()
    observer.close()
    output = recorded(tmp_path)
    assert {(span["name"], output.parent(span), span["status"]) for span in output.spans()} == {
        ("application", None, "OK"),
        ("training_loop", "application", "OK"),
        ("training_single_iteration", "training_loop", "OK"),
        ("optimizer_update", "training_single_iteration", "OK"),
        ("zero_grad", "training_single_iteration", "OK"),
        ("validation_loop", "training_loop", "OK"),
        ("checkpoint_save_sync", "training_loop", "OK"),
    }
    assert len(output.spans("training_single_iteration")) == 4
    assert output.updates("save_checkpoint_success")[-1]["checkpoint_size"] > 1000
    assert output.updates()[-1]["num_iterations"] == 4
    steps = sorted(output.spans("training_single_iteration"), key=lambda span: span["start_ns"])
    for saved, after in zip(output.spans("checkpoint_save_sync"), steps[2::2], strict=False):
        assert after["start_ns"] >= saved["end_ns"]


def test_the_callback_works_with_one_loggers_provider(plain: PlainTrainer, tmp_path: Path) -> None:
    import transformers

    from finetuning.telemetry import one_logger

    provider = one_logger.TrainingTelemetryProvider
    provider.reset()
    training = one_logger.TrainingTelemetryConfig(
        perf_tag_or_fn="p", global_batch_size_or_fn=2, seq_length_or_fn=6, log_every_n_train_iterations=2
    )
    base = one_logger.OneLoggerConfig(application_name="a", session_tag_or_fn="s", telemetry_config=training)
    instance = provider.instance().with_base_config(base)
    instance.with_exporter(one_logger.FileExporter(tmp_path / "t.json")).configure_provider()
    with one_logger.application():
        trainer = transformers.Trainer(
            plain.model,
            plain.arguments(eval_strategy="steps", eval_steps=2, save_steps=2),
            train_dataset=plain.rows,
            eval_dataset=plain.rows[:4],
            callbacks=[one_logger.TelemetryCallback()],
        )
        trainer.train()
    provider.reset()
    output = read(tmp_path / "t.json")
    assert {(span["name"], output.parent(span), span["status"]) for span in output.spans()} == {
        ("application", None, "OK"),
        ("training_loop", "application", "OK"),
        ("validation_loop", "training_loop", "OK"),
        ("checkpoint_save_sync", "training_loop", "OK"),
    }
    assert [update["train_tokens"] for update in output.updates()] == [24, 48]
    assert output.span("training_loop")["attributes"]["train_iterations_target"] == 4
    assert session_goodput(tmp_path / "t.json").kept_steps == 4


def test_evaluation_and_prediction_outside_of_training(
    plain: PlainTrainer, telemetry: Any, recorded: Any, tmp_path: Path
) -> None:
    import transformers

    observer = telemetry()
    trainer = transformers.Trainer(
        plain.model,
        plain.arguments(save_strategy="no", max_steps=2),
        train_dataset=plain.rows,
        eval_dataset=plain.rows[:4],
        callbacks=[TelemetryCallback(observer)],
    )
    with observer.application():
        runtimes = [trainer.evaluate()["eval_runtime"]]
        trainer.train()
        time.sleep(0.5)
        runtimes.append(trainer.evaluate()["eval_runtime"])
        time.sleep(0.5)
        runtimes.append(trainer.predict(plain.rows[:4]).metrics["test_runtime"])
        runtimes.append(trainer.evaluate(metric_key_prefix="test")["test_runtime"])
    observer.close()
    output = recorded(tmp_path)
    spans = [*output.spans("validation_loop"), *output.spans("testing_loop")]
    assert [span["name"] for span in spans] == ["validation_loop"] * 2 + ["testing_loop"] * 2
    assert {output.parent(span) for span in spans} == {"application"}
    assert [(span["end_ns"] - span["start_ns"]) / 1e9 for span in spans] == pytest.approx(runtimes, abs=0.02)


def with_phases(plain: PlainTrainer, observer: Any, trainer_class: Any = None, **kwargs: Any) -> Any:
    import transformers

    from finetuning.telemetry.hf_callback import TrainerPhases
    from finetuning.trainer.hooks import TrainerHooksMixin

    class Trainer(TrainerHooksMixin, trainer_class or transformers.Trainer):
        """transformers' Trainer that reports its phases."""

    arguments = plain.arguments(**kwargs.pop("arguments", {}))
    trainer = Trainer(
        plain.model,
        arguments,
        train_dataset=plain.rows,
        callbacks=[TelemetryCallback(observer, with_phases=True)],
        **kwargs,
    )
    trainer.hooks = TrainerPhases(
        observer, lambda: trainer.state.global_step, lambda step: Path(arguments.output_dir) / f"checkpoint-{step}"
    )
    return trainer


def test_several_validation_sets_and_a_test_set(
    plain: PlainTrainer, telemetry: Any, recorded: Any, tmp_path: Path
) -> None:
    observer = telemetry()
    sets = {"one": plain.rows[:4], "two": plain.rows[4:8]}
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "save_strategy": "no"}
    trainer = with_phases(plain, observer, eval_dataset=sets, arguments=arguments)
    with observer.application():
        trainer.train()
        trainer.predict(plain.rows[:4])
    observer.close()
    output = recorded(tmp_path)
    assert len(output.spans("validation_loop")) == 6
    assert {output.parent(span) for span in output.spans("validation_loop")} == {"training_loop"}
    assert {output.parent(span) for span in output.spans("validation_single_iteration")} == {"validation_loop"}
    assert output.parent(output.span("testing_loop")) == "application"
    assert output.parent(output.spans("testing_single_iteration")[0]) == "testing_loop"
    assert [update["interval"] for update in output.updates("validation_metrics_update")] == [0, 0, 2, 0, 2, 0]


def test_an_out_of_memory_retry_starts_a_new_loop(
    plain: PlainTrainer, telemetry: Any, recorded: Any, tmp_path: Path
) -> None:
    import torch
    import transformers

    class RunsOut(transformers.Trainer):
        """Runs out of memory with more than one row per batch."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self._train_batch_size > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    observer = telemetry()
    arguments = {"auto_find_batch_size": True, "save_strategy": "no", "per_device_train_batch_size": 2}
    trainer = with_phases(plain, observer, RunsOut, arguments=arguments)
    with observer.application():
        trainer.train()
    observer.close()
    output = recorded(tmp_path)
    assert [span["status"] for span in output.spans("training_loop")] == ["ERROR", "OK"]
    assert output.span("application")["status"] == "OK"
    assert output.events("error")[0]["attributes"]["exception_type"] == "OutOfMemoryError"
    assert output.updates()[-1]["num_iterations"] == 4


def test_an_unknown_span_in_the_config_names_the_valid_ones(sft_values: Any, run_cli: Any, write_config: Any) -> None:
    config = write_config(sft_values({"telemetry": {"include_spans": ["model_foward"]}}))
    result = run_cli(["sft", config, "--dry-run"])
    assert result.returncode == 1
    assert "telemetry.include_spans" in result.stderr
    assert "model_forward" in result.stderr


def test_otlp_headers_are_not_written_to_any_file(run: Any, tmp_path: Path) -> None:
    run({"telemetry": {"otlp": {"endpoint": "http://127.0.0.1:9", "timeout_s": 0.2, "headers": {"x-key": "s3cret"}}}})
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path
    resolved = yaml.safe_load((tmp_path / "out" / "config.resolved.yaml").read_text())
    assert resolved["telemetry"]["otlp"]["endpoint"] == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "broken", ["flops.count_flops", "session.perf_tag", "session.start_telemetry", "metrics.peak_memory"]
)
def test_training_completes_when_telemetry_fails(run: Any, tmp_path: Path, monkeypatch: Any, broken: str) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken inside")

    section = {"peak_tflops": 1.0, "log_every_n_train_iterations": 1}
    whole = run({"telemetry": section, "training_args.output_dir": str(tmp_path / "whole")})
    monkeypatch.setattr(f"finetuning.telemetry.{broken}", fails)
    trained = run({"telemetry": section})
    assert trained.losses == whole.losses
    assert trained.result.status == "completed"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    if broken != "session.start_telemetry":
        assert "broken inside" in record["telemetry"]["faults"][0]
