"""`finetuning job`, `accelerate_launch` and `sft_trainer`: run fms-hf-tuning jobs as that engine does.

A job is a JSON file, or the flags of `tuning/sft_trainer.py`; both have the same keys. `finetuning job` starts the
processes of a job, each of which translates it again. Errors name the keys, lines and flags of the job.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import TERMINATION_LOG, Parser, report_for_processes, reported_errors, run_command
from finetuning.errors import EXIT_OK

if TYPE_CHECKING:
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.importers.translation import Translation

_KUBERNETES_LOG = Path("/dev/termination-log")
_LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "critical": "CRITICAL"}
_ENGINE = "fms-hf-tuning"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning job`."""
    parser = Parser(
        prog="finetuning job",
        description="Run an fms-hf-tuning JSON job, read from SFT_TRAINER_CONFIG_JSON_ENV_VAR (base64) or"
        " SFT_TRAINER_CONFIG_JSON_PATH. docs/moving-from/fms-hf-tuning.md lists the environment variables.",
    )
    parser.add_argument("config", nargs="?", help="the JSON file; overrides the environment variables")
    parser.add_argument("--dry-run", action="store_true", help="validate the job and print the plan; do not train")
    parser.add_argument("--print-config", action="store_true", help="print the job as YAML, and exit")
    # A process that `finetuning job` has started.
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def build_flags_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `sft_trainer` that are not keys of a job."""
    parser = Parser(
        prog="sft_trainer",
        usage="%(prog)s --model_name_or_path MODEL --training_data_path FILE --output_dir FOLDER [--KEY VALUE ...]",
        description="Train with the flags of fms-hf-tuning's tuning/sft_trainer.py, alone or under `accelerate launch`:"
        " every key of a JSON job is a flag. docs/moving-from/fms-hf-tuning.md lists them.",
        epilog="example: accelerate launch --num_processes 8 --no_python sft_trainer --model_name_or_path MODEL ...",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="validate the flags and print the plan; do not train")
    parser.add_argument("--print-config", action="store_true", help="print the flags as YAML, and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning job` and return its exit code."""
    if TERMINATION_LOG not in os.environ and _KUBERNETES_LOG.exists():
        os.environ[TERMINATION_LOG] = str(_KUBERNETES_LOG)
    return run_command(_run_job, argv)


def sft_trainer_main(argv: Sequence[str] | None = None) -> int:
    """Run `sft_trainer` and return its exit code."""
    return run_command(_run_flags, argv)


def _run_job(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import read_topology
    from finetuning.importers.fms.environment import check_training_script, plan_launch, read_job
    from finetuning.importers.fms.job import check_new_embeddings, converts_for_vllm, from_fms, is_on
    from finetuning.launch.processes import start, visible_gpus

    job = read_document(options.config) if options.config else read_job()
    if options.worker:
        return _train(from_fms(job, read_topology().world_size), options)
    check_training_script()
    planned = plan_launch(job, visible_gpus())
    translation = from_fms(job, planned.launch.processes)
    if options.print_config:
        return _print_config(translation)
    _print_notes((*planned.notes, *translation.notes))
    if is_on(translation, "do_dataprocessing_only") and not options.dry_run:
        return _write_data(translation)
    if converts_for_vllm(translation):
        check_new_embeddings(translation)
    command = ["job", *([options.config] if options.config else []), "--worker", *["--dry-run"] * options.dry_run]
    before = reported_errors()
    end = start(planned.launch, command, planned.environment)
    if end.exit_code != EXIT_OK:
        report_for_processes(end.exit_code, before, end.killed)
        return end.exit_code
    if not options.dry_run and converts_for_vllm(translation):
        _convert_for_vllm(translation)
    return EXIT_OK


def _run_flags(argv: Sequence[str]) -> int:
    """Train in this process: alone, or as one of the processes that `accelerate launch` has started."""
    from finetuning.distributed import read_topology
    from finetuning.importers.fms.flags import read_flags
    from finetuning.importers.fms.job import check_new_embeddings, converts_for_vllm, from_fms, is_on

    options, flags = build_flags_parser().parse_known_args(argv)
    topology = read_topology()
    job, notes = read_flags(flags)
    translation = from_fms(job, topology.world_size)
    if options.print_config:
        return _print_config(translation)
    if topology.is_main:
        _print_notes((*notes, *translation.notes))
    if is_on(translation, "do_dataprocessing_only") and not options.dry_run:
        return _write_data(translation) if topology.is_main else EXIT_OK
    if converts_for_vllm(translation):
        check_new_embeddings(translation)
    code = _train(translation, options)
    if topology.is_main and not options.dry_run and converts_for_vllm(translation):
        _convert_for_vllm(translation)
    return code


def _print_config(translation: Translation) -> int:
    from finetuning.importers import to_yaml

    print(to_yaml(translation, _ENGINE), end="")
    return EXIT_OK


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)


def _train(translation: Translation, options: argparse.Namespace) -> int:
    """Train in this process."""
    from finetuning.cli.main import parse_options
    from finetuning.cli.train import train

    arguments = ["sft", translation.source.file or "flags", "--logging-level", _level(translation.source)]
    return train(parse_options, [*arguments, *["--dry-run"] * options.dry_run], document=translation.document())


def _write_data(translation: Translation) -> int:
    """Tokenize the rows of a job, and write them as Parquet files under the names of fms-hf-tuning; train nothing."""
    from finetuning.algorithms import ALGORITHMS
    from finetuning.atomic_io import atomic_directory, require_empty
    from finetuning.cli.errors import locate_errors
    from finetuning.config.sections.experiment import SFTExperiment
    from finetuning.config.validation.validate import validate
    from finetuning.training.setup import load_tokenizer, prepare

    document = translation.document()
    with locate_errors(document):
        experiment = validate(document, SFTExperiment).experiment
        folders = [Path(experiment.training_args.output_dir, f"{name}_dataset") for name in ("train", "validation")]
        for folder in folders:
            require_empty(folder)
        data = prepare(experiment, ALGORITHMS["sft"], load_tokenizer(experiment), 1)
    for line in data.statistics.lines():
        print(line)
    entry = data.entry
    assert entry is not None, "only streams have no entry"
    for key, rows, folder in zip(("train", "eval"), (entry.train, entry.validation), folders, strict=True):
        if rows is None:
            continue
        shards = min(translation.positive_int(f"num_{key}_dataset_shards", 1), len(rows))
        with atomic_directory(folder) as staging:
            for index in range(shards):
                rows.shard(shards, index, contiguous=True).to_parquet(staging / f"ds_{index:05}.parquet")
        print(f"{folder}: {len(rows)} rows in {shards} files")
    return EXIT_OK


def _level(job: ConfigDocument) -> str:
    """Return the logging level of $LOG_LEVEL or of the job's log_level; INFO for `passive` or neither."""
    level = os.environ.get("LOG_LEVEL") or job.values.get("log_level") or "passive"
    return _LEVELS.get(str(level).lower(), "INFO")


def _convert_for_vllm(translation: Translation) -> None:
    """Convert the saved adapter for vLLM in place, with the embeddings of new tokens in a separate file.

    With `save_model_dir` that is the one there, and `checkpoint-final` stays as it was trained.
    """
    from finetuning.export.vllm.convert import NotServableError, make_vllm_compatible
    from finetuning.model.safetensors_io import ADDED_TOKENS_FILE

    values = translation.values
    folder = Path(values.get("save_model_dir") or Path(values["training_args"]["output_dir"]) / "checkpoint-final")
    has_new_tokens = (folder / ADDED_TOKENS_FILE).is_file()
    base = str(values["run_conf"]["model"]) if has_new_tokens else None
    try:
        result = make_vllm_compatible(folder, base_name=base, new_embeddings=has_new_tokens)
    except NotServableError as error:
        _print_notes([f"lora_post_process_for_vllm: {error}"])
        return
    _print_notes(result.notes)
    print(f"vLLM-compatible adapter: {result.folder}")


if __name__ == "__main__":
    sys.exit(main())
