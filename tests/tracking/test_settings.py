from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetuning.config.sections.tracking import TrackingConfig
from finetuning.errors import ConfigError
from finetuning.tracking.settings import ResolvedValue, TrackingOptions, resolve_tracking

NOTHING = TrackingOptions()


def test_nothing_is_tracked_without_an_address() -> None:
    section = TrackingConfig(experiment_name="mine", mlflow_server_uri="")
    plan = resolve_tracking(TrackingOptions(experiment_name="cli"), section, {"MLFLOW_TRACKING_URI": ""})
    assert not plan.enabled
    assert "no address" in str(plan)


def test_command_line_wins_over_file_wins_over_environment() -> None:
    environ = {
        "MLFLOW_TRACKING_URI": "http://environment:1",
        "MLFLOW_EXPERIMENT_NAME": "environment",
        "MLFLOW_RUN_ID": "abc",
        "HF_MLFLOW_LOG_ARTIFACTS": "TRUE",
        "MLFLOW_FLATTEN_PARAMS": "FALSE",
    }
    by_environment = resolve_tracking(NOTHING, None, environ)
    assert by_environment.uri == ResolvedValue("http://environment:1", "environment: MLFLOW_TRACKING_URI")
    assert by_environment.run_id.value == "abc"
    assert (by_environment.log_artifacts.value, by_environment.flatten_params.value) == (True, False)

    section = TrackingConfig(mlflow_server_uri="http://file:2", experiment_name="file", hf_mlflow_log_artifacts=False)
    by_file = resolve_tracking(NOTHING, section, environ)
    assert by_file.uri == ResolvedValue("http://file:2", "file: tracking.mlflow_server_uri")
    assert by_file.experiment.value == "file"
    assert by_file.log_artifacts == ResolvedValue(False, "file: tracking.hf_mlflow_log_artifacts")

    options = TrackingOptions("http://cli:3", "cli", "True")
    by_cli = resolve_tracking(options, section, environ)
    assert by_cli.uri == ResolvedValue("http://cli:3", "command line: --mlflow-server-uri")
    assert by_cli.experiment == ResolvedValue("cli", "command line: --experiment-name")
    assert by_cli.log_artifacts == ResolvedValue(True, "command line: --hf-mlflow-log-artifacts")


def test_an_experiment_on_the_command_line_goes_to_the_files_address_and_a_uri_alone_keeps_the_files_experiment() -> (
    None
):
    section = TrackingConfig(mlflow_server_uri="http://file:2", experiment_name="file")
    named = resolve_tracking(TrackingOptions(experiment_name="cli"), section, {})
    assert (named.uri.value, named.experiment.value) == ("http://file:2", "cli")
    addressed = resolve_tracking(TrackingOptions(mlflow_server_uri="http://cli:3"), section, {})
    assert (addressed.uri.value, addressed.experiment.value) == ("http://cli:3", "file")


def test_a_key_that_the_file_leaves_out_does_not_hide_the_environment() -> None:
    section = TrackingConfig(mlflow_server_uri="http://file:2")
    assert resolve_tracking(NOTHING, section, {"HF_MLFLOW_LOG_ARTIFACTS": "1"}).log_artifacts.value is True


@pytest.mark.parametrize("word", ["TRUE", "1", "yes"])
def test_the_switch_in_the_environment_turns_everything_off(word: str) -> None:
    plan = resolve_tracking(TrackingOptions("http://cli:3"), None, {"DISABLE_MLFLOW_INTEGRATION": word})
    assert not plan.enabled
    assert "DISABLE_MLFLOW_INTEGRATION" in plan.uri.origin
    assert resolve_tracking(TrackingOptions("http://cli:3"), None, {"DISABLE_MLFLOW_INTEGRATION": "false"}).enabled


def test_local_stores_become_absolute_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for written, meant in {
        "mlruns": f"file://{tmp_path}/mlruns",
        "./my runs": f"file://{tmp_path}/my%20runs",
        f"{tmp_path}/runs": f"file://{tmp_path}/runs",
        f"file://{tmp_path}/runs": f"file://{tmp_path}/runs",
        "file:runs": f"file://{tmp_path}/runs",
        "sqlite:///mlflow.db": f"sqlite:///{tmp_path}/mlflow.db",
        "sqlite:////var/mlflow.db": "sqlite:////var/mlflow.db",
        "databricks": "databricks",
        "postgresql+psycopg2://me@host/db": "postgresql+psycopg2://me@host/db",
    }.items():
        assert resolve_tracking(TrackingOptions(written), None, {}).uri.value == meant
    assert resolve_tracking(TrackingOptions("mlruns"), None, {}).is_local
    assert not resolve_tracking(TrackingOptions("http://host"), None, {}).is_local


@pytest.mark.parametrize(
    "address",
    [
        "http://ada:hunter2@host:5000",
        "https://hunter2@host",
        "postgresql://ada:hunter2@host/db",
        "http://host:5000?token=hunter2",
        "http://ada:hunter2@host:port",
    ],
)
def test_an_address_with_a_password_is_an_error_that_does_not_print_it(address: str) -> None:
    for options, section, environ in (
        (TrackingOptions(address), None, {}),
        (NOTHING, TrackingConfig(mlflow_server_uri=address), {}),
        (NOTHING, None, {"MLFLOW_TRACKING_URI": address}),
    ):
        with pytest.raises(ConfigError) as raised:
            resolve_tracking(options, section, environ)
        assert "hunter2" not in str(raised.value)
        assert any(
            word in str(raised.value) for word in ("--mlflow-server-uri", "tracking.mlflow", "MLFLOW_TRACKING_URI")
        )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("127.0.0.1:5000/x", "http://127.0.0.1:5000/x"),
        ("htp://host", "htp"),
        ("http://", "has no host"),
        ("http://host:99999", "not a valid address"),
        ("file://runs/here", "three slashes"),
        ("sqlite://mlflow.db", "sqlite:///mlflow.db"),
    ],
)
def test_an_invalid_address_is_an_error(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_tracking(TrackingOptions(address), None, {})


def test_a_flag_that_is_neither_true_nor_false_names_its_origin() -> None:
    with pytest.raises(ConfigError, match="HF_MLFLOW_LOG_ARTIFACTS"):
        resolve_tracking(NOTHING, None, {"HF_MLFLOW_LOG_ARTIFACTS": "maybe"})


def test_resolving_options_imports_no_large_package() -> None:
    code = (
        "import sys; from finetuning.tracking.settings import *; import finetuning.tracking.mlflow.tracker;"
        "import finetuning.tracking.mlflow.sync, finetuning.tracking.tracker;"
        "resolve_tracking(TrackingOptions(), None, {});"
        "loaded = {'mlflow', 'torch', 'transformers', 'requests'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        ("file:///a b/runs", "MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri file:///a%20b/runs"),
        ("sqlite:////a/m.db", "mlflow ui --backend-store-uri sqlite:////a/m.db"),
        ("http://host:5000", None),
    ],
)
def test_a_local_store_gets_a_command_that_shows_it(uri: str, command: str | None) -> None:
    assert resolve_tracking(TrackingOptions(uri), None, {}).ui_command == command
