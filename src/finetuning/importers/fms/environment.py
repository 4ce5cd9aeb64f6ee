"""Read an fms-hf-tuning job from the environment, and plan its processes."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finetuning.config.yaml.document import ConfigDocument, YamlSection
from finetuning.config.yaml.reader import parse_document, read_document
from finetuning.errors import ConfigError
from finetuning.importers.translation import Translation
from finetuning.launch.processes import Launch, preset_file, require_deepspeed, to_flags

JSON_PATH = "SFT_TRAINER_CONFIG_JSON_PATH"
JSON_TEXT = "SFT_TRAINER_CONFIG_JSON_ENV_VAR"
_ALL_GPUS = "SET_NUM_PROCESSES_TO_NUM_GPUS"
_FSDP_DEFAULTS = "FSDP_DEFAULTS_FILE_PATH"
_SCRIPT = "TRAINING_SCRIPT"
_PRESET = preset_file("fsdp2")
_STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD"}
"""accelerate's names of FSDP1's sharding strategies by their numbers."""
_FSDP1_FLAGS = frozenset(
    {
        "use_fsdp", "fsdp_version", "fsdp_sharding_strategy", "fsdp_backward_prefetch", "fsdp_backward_prefetch_policy",
        "fsdp_forward_prefetch", "fsdp_use_orig_params", "fsdp_sync_module_states",
    }
)  # fmt: skip
"""Flags of accelerate that FSDP2 does not read, or that choose between both versions."""


@dataclass(frozen=True)
class JobLaunch:
    """The processes of a job and the variables added to their environment."""

    launch: Launch
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """Settings of the job that were overridden."""


def read_job(environ: Mapping[str, str] = os.environ) -> ConfigDocument:
    """Return the job's JSON. The encoded text overrides the path; empty variables are ignored.

    Raises:
        ConfigError: neither is set, or it is not a JSON object. A pickle, which could run code, is never loaded.
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
        raise ConfigError(f"{JSON_TEXT} is not base64", hint="Encode the JSON: base64 -w0 config.json") from None
    if content.startswith(b"\x80"):
        raise ConfigError(f"{JSON_TEXT} contains a pickle, which could run code; encode JSON text instead")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{JSON_TEXT} is not base64-encoded UTF-8 text") from None


def check_training_script(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if $TRAINING_SCRIPT names another script than fms-hf-tuning's own, which cannot run here."""
    script = environ.get(_SCRIPT, "")
    if script and Path(script).name not in ("sft_trainer", "sft_trainer.py", "tuning.sft_trainer"):
        raise ConfigError(
            f"{_SCRIPT} is {script}: `finetuning job` runs its own training, and no other script",
            hint="Unset it, or start the script with `accelerate launch`.",
        )


def plan_launch(job: ConfigDocument, gpus: int, environ: Mapping[str, str] = os.environ) -> JobLaunch:
    """Plan the processes of a job.

    One process per GPU, unless SET_NUM_PROCESSES_TO_NUM_GPUS is false. In that case, and without GPUs, num_processes
    of `accelerate_launch_args` or of its config_file, or else one. Several processes on GPUs shard the model: with
    FSDP_DEFAULTS_FILE_PATH if that file exists, otherwise with the preset fsdp2.

    Raises:
        ConfigError: `accelerate_launch_args` has a key or a value that accelerate does not accept.
    """
    try:
        return _plan_launch(job, gpus, environ)
    except ConfigError as error:
        prefix, location = "accelerate_launch_args: ", job.location_of(("accelerate_launch_args",))
        error.problems = tuple(
            replace(problem, message=problem.message.removeprefix(prefix), location=location)
            if problem.message.startswith(prefix)
            else problem
            for problem in error.problems
        )
        raise


def _plan_launch(job: ConfigDocument, gpus: int, environ: Mapping[str, str]) -> JobLaunch:
    translation = Translation(job)
    args = translation.get("accelerate_launch_args", {})
    if not isinstance(args, dict):
        translation.add_error("accelerate_launch_args", "must be a mapping of long flags of accelerate launch")
        translation.finish()
    args = dict(args)
    custom_file = args.pop("config_file", None)
    values = require_deepspeed(Path(custom_file)) if custom_file else {}
    requested = args.pop("num_processes", None)
    machines = _count("num_machines", args.pop("num_machines", None), values)
    processes = _count("num_processes", requested, values)
    notes = []
    if gpus and environ.get(_ALL_GPUS, "").lower() != "false":
        if requested is not None and processes != gpus * machines:
            notes.append(
                f"num_processes is {gpus * machines}, one per GPU, instead of {processes}; to keep it, set"
                f" {_ALL_GPUS}=False"
            )
        processes = gpus * machines
    config_file = Path(custom_file) if custom_file else None
    if config_file is None and processes > 1:
        config_file = _sharding_config(gpus, environ)
        if config_file == _PRESET:
            config_file = _own_fsdp(job, args, notes) or _with_preset(args, notes)
    if config_file is not None and not gpus:
        _require_no_fsdp(config_file, translation)
    environment = _environment(args.pop("env", None))
    return JobLaunch(Launch(processes, machines, config_file, tuple(to_flags(args))), environment, tuple(notes))


def _sharding_config(gpus: int, environ: Mapping[str, str]) -> Path | None:
    defaults = environ.get(_FSDP_DEFAULTS)
    if defaults and Path(defaults).is_file():
        return Path(defaults)
    return _PRESET if gpus else None


def _with_preset(args: YamlSection, notes: list[str]) -> Path:
    """Translate FSDP1 flags of a job to those of our preset, which is FSDP2, and return the preset to use."""
    preset = "fsdp2"
    for flag in [name for name in args if name in _FSDP1_FLAGS]:
        value = str(args.pop(flag)).upper()
        if flag != "fsdp_sharding_strategy":
            if flag not in ("use_fsdp", "fsdp_version") or value == "1":
                notes.append(f"accelerate_launch_args: {flag} belongs to FSDP1 and has no effect with FSDP2")
            continue
        strategy = _STRATEGIES.get(value, value)
        if strategy not in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
            raise ConfigError(
                f"accelerate_launch_args: fsdp_sharding_strategy {strategy} is not supported without a config_file"
            )
        if strategy == "NO_SHARD":
            preset = "ddp"
        args["fsdp_reshard_after_forward"] = "false" if strategy == "SHARD_GRAD_OP" else "true"
    if preset == "ddp":
        for flag in [name for name in args if str(name).startswith("fsdp_")]:
            del args[flag]
    return preset_file(preset)


def _own_fsdp(job: ConfigDocument, args: YamlSection, notes: list[str]) -> Path | None:
    """Return the preset without sharding if the job has `fsdp`, with which the trainer shards the model itself."""
    if str(job.values.get("fsdp") or "false").lower() == "false":
        return None
    for flag in [name for name in args if name in _FSDP1_FLAGS or str(name).startswith("fsdp_")]:
        del args[flag]
        notes.append(f"accelerate_launch_args: {flag} has no effect: fsdp and fsdp_config of the job shard the model")
    return preset_file("ddp")


def _require_no_fsdp(config_file: Path, translation: Translation) -> None:
    """Refuse an accelerate config that shards the model with FSDP on a machine without GPUs."""
    if str(read_document(config_file).values.get("distributed_type", "")).upper() == "FSDP":
        translation.add_error(
            "accelerate_launch_args",
            f"{config_file} shards the model with FSDP, which needs GPUs, and this machine has none",
            "Remove config_file and FSDP_DEFAULTS_FILE_PATH to train on the CPU.",
        )
        translation.finish()


def _count(key: str, requested: object, config: YamlSection) -> int:
    value = requested if requested is not None else config.get(key, 1)
    count = int(str(value)) if str(value).isdecimal() else 0
    if count < 1:
        raise ConfigError(f"accelerate_launch_args: {key} must be a positive integer, not {value!r}")
    return count


def _environment(value: object) -> dict[str, str]:
    """Parse `env`: one NAME=VALUE or a list of them."""
    items = value if isinstance(value, list) else [value] if value else []
    pairs = [str(item).partition("=") for item in items]
    if any(not name or not separator for name, separator, _ in pairs):
        raise ConfigError("accelerate_launch_args: env must be a list of NAME=VALUE")
    return {name: text for name, _, text in pairs}
