"""Whether and where a run is tracked, and who said so.

A resolved config as parameters of a tracker: flat, short and without secrets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from finetuning.config.redaction import drop_secrets, is_secret_key, strip_user_info
from finetuning.config.sections.tracking import TrackingConfig
from finetuning.errors import ConfigError, Location

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}
_DATABASES = {"postgresql", "mysql", "mssql"}
_SCHEMES = {"http", "https", "file", "sqlite", "databricks", "databricks-uc", "uc"} | _DATABASES
_BARE_HOST = re.compile(r"^[A-Za-z0-9.-]+:\d+(/.*)?$")
_COMMAND_LINE = "command line"
_DEFAULT = "default"


@dataclass(frozen=True)
class ResolvedValue:
    """A value and where it came from, such as `command line: --experiment-name`."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.value} ({self.origin})"


@dataclass(frozen=True)
class TrackingOptions:
    """The three tracking options of the command line; None where one was not given."""

    mlflow_server_uri: str | None = None
    experiment_name: str | None = None
    hf_mlflow_log_artifacts: bool | str | None = None


@dataclass(frozen=True)
class TrackingPlan:
    """Where the run is tracked. `uri.value` is None when nothing is; its origin then says why.

    The address is absolute and free of secrets. `run_name` is None where MLflow's run gets a generated name, and
    `experiment` where it goes to MLflow's own default experiment.
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
    """Whether each job is a run of its own, below one that stands for all of them."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """The user's own tags of the run."""

    @property
    def enabled(self) -> bool:
        return self.uri.value is not None

    @property
    def is_local(self) -> bool:
        """True for a store on a disk of this machine, with no server in between."""
        return self.enabled and urlsplit(self.uri.value).scheme in ("file", "sqlite")

    def __str__(self) -> str:
        if not self.enabled:
            return f"not tracked ({self.uri.origin})"
        return f"{self.uri.value}, experiment {self.experiment.value or 'Default'} ({self.uri.origin})"


def resolve_tracking(cli: TrackingOptions, section: TrackingConfig | None, environ: Mapping[str, str]) -> TrackingPlan:
    """The tracking of this run: command line over file over environment, for each value apart.

    An experiment named on the command line goes to the address of the file or of the environment. Empty values count
    as not given. DISABLE_MLFLOW_INTEGRATION switches everything off, whatever else is set.

    Raises:
        ConfigError: an address that MLflow cannot mean, or one with a password in it (which is not shown).
    """
    file = {name: getattr(section, name) for name in section.model_fields_set} if section else {}

    def first(option: str, key: str, variable: str, default: Any = None) -> ResolvedValue:
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
        uri = ResolvedValue(None, "switched off by DISABLE_MLFLOW_INTEGRATION")
    elif uri.value is None and "mlflow" in file.get("trackers", ()):
        raise ConfigError(
            "holds mlflow, which needs an address",
            place=Location(key="tracking.trackers"),
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


def _first(*candidates: tuple[Any, str], default: Any) -> ResolvedValue:
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
    """The tags of MLFLOW_TAGS, a JSON object; none where it is empty."""
    try:
        tags = json.loads(text) if text.strip() else {}
    except ValueError:
        tags = None
    if not isinstance(tags, dict):
        raise ConfigError('environment: MLFLOW_TAGS: expected a JSON object, such as {"team": "search"}')
    return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in tags.items()}


def _checked_uri(setting: ResolvedValue) -> ResolvedValue:
    """The setting with an absolute address in place of a relative path."""
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
        raise _error(setting, f'MLflow has no store of the kind "{scheme}"', f"It has: {', '.join(sorted(_SCHEMES))}.")
    if scheme == "file":
        return ResolvedValue(_absolute_file(setting, parts.netloc, text), setting.origin)
    if scheme == "sqlite":
        return ResolvedValue(_absolute_sqlite(setting, text), setting.origin)
    if scheme in ("http", "https") and not parts.hostname:
        raise _error(setting, "the address names no host", 'It looks like "http://host:5000".')
    return ResolvedValue(text, setting.origin)


def _split(setting: ResolvedValue, text: str) -> Any:
    """The address in parts, refused when it holds a password. No message shows the address, which may hold one."""
    try:
        parts = urlsplit(text)
        secret = parts.password is not None or any(is_secret_key(key) for key, _ in parse_qsl(parts.query))
        user = parts.username
        _ = parts.port
    except ValueError:
        raise _error(setting, "this is no address", 'It looks like "http://host:5000".') from None
    if secret or (user is not None and parts.scheme in ("http", "https")):
        is_database = parts.scheme.split("+")[0] in _DATABASES
        hint = (
            "Take it out; the database driver's own password file or environment variable holds it."
            if is_database
            else "Take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
        raise _error(setting, "the address holds a user or a password, which would end up in logs", hint)
    return parts


def _absolute_file(setting: ResolvedValue, host: str, text: str) -> str:
    if host not in ("", "localhost"):
        hint = f'An absolute path has three slashes: "file:///{host}/…".'
        raise _error(setting, f'"{text}" names the host "{host}"', hint)
    return Path(unquote(urlsplit(text).path)).expanduser().absolute().as_uri()


def _absolute_sqlite(setting: ResolvedValue, text: str) -> str:
    path, _, query = text.partition("?")
    if not path.startswith("sqlite:///") or path == "sqlite:///":
        raise _error(setting, f'"{text}" names no file', 'It looks like "sqlite:///mlflow.db".')
    absolute = os.path.abspath(path.removeprefix("sqlite:///"))
    return f"sqlite:///{absolute}" + (f"?{query}" if query else "")


def _error(setting: ResolvedValue, message: str, hint: str) -> ConfigError:
    if setting.origin.startswith("file: "):
        return ConfigError(message, place=Location(key=setting.origin.removeprefix("file: ")), hint=hint)
    return ConfigError(f"{setting.origin}: {message}", hint=hint)


LONGEST_VALUE = 6000
LONGEST_KEY = 250
_PACKAGES = ("finetuning", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def parameters(config: Mapping[str, Any], *, flatten: bool = True) -> dict[str, str]:
    """Text values by dotted keys, at most 6000 characters each; without `flatten`, one JSON text a section.

    Keys that look like secrets are left out, and user and password are taken out of addresses. The whole config goes
    to the tracker as a file; this is what its users sort and filter by.

    >>> parameters({"run_conf": {"model": "m", "token": "hf_x"}, "seeds": [1, 2]})
    {'run_conf.model': 'm', 'seeds': '[1, 2]'}
    """
    pairs = _leaves(config, ()) if flatten else drop_secrets(dict(config)).items()
    return {str(key)[:LONGEST_KEY]: _cut(strip_user_info(_text(value))) for key, value in pairs}


def version_tags() -> dict[str, str]:
    """The versions that a run depends on, as tags; nothing is imported for it."""
    tags = {"version.python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return tags


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            if not is_secret_key(key):
                yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield ".".join(path), value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, bytes)):
        return json.dumps(drop_secrets(value), ensure_ascii=False, default=str)
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
