"""`finetuning launch`: run a training subcommand in several processes, on one or more machines."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import (
    ERROR_FILE,
    LOST_CONNECTION,
    Parser,
    positive_int,
    read_failure,
    report_for_processes,
    reported_errors,
    reset_error_file,
    run_command,
)
from finetuning.distributed import DEFAULT_GRACE_S, GRACE_VARIABLE
from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from finetuning.launch.hosts import Hosts
    from finetuning.launch.processes import Launch
    from finetuning.launch.restarts import JobEnd


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that precede the launched subcommand."""
    from finetuning.launch.processes import PRESETS

    parser = Parser(
        prog="finetuning launch",
        description="Run a training subcommand in several processes with accelerate's launcher:"
        " finetuning launch --nproc 8 --preset fsdp2 sft config.yaml",
    )
    parser.add_argument(
        "--nproc", default=None, help="processes per machine: a number, or auto for one per GPU (default: auto)"
    )
    parser.add_argument(
        "--nnodes", type=int, help="number of machines (default: the variables of the scheduler, else 1)"
    )
    parser.add_argument("--node-rank", type=int, help="rank of this machine, from 0")
    parser.add_argument(
        "--main-address", metavar="HOST[:PORT]", help="address of the machine with rank 0 (default port: 29500)"
    )
    parser.add_argument(
        "--max-restarts",
        type=_non_negative_int,
        default=0,
        metavar="N",
        help="how often to restart the job from its newest checkpoint after a process or machine was lost (default: 0)",
    )
    parser.add_argument(
        "--meet-within",
        type=_non_negative_int,
        metavar="SECONDS",
        help="rendezvous timeout: how long machines wait for each other, at the start and after a restart"
        " (default: 600)",
    )
    parser.add_argument(
        "--grace",
        type=positive_int,
        metavar="SECONDS",
        help="time between the scheduler's signal and its kill, in which a checkpoint is saved"
        f" (default: ${GRACE_VARIABLE}, else {DEFAULT_GRACE_S})",
    )
    sharding = parser.add_mutually_exclusive_group()
    sharding.add_argument("--preset", choices=PRESETS, help="how the model is distributed (default: ddp)")
    sharding.add_argument("--accelerate-config", metavar="FILE", help="an accelerate config file instead of a preset")
    parser.add_argument(
        "--ray",
        action="store_true",
        help="run on the Ray cluster of $RAY_ADDRESS or of this machine, with Ray Train: a worker for each of --nnodes",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the accelerate launch command; do not run it")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="METHOD config.yaml ...", help="the training subcommand to run"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `run_command` would remove --debug, which may belong to the launched subcommand.
    return run_command(lambda _: _launch(arguments), arguments)


def _launch(argv: Sequence[str]) -> int:
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.suggestions import did_you_mean

    options = build_parser().parse_args(argv)
    if not options.command:
        raise ConfigError(f"finetuning launch: add the subcommand to run, one of {', '.join(ALGORITHMS)}")
    method = options.command[0]
    if method not in ALGORITHMS:
        raise ConfigError(
            f'finetuning launch: unknown method "{method}"; supported: {", ".join(ALGORITHMS)}',
            hint=did_you_mean(method, ALGORITHMS),
        )
    run_once = _prepare_ray(options) if options.ray else _prepare(options)
    if run_once is None:
        return 0
    return _run(run_once, options.max_restarts)


def _prepare(options: argparse.Namespace) -> Callable[[Path], JobEnd] | None:
    """Return a function that runs the job once, given where its processes report their error; None for a dry run."""
    from finetuning.launch.hosts import resolve_hosts
    from finetuning.launch.processes import start

    hosts = resolve_hosts(options.nnodes, options.node_rank, options.main_address)
    launch = _make_launch(options, hosts)
    if options.dry_run:
        print("accelerate launch " + " ".join(launch.arguments(options.command)))
        return None
    if options.max_restarts:
        _check_resumes(options.command)
    environment = hosts.environment()
    return lambda _: start(launch, options.command, environment, grace_s=options.grace)


def _prepare_ray(options: argparse.Namespace) -> Callable[[Path], JobEnd] | None:
    """Return what `_prepare` does, for a Ray cluster."""
    from finetuning.launch.on_ray import RayJob, connect, gpus_of_a_machine, start_on_ray

    if options.node_rank is not None or options.main_address:
        raise ConfigError("--ray chooses the machines itself", hint="Leave out --node-rank and --main-address.")
    passed_on = {
        "--preset": options.preset,
        "--accelerate-config": options.accelerate_config,
        "--meet-within": options.meet_within,
        "--grace": options.grace,
    }
    arguments = tuple(item for name, value in passed_on.items() if value is not None for item in (name, str(value)))
    if options.max_restarts:
        _check_resumes(options.command)
    ray = None if options.dry_run else connect()
    gpus = 0 if ray is None else gpus_of_a_machine(ray)
    processes = (gpus or 1) if options.nproc in (None, "auto") else _processes_per_machine(options.nproc)
    job = RayJob(options.nnodes or 1, processes, arguments, tuple(options.command), gpus > 0)
    if ray is None:
        print("finetuning " + " ".join(job.arguments(0, "HOST:PORT")))
        return None
    return lambda error_file: start_on_ray(ray, job, error_file)


def _run(run_once: Callable[[Path], JobEnd], max_restarts: int) -> int:
    """Run a job, restarting it, and return its exit code."""
    from finetuning.launch.restarts import run_with_restarts

    with _error_file() as error_file:
        before = reported_errors()

        def attempt() -> JobEnd:
            end = run_once(error_file)
            failure = read_failure(error_file)
            if end.killed or failure is None or failure.name == LOST_CONNECTION:
                return end
            return replace(end, error=failure.message, is_transient=failure.is_transient)

        end = run_with_restarts(attempt, max_restarts, _warn_restart)
        report_for_processes(end.exit_code, before, end.killed)
    return end.exit_code


@contextmanager
def _error_file() -> Iterator[Path]:
    """Yield the file in which the processes report their error: of the environment, or a temporary one."""
    if os.environ.get(ERROR_FILE):
        yield Path(os.environ[ERROR_FILE])
        return
    with tempfile.TemporaryDirectory(prefix="finetuning-launch-") as folder:
        os.environ[ERROR_FILE] = str(Path(folder, "error.json"))
        try:
            yield Path(os.environ[ERROR_FILE])
        finally:
            del os.environ[ERROR_FILE]


def _warn_restart(text: str) -> None:
    # The error of the lost attempt is not the job's error.
    reset_error_file()
    print(f"warning: {text}", file=sys.stderr)


def _check_resumes(command: Sequence[str]) -> None:
    """Raise ConfigError unless a restarted run would resume from its newest checkpoint."""
    from finetuning.cli.main import build_parser as build_training_parser
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document

    options = build_training_parser().parse_intermixed_args(command)
    document = apply_overrides(read_document(options.config), options.overrides)
    run_conf = document.values.get("run_conf")
    resume = run_conf.get("resume_from_checkpoint") if isinstance(run_conf, dict) else None
    if str(resume).lower() != "auto":
        raise ConfigError(
            "--max-restarts requires a run that resumes from its newest checkpoint",
            location=document.location_of(("run_conf", "resume_from_checkpoint")),
            hint="Set run_conf.resume_from_checkpoint: auto, and save checkpoints (training_args.save_strategy).",
        )


def _make_launch(options: argparse.Namespace, hosts: Hosts) -> Launch:
    from finetuning.launch.hosts import RENDEZVOUS_TIMEOUT_S
    from finetuning.launch.processes import Launch, preset_file, require_deepspeed

    config_file = None
    if options.preset:
        config_file = preset_file(options.preset)
    elif options.accelerate_config:
        config_file = Path(options.accelerate_config)
        require_deepspeed(config_file)
    per_machine = _processes_per_machine(options.nproc or hosts.nproc or "auto")
    if options.preset == "ddp" and per_machine * hosts.nnodes == 1:
        config_file = None
    timeout_s = options.meet_within or RENDEZVOUS_TIMEOUT_S
    return Launch(
        per_machine * hosts.nnodes,
        hosts.nnodes,
        config_file,
        tuple(hosts.flags(timeout_s)),
        timeout_s if hosts.nnodes > 1 else None,
    )


def _non_negative_int(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative integer")
    return int(text)


def _processes_per_machine(text: str) -> int:
    if text in ("auto", "gpu"):
        from finetuning.launch.processes import visible_gpus

        return visible_gpus() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--nproc {text}: must be a positive integer or auto")
    return int(text)
