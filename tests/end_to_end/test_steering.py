"""Whole runs that are controlled and reported: rules, the guard, the report, the list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = """
data_conf:
  training_data: {{type: CONCATENATION, datasets: [{{path: {rows}}}]}}
  validation_data: {{type: AUTO_SPLIT, ratio: 0.2}}
  chat_template_name: keep-original
training_args: {{learning_rate: 1e-3, max_steps: 8, logging_steps: 1, eval_strategy: steps, eval_steps: 2,
  output_dir: {out}, use_cpu: true}}
batchsize_conf: {{total_train_batch_size: 2, max_per_device_train_batch_size: 2}}
peft_conf: {{peft_type: NO_PEFT}}
run_conf: {{model: {model}}}
sft_args: {{train_on_completions_only: true}}
"""
RULE = """
controller_metrics: [{name: loss, class: Loss}]
controllers:
- {name: enough, triggers: [on_log], rule: "loss.step >= 3", operations: [hfcontrols.should_training_stop]}
"""


@pytest.fixture
def config(chatml_llama_dir: Path, sft_rows: Callable, write_jsonl: Callable, tmp_path: Path) -> Path:
    rows = write_jsonl(tmp_path / "rows.jsonl", sft_rows(20))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(rows=rows, out=tmp_path / "out", model=chatml_llama_dir))
    return path


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_a_rule_ends_a_run_and_is_reported(config: Path, run_cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULE)
    done = run_cli(["sft", str(config), f"trainer_controller={tmp_path / 'rules.yaml'}"])
    assert done.returncode == 0, done.stderr
    assert 'step 3: controller "enough" at on_log: hfcontrols.should_training_stop' in done.stdout
    out = tmp_path / "out"
    assert record(out)["status"] == "completed"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "training"] == [1, 2, 3]
    page = (out / "report.html").read_text()
    assert "Loss: training from" in page and "enough" in page and "largest divisor" in page
    listed = json.loads(run_cli(["runs", str(tmp_path), "--json"]).stdout)
    assert [(run["state"], run["step"], run["steps"]) for run in listed] == [("completed", 3, 8)]
    second = run_cli(["report", str(out), "--compare", str(out), "--output", str(tmp_path / "both.html")])
    assert second.stdout.strip() == str(tmp_path / "both.html")
    assert "Config differences" in (tmp_path / "both.html").read_text()


def test_the_guard_is_on_by_default(config: Path, run_cli: Callable, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the loss leaps and stays there, finite."""
    harsh = ["training_args.learning_rate=1", "training_args.lr_scheduler_type=constant", "guard.patience=3"]
    done = run_cli(["sft", str(config), *harsh, "training_args.max_steps=30", "training_args.eval_strategy=no"])
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the loss has exploded" in done.stderr
    out = tmp_path / "out"
    assert record(out)["status"] == "stopped by a guard"
    assert "the loss has exploded" in (out / "report.html").read_text()
    assert not (out / "checkpoint-final").exists()


def test_a_wrong_rule_is_found_before_anything_is_loaded(config: Path, run_cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULE.replace("loss.step", "los.step"))
    done = run_cli(["sft", str(config), f"trainer_controller={tmp_path / 'rules.yaml'}", "--dry-run"])
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'rules.yaml'}:4:38: controllers.0.rule: rule of controller")
    assert 'Did you mean "loss"?' in done.stderr
