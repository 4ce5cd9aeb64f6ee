"""One Logger's glue for Lightning, with the real Lightning on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from telemetry.conftest import read

pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from finetuning.telemetry import one_logger
from finetuning.telemetry.one_logger import (
    ExportCustomizationMode,
    FileExporter,
    OneLoggerConfig,
    OneLoggerPTLTrainer,
    TrainingTelemetryConfig,
    TrainingTelemetryProvider,
    hook_trainer_cls,
)


class Model(pl.LightningModule):
    """One linear layer. Fails in the batch with this number."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.fails_at = fails_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.fails_at:
            raise RuntimeError("bad batch")
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(rows: int = 16) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(rows, 4)), batch_size=2)


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[TrainingTelemetryProvider]:
    TrainingTelemetryProvider.reset()
    training = TrainingTelemetryConfig(
        perf_tag_or_fn="p", global_batch_size_or_fn=2, log_every_n_train_iterations=4, seq_length_or_fn=4
    )
    provider = (
        TrainingTelemetryProvider.instance()
        .with_base_config(OneLoggerConfig(application_name="a", session_tag_or_fn="s", telemetry_config=training))
        .with_export_customization(ExportCustomizationMode.EXPORT_ALL_SPANS, None)
        .with_exporter(FileExporter(tmp_path / "t.json"))
    )
    provider.configure_provider()
    yield provider
    TrainingTelemetryProvider.reset()


def arguments(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [checkpoint],
        "default_root_dir": tmp_path,
        **changes,
    }


def test_a_lightning_trainer_records_everything(provider: TrainingTelemetryProvider, tmp_path: Path) -> None:
    trainer = OneLoggerPTLTrainer(arguments(tmp_path, num_sanity_val_steps=0), provider)
    trainer.fit(Model(), loader(), loader(4))
    trainer.validate(Model(), loader(4), verbose=False)
    trainer.test(Model(), loader(4), verbose=False)
    trainer.nv_one_logger_callback.on_app_end()
    output = read(tmp_path / "t.json")
    parents = [(span["name"], output.parent(span)) for span in output.spans()]
    assert set(parents) == {
        ("application", None),
        ("training_loop", "application"),
        ("training_single_iteration", "training_loop"),
        ("validation_loop", "training_loop"),
        ("validation_loop", "application"),
        ("validation_single_iteration", "validation_loop"),
        ("checkpoint_save_sync", "training_loop"),
        ("testing_loop", "application"),
        ("testing_single_iteration", "testing_loop"),
    }
    assert {span["status"] for span in output.spans()} == {"OK"}
    counts = {name: len(output.spans(name)) for name in ("training_single_iteration", "validation_single_iteration")}
    assert counts == {"training_single_iteration": 8, "validation_single_iteration": 4}
    assert [update["num_iterations"] for update in output.updates()] == [4, 8]
    assert output.updates()[-1]["train_tokens"] == 8 * 2 * 4
    successes = output.updates("save_checkpoint_success")
    assert [success["current_iteration"] for success in successes] == [4, 8]
    for success in successes:
        assert success["checkpoint_size"] == Path(success["checkpoint_directory"]).stat().st_size > 100


def test_testing_that_the_user_has_begun_is_recorded_once(provider: TrainingTelemetryProvider, tmp_path: Path) -> None:
    trainer = OneLoggerPTLTrainer(arguments(tmp_path), provider)
    callback = trainer.nv_one_logger_callback
    callback.on_testing_start()
    trainer.test(Model(), loader(4), verbose=False)
    callback.on_testing_end()
    callback.on_app_end()
    output = read(tmp_path / "t.json")
    assert [span["status"] for span in output.spans("testing_loop")] == ["OK"]
    assert len(output.spans("testing_single_iteration")) == 2


def test_an_iteration_is_an_optimizer_step(provider: TrainingTelemetryProvider, tmp_path: Path) -> None:
    with_accumulation = arguments(tmp_path, accumulate_grad_batches=4, limit_val_batches=0)
    trainer = OneLoggerPTLTrainer(with_accumulation, provider)
    trainer.fit(Model(), loader(32))
    trainer.nv_one_logger_callback.on_app_end()
    output = read(tmp_path / "t.json")
    assert trainer.global_step == len(output.spans("training_single_iteration")) == 4
    assert output.updates()[-1]["current_iteration"] == 3


def test_a_failed_training_ends_its_spans_with_the_error(provider: TrainingTelemetryProvider, tmp_path: Path) -> None:
    with one_logger.application():
        trainer = OneLoggerPTLTrainer(arguments(tmp_path), provider, call_on_app_start=False)
        with pytest.raises(RuntimeError, match="bad batch"):
            trainer.fit(Model(fails_at=2), loader())
    output = read(tmp_path / "t.json")
    assert output.span("training_loop")["status"] == "ERROR"
    assert output.span("application")["status"] == "OK"
    assert output.event("error")["exception_message"] == "bad batch"


def test_a_trainer_class_of_your_own_is_hooked_without_changing_it(
    provider: TrainingTelemetryProvider, tmp_path: Path
) -> None:
    initialize, save = pl.Trainer.__init__, pl.Trainer.save_checkpoint
    hooked, callback = hook_trainer_cls(pl.Trainer, provider)
    trainer = hooked(**arguments(tmp_path, limit_val_batches=0))
    trainer.fit(Model(), loader())
    callback.on_app_end()
    assert trainer.nv_one_logger_callback is callback
    assert (pl.Trainer.__init__, pl.Trainer.save_checkpoint) == (initialize, save)
    output = read(tmp_path / "t.json")
    assert len(output.spans("training_single_iteration")) == 8
    assert len(output.events("save_checkpoint_success")) == 2
