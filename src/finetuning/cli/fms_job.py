"""`finetuning job` and `accelerate_launch`: run an fms-hf-tuning JSON job as that engine's image does."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import TERMINATION_LOG, report_for_processes, reported_errors, run_command
from finetuning.errors import EXIT_OK, EXIT_USER, ConfigError

if TYPE_CHECKING:
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.importers.translation import Translation

_KUBERNETES_LOG = Path("/dev/termination-log")
_LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "critical": "CRITICAL"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning job`."""
    parser = argparse.ArgumentParser(
        prog="finetuning job",
        description="Run an fms-hf-tuning JSON job, read from SFT_TRAINER_CONFIG_JSON_ENV_VAR (base64) or"
        " SFT_TRAINER_CONFIG_JSON_PATH. docs/moving-from/fms-hf-tuning.md lists the environment variables.",
    )
    parser.add_argument("config", nargs="?", help="the JSON file; overrides the environment variables")
    parser.add_argument("--dry-run", action="store_true", help="validate the job and print the plan; do not train")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    if TERMINATION_LOG not in os.environ and _KUBERNETES_LOG.exists():
        os.environ[TERMINATION_LOG] = str(_KUBERNETES_LOG)
    return run_command(_run_job, argv)


def _run_job(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    from finetuning.config.yaml.reader import read_document
    from finetuning.importers import to_yaml
    from finetuning.importers.fms.environment import plan_launch, read_job
    from finetuning.importers.fms.job import from_fms
    from finetuning.launch.processes import start, visible_gpus

    job = read_document(options.config) if options.config else read_job()
    planned = plan_launch(job, visible_gpus())
    translation = from_fms(job, planned.launch.processes)
    for note in (*planned.notes, *translation.notes):
        print(f"warning: {note}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="finetuning-job-") as folder:
        config = Path(folder) / "experiment.yaml"
        config.write_text(to_yaml(translation, "fms-hf-tuning"), encoding="utf-8")
        command = ["sft", str(config), "--logging-level", _level(job), *["--dry-run"] * options.dry_run]
        before = reported_errors()
        code = start(planned.launch, command, planned.environment)
    if code != EXIT_OK:
        if code == EXIT_USER:
            print(f"note: `finetuning import` prints {config.name} for this job", file=sys.stderr)
        report_for_processes(code, before)
        return code
    if not options.dry_run and translation.boolean("lora_post_process_for_vllm", False):
        _convert_for_vllm(translation)
    return EXIT_OK


def _level(job: ConfigDocument) -> str:
    """Return the logging level of $LOG_LEVEL or of the job's log_level; INFO for `passive` or neither."""
    level = os.environ.get("LOG_LEVEL") or job.values.get("log_level") or "passive"
    return _LEVELS.get(str(level).lower(), "INFO")


def _convert_for_vllm(translation: Translation) -> None:
    """Convert the saved adapters for vLLM in place, with the embeddings of new tokens in a separate file."""
    from finetuning.export.vllm.convert import make_vllm_compatible

    values = translation.values
    final = Path(values["training_args"]["output_dir"]) / "checkpoint-final"
    for folder in dict.fromkeys([final, Path(values.get("save_model_dir") or final)]):
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"lora_post_process_for_vllm: no adapter in {folder}; it requires peft_method: lora")
        result = make_vllm_compatible(folder, new_embeddings=True)
        print(f"vLLM-compatible adapter: {result.folder}")


if __name__ == "__main__":
    sys.exit(main())
