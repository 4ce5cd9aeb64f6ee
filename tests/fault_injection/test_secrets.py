"""Secrets that lie in the environment of a run reach nothing that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SECRETS = {
    "HF_TOKEN": "hf_plantedTokenOfTheHub",
    "MLFLOW_TRACKING_PASSWORD": "plantedPasswordOfMlflow",
    "AWS_SECRET_ACCESS_KEY": "plantedKeyOfTheStore",
}


def test_no_planted_secret_is_written_or_said(run_cli: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    values = sft_values(
        {
            "run_conf.model_args": {"token": "hf_plantedTokenInTheFile"},
            "training_args.max_steps": 2,
            "training_args.save_strategy": "steps",
            "training_args.save_steps": 1,
            "tracking": {"mlflow_server_uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "trackers": ["tensorboard"]},
        }
    )
    config = write_config(values)
    (tmp_path / "reported").mkdir()
    files = {
        "TERMINATION_LOG_FILE": tmp_path / "reported" / "log",
        "FINETUNING_ERROR_FILE": tmp_path / "reported" / "error.json",
    }
    environment = {**SECRETS, **{name: str(path) for name, path in files.items()}, "MLFLOW_TRACKING_USERNAME": "me"}
    result = run_cli(["sft", config, "--logging-level", "DEBUG"], env=environment)
    assert result.returncode == 0, result.stderr
    address = "http://me:plantedInTheAddress@127.0.0.1:9"
    refused = run_cli(["sft", config, "--mlflow-server-uri", address], env=environment)
    assert refused.returncode == 1
    assert all(path.stat().st_size for path in files.values())
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != config]
    texts = {str(path): path.read_bytes() for path in written}
    texts["said"] = "".join((result.stdout, result.stderr, refused.stdout, refused.stderr)).encode()
    for name in ("run.json", "config.resolved.yaml", "report.html", "mlflow.db"):
        assert any(path.name == name for path in written)
    assert any("tfevents" in path.name for path in written)
    secrets = [*SECRETS.values(), "hf_plantedTokenInTheFile", "plantedInTheAddress"]
    actual = [(name, secret) for name, text in texts.items() for secret in secrets if secret.encode() in text]
    assert actual == []
