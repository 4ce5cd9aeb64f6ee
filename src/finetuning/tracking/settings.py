"""Resolves the MLflow options of a run, and turns its config into parameters and tags for trackers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from finetuning.config.redaction import is_secret_key, redact_values
from finetuning.config.sections.tracking import TrackingConfig
from finetuning.config.yaml.document import YamlValue
from finetuning.errors import ConfigError, Location, parse_json

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}
_DATABASES = {"postgresql", "mysql", "mssql"}
_SCHEMES = {"http", "https", "file", "sqlite", "databricks", "databricks-uc", "uc"} | _DATABASES
_BARE_HOST = re.compile(r"^[A-Za-z0-9.-]+:\d+(/.*)?$")
_COMMAND_LINE = "command line"
_DEFAULT = "default"


@dataclass(frozen=True)
class ResolvedValue:
    """A value and its origin, such as `command line: --experiment-name`."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.value} ({self.origin})"


@dataclass(frozen=True)
class TrackingOptions:
    """The tracking options of the command line; None for those not passed."""

    mlflow_server_uri: str | None = None
    experiment_name: str | None = None
    hf_mlflow_log_artifacts: bool | str | None = None


@dataclass(frozen=True)
class TrackingPlan:
    """Where MLflow tracks the run. `uri.value` is None if it does not; the origin then says why.

    The address is absolute and holds no secret. If `run_name` is None, MLflow's run gets a generated name; if
    `experiment` is None, it goes to MLflow's default experiment.
    """

    uri: ResolvedValue
    experiment: ResolvedValue
    run_id: ResolvedValue
    run_name: ResolvedValue
    log_artifacts: ResolvedValue
    flatten_params: ResolvedValue
    parent_run_id: ResolvedValue = ResolvedValue(None, "default")
    system_metrics: ResolvedValue = ResolvedValue(False, "default")
    child_runs: bool = False
    """Whether each job is a run of its own, below a parent run for all jobs."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags that the user has set."""

    @property
    def enabled(self) -> bool:
        return self.uri.value is not None

    @property
    def is_local(self) -> bool:
        """Whether the store is a local file or database, without a server."""
        return self.enabled and urlsplit(self.uri.value).scheme in ("file", "sqlite")

    @property
    def ui_command(self) -> str | None:
        """The command that shows a local store in a browser; None for a server, which has its own page.

        MLflow 3.17 serves a folder only if an environment variable allows it.
        """
        if not self.is_local:
            return None
        allowed = "MLFLOW_ALLOW_FILE_STORE=true " if urlsplit(self.uri.value).scheme == "file" else ""
        return f"{allowed}mlflow ui --backend-store-uri {shlex.quote(self.uri.value)}"

    def __str__(self) -> str:
        if not self.enabled:
            return f"not tracked ({self.uri.origin})"
        return f"{self.uri.value}, experiment {self.experiment.value or 'Default'} ({self.uri.origin})"


def resolve_tracking(cli: TrackingOptions, section: TrackingConfig | None, environ: Mapping[str, str]) -> TrackingPlan:
    """Resolve each tracking option: command line over config file over environment. Empty values are ignored.

    DISABLE_MLFLOW_INTEGRATION disables tracking, whatever else is set.

    Raises:
        ConfigError: the address is not valid for MLflow, or it contains a password (which is not printed).
    """
    file = {name: getattr(section, name) for name in section.model_fields_set} if section else {}

    def first(option: str, key: str, variable: str, default: object = None) -> ResolvedValue:
        return _first(
            (getattr(cli, key, None), f"{_COMMAND_LINE}: {option}"),
            (file.get(key), f"file: tracking.{key}"),
            (environ.get(variable), f"environment: {variable}"),
            default=default,
        )

    uri = _checked_uri(first("--mlflow-server-uri", "mlflow_server_uri", "MLFLOW_TRACKING_URI"))
    if uri.value is None:
        uri = ResolvedValue(None, "no address on the command line, in the file or in the environment")
    disabled = environ.get("DISABLE_MLFLOW_INTEGRATION")
    if disabled and _flag(ResolvedValue(disabled, "environment: DISABLE_MLFLOW_INTEGRATION")).value:
        uri = ResolvedValue(None, "disabled by DISABLE_MLFLOW_INTEGRATION")
    elif uri.value is None and "mlflow" in file.get("trackers", ()):
        raise ConfigError(
            "includes mlflow, which needs an address",
            location=Location(key="tracking.trackers"),
            hint="Set tracking.mlflow_server_uri, --mlflow-server-uri or MLFLOW_TRACKING_URI.",
        )
    run_id, parent = first("", "run_id", "MLFLOW_RUN_ID"), first("", "parent_run_id", "MLFLOW_PARENT_RUN_ID")
    if (
        run_id.value
        and _flag(ResolvedValue(environ.get("MLFLOW_NESTED_RUN", ""), "environment: MLFLOW_NESTED_RUN")).value
    ):
        run_id, parent = ResolvedValue(None, _DEFAULT), run_id
    return TrackingPlan(
        uri=uri,
        experiment=first("--experiment-name", "experiment_name", "MLFLOW_EXPERIMENT_NAME"),
        run_id=run_id,
        parent_run_id=parent,
        child_runs=file.get("resumed_jobs") == "child runs",
        system_metrics=_flag(first("", "log_system_metrics", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", False)),
        tags={**_tags(environ.get("MLFLOW_TAGS", "")), **{k: str(v) for k, v in file.get("exp_metadata", {}).items()}},
        run_name=first("", "run_name", "MLFLOW_RUN_NAME"),
        log_artifacts=_flag(
            first("--hf-mlflow-log-artifacts", "hf_mlflow_log_artifacts", "HF_MLFLOW_LOG_ARTIFACTS", False)
        ),
        flatten_params=_flag(first("", "flatten_params", "MLFLOW_FLATTEN_PARAMS", True)),
    )


def _first(*candidates: tuple[object, str], default: object) -> ResolvedValue:
    for value, origin in candidates:
        if value is not None and value != "":
            return ResolvedValue(value, origin)
    return ResolvedValue(default, _DEFAULT)


def _flag(setting: ResolvedValue) -> ResolvedValue:
    if isinstance(setting.value, bool):
        return setting
    text = str(setting.value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ConfigError(f"{setting.origin}: expected true or false, got {setting.value!r}")
    return ResolvedValue(text in _TRUE, setting.origin)


def _tags(text: str) -> dict[str, str]:
    """Parse the tags of MLFLOW_TAGS, a JSON object."""
    try:
        tags = parse_json(text) if text.strip() else {}
    except ValueError:
        tags = None
    if not isinstance(tags, dict):
        raise ConfigError('environment: MLFLOW_TAGS: expected a JSON object, such as {"team": "search"}')
    return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in tags.items()}


def _checked_uri(setting: ResolvedValue) -> ResolvedValue:
    """Return the address, validated; a relative path becomes absolute."""
    if setting.value is None:
        return setting
    text = str(setting.value).strip()
    if _BARE_HOST.match(text):
        raise _error(setting, f'"{text}" has no scheme', f'Write "http://{text}" or "https://{text}".')
    if "://" not in text and not text.startswith(("file:", "sqlite:", "databricks", "uc:")):
        return ResolvedValue(Path(text).expanduser().absolute().as_uri(), setting.origin)
    parts = _split(setting, text)
    scheme = parts.scheme.split("+")[0].lower()
    if text.startswith("databricks"):
        return ResolvedValue(text, setting.origin)
    if scheme not in _SCHEMES:
        raise _error(
            setting, f'MLflow does not support the scheme "{scheme}"', f"Use one of: {', '.join(sorted(_SCHEMES))}."
        )
    if scheme == "file":
        return ResolvedValue(_absolute_file(setting, parts.netloc, text), setting.origin)
    if scheme == "sqlite":
        return ResolvedValue(_absolute_sqlite(setting, text), setting.origin)
    if scheme in ("http", "https") and not parts.hostname:
        raise _error(setting, "the address has no host", 'Example: "http://host:5000".')
    return ResolvedValue(text, setting.origin)


def _split(setting: ResolvedValue, text: str) -> SplitResult:
    """Split the address. Raise ConfigError if it contains a password; no message prints it, as it may contain one."""
    try:
        parts = urlsplit(text)
        secret = parts.password is not None or any(is_secret_key(key) for key, _ in parse_qsl(parts.query))
        user = parts.username
        _ = parts.port
    except ValueError:
        raise _error(setting, "not a valid address", 'Example: "http://host:5000".') from None
    if secret or (user is not None and parts.scheme in ("http", "https")):
        is_database = parts.scheme.split("+")[0] in _DATABASES
        hint = (
            "Remove it and use the password file or environment variable of the database driver."
            if is_database
            else "Remove it and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
        raise _error(setting, "the address contains a user or a password, which would be logged", hint)
    return parts


def _absolute_file(setting: ResolvedValue, host: str, text: str) -> str:
    if host not in ("", "localhost"):
        hint = f'An absolute path has three slashes: "file:///{host}/…".'
        raise _error(setting, f'"{text}" has the host "{host}"', hint)
    return Path(unquote(urlsplit(text).path)).expanduser().absolute().as_uri()


def _absolute_sqlite(setting: ResolvedValue, text: str) -> str:
    path, _, query = text.partition("?")
    if not path.startswith("sqlite:///") or path == "sqlite:///":
        raise _error(setting, f'"{text}" has no file name', 'Example: "sqlite:///mlflow.db".')
    absolute = os.path.abspath(path.removeprefix("sqlite:///"))
    return f"sqlite:///{absolute}" + (f"?{query}" if query else "")


def _error(setting: ResolvedValue, message: str, hint: str) -> ConfigError:
    if setting.origin.startswith("file: "):
        return ConfigError(message, location=Location(key=setting.origin.removeprefix("file: ")), hint=hint)
    return ConfigError(f"{setting.origin}: {message}", hint=hint)


MAX_VALUE_LENGTH = 6000
MAX_KEY_LENGTH = 250
_PACKAGES = ("finetuning", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def parameters(config: Mapping[str, YamlValue], *, flatten: bool = True) -> dict[str, str]:
    """Return text values by dotted keys, at most 6000 characters each; without `flatten`, one JSON text per section.

    Values that are not set are left out, and secrets redacted. The full config is uploaded as a file; parameters are
    for sorting and filtering runs.

    >>> parameters({"run_conf": {"model": "m", "token": "hf_x"}, "seeds": [1, 2]})
    {'run_conf.model': 'm', 'seeds': '[1, 2]'}
    """
    redacted = redact_values(config)
    pairs = _leaves(redacted, ()) if flatten else redacted.items()
    return {str(key)[:MAX_KEY_LENGTH]: _truncate(_text(value)) for key, value in pairs if value is not None}


def version_tags() -> dict[str, str]:
    """Return the versions of Python, platform and packages as tags, without importing the packages."""
    tags = {"version.python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return tags


def _leaves(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield ".".join(path), value


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, bytes)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 1] + "…"
