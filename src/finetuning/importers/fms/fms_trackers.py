"""The trackers of an fms-hf-tuning job, and what they are told besides."""

from __future__ import annotations

import json

from finetuning.config.sections.trackers import NAMES
from finetuning.importers.fms import keys
from finetuning.importers.translation import Translation

_KNOWN = ("file_logger", "mlflow", "aim", "clearml", "hf_resource_scanner", "none")
_CARRIED = (
    "clearml_project",
    "clearml_task",
    "scanner_output_filename",
    "run_uri_export_path",
)


def put_trackers(out: Translation) -> None:
    """`tracking`, from `trackers` and the keys of each."""
    trackers = out.items("trackers") or ["file_logger"]
    known = list(dict.fromkeys([*_KNOWN, *NAMES]))
    for tracker in trackers:
        if tracker not in known:
            out.wrong("trackers", f"there is no tracker {tracker!r}; they are {', '.join(_KNOWN[:-1])}")
    others = [tracker for tracker in trackers if tracker in NAMES and tracker not in ("mlflow", "file_logger")]
    out.put("tracking.trackers", others or None)
    if "mlflow" in trackers and not out.has("mlflow_tracking_uri"):
        out.wrong("trackers", "mlflow needs mlflow_tracking_uri")
    if "mlflow" in trackers:
        out.put("tracking.mlflow_server_uri", out.get("mlflow_tracking_uri"))
    if "mlflow" in trackers or others:
        own = [out.get(f"{name}_experiment") for name in ("mlflow", "aim") if name in trackers]
        experiment = next((name for name in own if name), None)
        if len({name or out.get("experiment", keys.EXPERIMENT) for name in own}) > 1:
            out.note("aim_experiment", f"all trackers are told one name: {experiment}")
        out.put("tracking.experiment_name", experiment or out.get("experiment", keys.EXPERIMENT))
        out.put("tracking.run_name", out.get("run_name"))
    for key in _CARRIED:
        out.put(f"tracking.{key}", out.get(key))
    _put_aim(out)
    if "aim" in trackers and not any(out.has(key) for key in ("aim_repo", "aim_url", "aim_remote_server_ip")):
        out.wrong("trackers", "aim needs aim_repo, or aim_remote_server_ip and aim_remote_server_port")
    if out.get("training_logs_filename", "training_logs.jsonl") != "training_logs.jsonl":
        out.note("training_logs_filename", "the file is called training_logs.jsonl")
    _put_metadata(out)


def _put_aim(out: Translation) -> None:
    """The server with its port counts first, then the address, then the folder."""
    if out.has("aim_remote_server_ip") and (out.has("aim_remote_server_port") or not _aim_repo(out)):
        out.put("tracking.aim_remote_server_ip", out.get("aim_remote_server_ip"))
        out.put("tracking.aim_remote_server_port", out.number("aim_remote_server_port", 53800))
    else:
        out.put("tracking.aim_repo", _aim_repo(out))


def _aim_repo(out: Translation) -> str | None:
    return out.get("aim_url", out.get("aim_repo"))


def _put_metadata(out: Translation) -> None:
    """Names and values for every tracker: a JSON object, or one written as text."""
    metadata = out.get("exp_metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = [metadata]
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        out.wrong("exp_metadata", "must be a JSON object")
        return
    plain = (str, int, float, bool)
    told = {str(key): value if isinstance(value, plain) else json.dumps(value) for key, value in metadata.items()}
    out.put("tracking.exp_metadata", told or None)
