"""Secrets reach nothing that a run writes or prints: not its files, not what it sends, not its error messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.redaction import is_secret_key, redact_text, redact_values

ENVIRONMENT = {
    "HF_TOKEN": "hf_planted-by-environment",
    "MLFLOW_TRACKING_PASSWORD": "planted&password<of>mlflow",
    "AWS_SECRET_ACCESS_KEY": "planted/key+of/the=store",
    "AWS_SESSION_TOKEN": 'planted "session" token\\',
    "MY_SERVICE_KEY": "planted-in-an-exception",
    "DATA_PASSPHRASE": "planted-in-a-row",
    "MLFLOW_TAGS": json.dumps({"store": "postgresql://me:planted-in-a-tag@host/db"}),
}
CONFIG = {
    "run_conf.model_args": {"token": "planted-model-token"},
    "run_conf.copy_checkpoints_to": "ftp://me:planted-upload-password@127.0.0.1:9/bucket",
    "training_args.hub_token": "planted-hub-token",
    "tracking.exp_metadata": {"service_password": "planted-in-metadata", "docs": "http://h/?token=planted-in-a-query"},
    "tracking.run_name": "run of hf_planted-by-environment",
    "telemetry.custom_metadata": {"deploy_token": "planted-in-telemetry", "team": "search"},
    "telemetry.otlp": {
        "endpoint": "http://127.0.0.1:9",
        "headers": {"x-scope": "planted-header", "Authorization": "Bearer planted-bearer"},
    },
}
COMMAND_LINE = "tracking.exp_metadata.api_key=planted-on-the-command-line"
ADDRESS = "http://me:planted-in-the-address@127.0.0.1:9"
DATASET = "https://me:planted-in-a-dataset@127.0.0.1:9/rows.jsonl?sig=planted-signature"

CALLBACK = """
import os
from finetuning.callbacks.controller.metrics import Metric

class Leaks(Metric):
    events = frozenset({"on_log"})

    def compute(self, event):
        raise RuntimeError(f"cannot log in with {os.environ['MY_SERVICE_KEY']} and planted-model-token")
"""


def _planted(texts: dict[str, bytes]) -> list[tuple[str, str]]:
    """Return where something that was planted occurs. Every planted secret has `planted` in it."""
    return [
        (name, line.decode(errors="replace")[:200])
        for name, text in texts.items()
        for line in text.splitlines()
        if b"planted" in line
    ]


def _texts(folder: Path, inputs: list[Path]) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path not in inputs]
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def values(sft_values: Any, tmp_path: Path, write_jsonl: Any, sft_rows: Any) -> dict[str, Any]:
    rows = sft_rows(12)
    rows[0]["messages"][-1]["content"] = "It opens with planted-in-a-row, of course."
    changes = {
        **CONFIG,
        "training_args.max_steps": 2,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "tracking.mlflow_server_uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "tracking.trackers": ["tensorboard"],
        "data_conf.training_data.datasets": [{"path": str(write_jsonl(tmp_path / "input" / "rows.jsonl", rows))}],
        "data_conf.cache": str(tmp_path / "cache"),
        "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 2}},
    }
    return sft_values(changes)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name in ("reports", "tmp"):
        (tmp_path / name).mkdir()
    return {
        **ENVIRONMENT,
        "MLFLOW_TRACKING_USERNAME": "me",
        "TMPDIR": str(tmp_path / "tmp"),
        "TERMINATION_LOG_FILE": str(tmp_path / "reports" / "log"),
        "FINETUNING_ERROR_FILE": str(tmp_path / "reports" / "error.json"),
        "PYTHONPATH": f"{Path(__file__).parents[2] / 'src'}:{tmp_path / 'input'}",
    }


def test_secrets_are_neither_written_nor_printed(
    run_cli: Any, values: Any, environment: Any, write_config: Any, tmp_path: Path
) -> None:
    config = write_config(values, "input/config.yaml")
    result = run_cli(["sft", config, COMMAND_LINE, "--logging-level", "DEBUG"], env=environment)
    assert result.returncode == 0, result.stderr
    inputs = [path for path in (tmp_path / "input").rglob("*") if path.is_file()]
    texts = _texts(tmp_path, inputs)
    names = {Path(name).name for name in texts}
    assert {"run.json", "config.resolved.yaml", "report.html", "preview.txt", "mlflow.db", "prepared.json"} <= names
    assert {"run_config.json", "mlflow_queue.jsonl", "model_card.md", "rank0.jsonl"} <= names
    assert any("tfevents" in name for name in names)
    # The cached rows are the user's data: token ids, and nothing else of them.
    assert _planted(texts | {"stdout": result.stdout.encode(), "stderr": result.stderr.encode()}) == []
    record = (tmp_path / "out" / "run.json").read_text()
    assert "upload_errors" in record, "the upload was to fail"
    assert "team:search" in (tmp_path / "out" / "telemetry").glob("*/rank0.jsonl").__next__().read_text()


@pytest.mark.parametrize("debug", [True, pytest.param(False, marks=pytest.mark.full)])
def test_secrets_are_not_in_errors(
    run_cli: Any, values: Any, environment: Any, write_config: Any, tmp_path: Path, debug: bool
) -> None:
    values["trainer_controller"] = {
        "controller_metrics": [{"name": "leak", "class": "leaking.Leaks"}],
        "controllers": [
            {"name": "c", "triggers": ["on_log"], "rule": "leak > 1", "operations": ["hfcontrols.should_log"]}
        ],
    }
    config = write_config(values, "input/config.yaml")
    (tmp_path / "input" / "leaking.py").write_text(CALLBACK)
    result = run_cli(["sft", config, *["--debug"] * debug], env=environment, fresh=True)
    assert result.returncode != 0
    assert "cannot log in with …" in result.stderr
    refused = run_cli(["sft", config, "--mlflow-server-uri", ADDRESS], env=environment)
    assert refused.returncode == 1
    absent = run_cli(["sft", config, f"data_conf.training_data.datasets.0.path={DATASET}"], env=environment)
    assert absent.returncode == 1, absent.stderr
    texts = _texts(tmp_path, [path for path in (tmp_path / "input").rglob("*") if path.is_file()])
    for name in ("reports/log", "reports/error.json", "out/run.json"):
        assert texts[name]
    for number, run in enumerate((result, refused, absent)):
        texts |= {f"stdout {number}": run.stdout.encode(), f"stderr {number}": run.stderr.encode()}
    assert _planted(texts) == []


@pytest.mark.parametrize(
    "key", ["max_new_tokens", "pad_token", "eos_token", "token_ids", "special_tokens", "tokenizer", "num_tokens", "key"]
)
def test_keys_of_tokens_that_are_no_secrets_stay_readable(key: str) -> None:
    assert not is_secret_key(key)
    assert redact_values({key: "<x>"}) == {key: "<x>"}
    assert redact_text(f"{key}=<x>", {}) == f"{key}=<x>"


@pytest.mark.parametrize(
    "key",
    ["hub_token", "token", "API_KEY", "apiKey", "x-api-key", "clientSecret", "db.password", "Authorization", "headers"],
)
def test_values_of_secret_keys_are_removed_at_any_depth(key: str) -> None:
    assert redact_values({"a": [{"b": {key: {"value": "x"}}}]}) == {"a": [{"b": {}}]}


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgresql+psycopg2://me:p@ss@host/db", "postgresql+psycopg2://…@host/db"),
        ("s3://key:se/cret@bucket/x", "s3://…@bucket/x"),
        ("https://h/x?X-Amz-Signature=abc&part=1", "https://h/x?X-Amz-Signature=…&part=1"),
        ("{'hub_token': 'abc', 'n': 1}", "{'hub_token': '…', 'n': 1}"),
        ("run_conf.model_args.token=abc", "run_conf.model_args.token=…"),
        ("Authorization: Basic YWJjOmRlZg==", "Authorization: …"),
        ("headers: Authorization Basic YWJjOmRlZg==", "headers: Authorization …"),
        ("headers: ('x-api-key', 'abcdefgh')", "headers: ('x-api-key', '…')"),
    ],
)
def test_secrets_are_recognized_by_their_form(text: str, redacted: str) -> None:
    assert redact_text(text, {}) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/a@b",
        "data_conf.special_tokens: unknown key",
        "run_conf.model_args.token: expected text",
        "tokens=12 eos_token=</s>",
        "HTTP headers, such as an authorization header: never logged or saved.",
    ],
)
def test_texts_without_a_secret_are_left_as_they_are(text: str) -> None:
    assert redact_text(text, {}) == text


@pytest.mark.parametrize("spelling", [str, json.dumps, repr])
def test_a_value_of_the_environment_is_found_however_it_is_spelled(spelling: Any) -> None:
    secret = 'a "quoted" \\ & <secret>\nof two lines, the second long'
    assert "secret" not in redact_text(f"x {spelling(secret)} y", {"SOME_TOKEN": secret})
    assert redact_text("PWD and 123456", {"PWD": "123456", "PIN_KEY": "123456"}) == "PWD and 123456"
