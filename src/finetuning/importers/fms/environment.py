"""What the image of fms-hf-tuning reads of its environment, and how a job is launched."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.config.yaml.document import ConfigDocument
from finetuning.config.yaml.reader import parse_document, read_document
from finetuning.errors import ConfigError
from finetuning.importers.translation import Translation
from finetuning.launch.processes import Launch, preset_file, require_deepspeed, to_flags

JSON_PATH = "SFT_TRAINER_CONFIG_JSON_PATH"
JSON_TEXT = "SFT_TRAINER_CONFIG_JSON_ENV_VAR"
_ALL_GPUS = "SET_NUM_PROCESSES_TO_NUM_GPUS"
_FSDP_DEFAULTS = "FSDP_DEFAULTS_FILE_PATH"


@dataclass(frozen=True)
class JobLaunch:
    """How a job runs: its processes, what is added to their environment, and what was decided otherwise than asked."""

    launch: Launch
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_job(environ: Mapping[str, str] = os.environ) -> ConfigDocument:
    """The job's JSON: the encoded text wins over the path; an empty variable is none.

    Raises:
        ConfigError: neither is set, or it is no JSON object. A pickle, which would run code, is never opened.
    """
    if environ.get(JSON_TEXT):
        return parse_document(_decode(environ[JSON_TEXT]), JSON_TEXT)
    if environ.get(JSON_PATH):
        return read_document(environ[JSON_PATH])
    raise ConfigError(f"Must set environment variable '{JSON_PATH}' or '{JSON_TEXT}'.")


def _decode(value: str) -> str:
    try:
        content = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(f"{JSON_TEXT} is no base64", hint="Encode the JSON: base64 -w0 config.json") from None
    if content.startswith(b"\x80"):
        raise ConfigError(f"{JSON_TEXT} holds a pickle, which could run any code; give the base64 of JSON text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{JSON_TEXT} is no base64 of UTF-8 text") from None


def plan_launch(job: ConfigDocument, gpus: int, environ: Mapping[str, str] = os.environ) -> JobLaunch:
    """The processes that a job asks for.

    As many as there are GPUs, unless SET_NUM_PROCESSES_TO_NUM_GPUS is false; then, and without GPUs, num_processes of
    `accelerate_launch_args` or of its config_file, else one. More than one on GPUs share out the model: by
    FSDP_DEFAULTS_FILE_PATH where that file exists, else by the preset fsdp2.

    Raises:
        ConfigError: `accelerate_launch_args` has a key or a value that accelerate does not know.
    """
    given = Translation(job)
    args = given.get("accelerate_launch_args", {})
    if not isinstance(args, dict):
        given.wrong("accelerate_launch_args", "must be keys and values: long flags of accelerate launch")
        given.finished()
    args = dict(args)
    own_file = args.pop("config_file", None)
    values = require_deepspeed(Path(own_file)) if own_file else {}
    wanted = args.pop("num_processes", None)
    machines = _count("num_machines", args.pop("num_machines", None), values)
    processes = _count("num_processes", wanted, values)
    notes = []
    if gpus and environ.get(_ALL_GPUS, "").lower() != "false":
        if wanted is not None and processes != gpus * machines:
            notes.append(
                f"num_processes is {gpus * machines}, one a GPU, and not {processes}; {_ALL_GPUS}=False keeps it"
            )
        processes = gpus * machines
    config_file = Path(own_file) if own_file else None
    if config_file is None and processes > 1:
        config_file = _sharing(gpus, environ)
    environment = _environment(args.pop("env", None))
    return JobLaunch(Launch(processes, machines, config_file, tuple(to_flags(args))), environment, tuple(notes))


def _sharing(gpus: int, environ: Mapping[str, str]) -> Path | None:
    defaults = environ.get(_FSDP_DEFAULTS)
    if defaults and Path(defaults).is_file():
        return Path(defaults)
    return preset_file("fsdp2") if gpus else None


def _count(key: str, given: Any, config: Mapping[str, Any]) -> int:
    value = given if given is not None else config.get(key, 1)
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"accelerate_launch_args: {key} must be a whole number from 1, not {value!r}")
    return int(value)


def _environment(value: Any) -> dict[str, str]:
    """The list `env`: NAME=VALUE each."""
    pairs = [str(one).partition("=") for one in (value if isinstance(value, list) else [value] if value else [])]
    if any(not name or not sign for name, sign, _ in pairs):
        raise ConfigError("accelerate_launch_args: env is a list of NAME=VALUE")
    return {name: text for name, _, text in pairs}
