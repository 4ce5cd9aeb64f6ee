"""`finetuning import`: the YAML that another engine's job stands for.

`finetuning job` and `accelerate_launch`: a job of fms-hf-tuning, as its image runs it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.cli.errors import TERMINATION_LOG, report_for_processes, reported_errors, run_command
from finetuning.errors import EXIT_OK, EXIT_USER, ConfigError

if TYPE_CHECKING:
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.importers.translation import Readers, Translation

ENGINES = ("fms-hf-tuning", "axolotl", "llama-factory", "trl")


def import_main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run_command(_import, argv)


def _import(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="finetuning import",
        description="Print the YAML that another engine's config stands for: a JSON job of fms-hf-tuning, or the YAML"
        " of axolotl, LLaMA-Factory or TRL. What could not be carried over is told on stderr and on top of the YAML.",
        epilog="finetuning import job.json > experiment.yaml",
    )
    parser.add_argument("config", help="the other engine's file")
    parser.add_argument("--from", dest="engine", choices=ENGINES, help="the engine (default: told by the keys)")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that the config was run on, which its batch is counted by"
    )
    options = parser.parse_args(argv)
    from finetuning.config.yaml.reader import read_document
    from finetuning.errors import ConfigError
    from finetuning.importers.translation import written

    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: must be at least 1")
    document = read_document(options.config)
    engine = options.engine or _engine(document)
    translation = _translate(engine, document, options.processes)
    method = translation.values.get("method", "sft")
    for note in translation.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(written(translation, engine, method), end="")
    return 0


def _engine(document: ConfigDocument) -> str:
    from finetuning.importers.other_engines import detect_engine

    of_jobs = {"training_data_path", "data_config_path"}
    return "fms-hf-tuning" if of_jobs & set(document.values) else detect_engine(document)


def _translate(engine: str, document: ConfigDocument, processes: int) -> Translation:
    if engine == "fms-hf-tuning":
        from finetuning.importers.fms.job import to_experiment

        return to_experiment(document, make_readers(), processes=processes)
    from finetuning.importers.other_engines import ENGINES as FOREIGN

    return FOREIGN[engine](document, processes)


_KUBERNETES_LOG = Path("/dev/termination-log")
_LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "critical": "CRITICAL"}


def job_main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns its exit code."""
    if TERMINATION_LOG not in os.environ and _KUBERNETES_LOG.exists():
        os.environ[TERMINATION_LOG] = str(_KUBERNETES_LOG)
    return run_command(_job, argv)


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
        before = reported_errors()
        code = start(planned.launch, command, planned.environment)
    if code != EXIT_OK:
        if code == EXIT_USER:
            print(f"note: {config.name} is what `finetuning import` prints of this job", file=sys.stderr)
        report_for_processes(code, before)
        return code
    if not options.dry_run and translation.truth("lora_post_process_for_vllm", False):
        _post_process(translation.values)
    return EXIT_OK


def make_readers() -> Readers:
    """What a translation may ask of the rooms that it does not know."""
    from finetuning.config.sections.experiment import SFTExperiment
    from finetuning.config.validation.library_fields import installed_fields
    from finetuning.importers.fms.data_config import read_data_config
    from finetuning.importers.translation import Readers

    def training_fields() -> Collection[str]:
        return installed_fields().trainer_fields(SFTExperiment.trainer_config) or frozenset()

    return Readers(read_data_config, training_fields)


def _level(job: ConfigDocument) -> str:
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
    sys.exit(job_main())
