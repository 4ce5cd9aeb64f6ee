"""`finetuning job` and `accelerate_launch`: a job of fms-hf-tuning, as its image runs it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.cli.errors import run
from finetuning.cli.failures import TERMINATION_LOG, speak_for_processes, told_so_far
from finetuning.errors import EXIT_OK, EXIT_USER, ConfigError

if TYPE_CHECKING:
    from finetuning.config.yaml.document import Document
    from finetuning.importers.fms.job import Readers

_KUBERNETES_LOG = Path("/dev/termination-log")
_LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "critical": "CRITICAL"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns its exit code."""
    if TERMINATION_LOG not in os.environ and _KUBERNETES_LOG.exists():
        os.environ[TERMINATION_LOG] = str(_KUBERNETES_LOG)
    return run(_job, argv)


def _job(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="finetuning job",
        description="Run the JSON job of fms-hf-tuning that SFT_TRAINER_CONFIG_JSON_ENV_VAR (base64) or"
        " SFT_TRAINER_CONFIG_JSON_PATH gives. docs/moving-from/fms-hf-tuning.md lists the variables.",
    )
    parser.add_argument("config", nargs="?", help="the JSON file, instead of the variables")
    parser.add_argument("--dry-run", action="store_true", help="check the job and print its plan; train nothing")
    options = parser.parse_args(argv)
    from finetuning.config.yaml.reader import read_document
    from finetuning.importers.fms.environment import plan_launch, read_job
    from finetuning.importers.fms.job import to_experiment
    from finetuning.importers.translation import written
    from finetuning.launch.processes import start, visible_gpus

    job = read_document(options.config) if options.config else read_job()
    planned = plan_launch(job, visible_gpus())
    translation = to_experiment(job, make_readers(), processes=planned.launch.processes)
    for note in (*planned.notes, *translation.notes):
        print(f"warning: {note}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="finetuning-job-") as folder:
        config = Path(folder) / "experiment.yaml"
        config.write_text(written(translation, "fms-hf-tuning", "sft"), encoding="utf-8")
        command = ["sft", str(config), "--logging-level", _level(job), *["--dry-run"] * options.dry_run]
        before = told_so_far()
        code = start(planned.launch, command, planned.environment)
    if code != EXIT_OK:
        if code == EXIT_USER:
            print(f"note: {config.name} is what `finetuning import` prints of this job", file=sys.stderr)
        speak_for_processes(code, before)
        return code
    if not options.dry_run and translation.truth("lora_post_process_for_vllm", False):
        _post_process(translation.values)
    return EXIT_OK


def make_readers() -> Readers:
    """What a translation may ask of the rooms that it does not know."""
    from finetuning.config.installed import Installed
    from finetuning.config.sections.experiment import SFTExperiment
    from finetuning.importers.fms.data_config import read_data_config
    from finetuning.importers.fms.job import Readers

    def training_fields() -> Collection[str]:
        return Installed().class_fields(SFTExperiment.trainer_config) or frozenset()

    return Readers(read_data_config, training_fields)


def _level(job: Document) -> str:
    """LOG_LEVEL, or the job's log_level; `passive` and nothing are INFO."""
    level = os.environ.get("LOG_LEVEL") or job.values.get("log_level") or "passive"
    return _LEVELS.get(str(level).lower(), "INFO")


def _post_process(values: Mapping[str, Any]) -> None:
    """Makes the adapters that were published loadable for vLLM, with rows of new tokens in a file of their own."""
    from finetuning.export.vllm.convert import make_vllm_compatible

    final = Path(values["training_args"]["output_dir"]) / "checkpoint-final"
    for folder in dict.fromkeys([final, Path(values.get("save_model_dir") or final)]):
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"lora_post_process_for_vllm: {folder} holds no adapter; it goes with peft_method lora")
        result = make_vllm_compatible(folder, new_embeddings=True)
        print(f"vLLM-compatible adapter: {result.folder}")


if __name__ == "__main__":
    sys.exit(main())
