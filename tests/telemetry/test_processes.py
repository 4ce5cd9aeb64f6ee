"""Telemetry of whole processes: killed, interrupted, resumed, distributed, and without network access."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ForkServer, Process

from finetuning.telemetry.goodput import session_goodput
from finetuning.telemetry.metrics import read_progress

TRAINED = {"training_args.save_strategy": "steps", "telemetry": {"log_every_n_train_iterations": 10}}


@pytest.fixture
def begin(fork_server: ForkServer, write_config: Any) -> Callable[[Any], Process]:
    """A function that starts a run in a process and returns the process."""
    return lambda values: fork_server.start([values["method"], write_config(values)])


def wait_for_step(process: Process, output_dir: Path, step: int) -> None:
    """Wait until a run has done this many steps."""

    def is_done() -> bool:
        files = [read_progress(path) for path in output_dir.glob("telemetry/*/rank0.progress")]
        return any(progress and progress.step >= step for progress in files)

    assert process.wait_for(is_done), process.output


def test_a_killed_run_keeps_its_events_and_a_resumed_run_its_session(
    begin: Any, sft_values: Any, recorded: Any, tmp_path: Path
) -> None:
    output_dir = tmp_path / "out"
    changes = TRAINED | {"training_args.save_steps": 40, "training_args.max_steps": 200}
    values = sft_values(changes) | {"method": "sft"}
    values["run_conf"]["resume_from_checkpoint"] = "auto"
    process = begin(values)
    wait_for_step(process, output_dir, 57)
    process.kill()
    [file] = output_dir.glob("telemetry/*/rank0.jsonl")
    killed, before = recorded(output_dir), file.read_bytes()
    progress = read_progress(file.with_suffix(".progress"))
    done, saved = progress.step, progress.saved
    assert done >= 57
    assert saved % 40 == 0 < saved <= done
    assert [update["current_iteration"] for update in killed.updates()] == list(range(9, done // 10 * 10, 10))
    assert {"application", "training_loop"} <= set(killed.started())
    assert not killed.spans("training_loop")

    resumed_process = begin(values)
    assert resumed_process.wait() == 0, resumed_process.output
    resumed = recorded(output_dir)
    assert file.read_bytes() == before
    assert resumed.resource["session_tag"] == killed.resource["session_tag"]
    assert resumed.resource["job_id"] != killed.resource["job_id"]
    assert resumed.lines[1]["trace_id"] != killed.lines[1]["trace_id"]
    configs = [job.event("update_training_telemetry_config") for job in (killed, resumed)]
    assert configs[0]["perf_tag"] == configs[1]["perf_tag"]
    assert resumed.span("training_loop")["attributes"]["train_iterations_start"] == saved
    assert [update["interval"] for update in resumed.updates()] == [10] * ((200 - saved) // 10)
    assert resumed.spans("checkpoint_load")
    goodput = session_goodput(output_dir)
    assert (goodput.jobs, goodput.disruptions) == (2, 1)
    assert (goodput.lost_steps, goodput.kept_steps) == (done - saved, 200)
    assert (goodput.badput_s["lost_work"] > 0) == (done > saved)
    assert 0 < goodput.goodput < 1
    assert goodput.productive_s + sum(goodput.badput_s.values()) == pytest.approx(goodput.total_s, rel=0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_closes_its_spans(
    begin: Any, sft_values: Any, recorded: Any, tmp_path: Path, number: int, code: int
) -> None:
    process = begin(sft_values(TRAINED | {"training_args.max_steps": 100_000}) | {"method": "sft"})
    wait_for_step(process, tmp_path / "out", 5)
    process.send_signal(number)
    assert process.wait() == code, process.output
    records = recorded(tmp_path / "out")
    assert records.span("training_loop")["status"] == "OK"
    assert records.span("application")["status"] == "ERROR"
    assert records.event("error")["exception_type"] == "Interrupted"
    assert records.updates("save_checkpoint_success")


BLOCKED = """
import socket, sys
class Refused(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX:
            open({marks!r}, "a").write(f"connect {{address}}\\n")
            raise OSError("the network is blocked")
        return super().connect(address)
    connect_ex = connect
socket.socket = Refused
def lookup(host, *args, **kwargs):
    open({marks!r}, "a").write(f"lookup {{host}}\\n")
    raise OSError("the network is blocked")
socket.getaddrinfo = lookup
"""


def test_nothing_is_sent_anywhere_and_no_secret_is_written(
    sft_values: Any, dpo_values: Any, write_config: Any, run_cli: Any, fork_server: ForkServer, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    blocked = BLOCKED.format(marks=str(marks))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(blocked)
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    environment = {"HF_TOKEN": "hf_s3cret", "HF_HUB_DISABLE_TELEMETRY": None, "CI": None}
    # In a fresh interpreter, whose imports are watched as well: those of dpo include those of sft.
    dpo = write_config(dpo_values({"training_args.output_dir": str(tmp_path / "dpo")}), "dpo.yaml")
    result = run_cli(["dpo", dpo], env={**environment, "PYTHONPATH": path}, cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr
    sft = fork_server.start(["sft", write_config(sft_values())], environment, blocked, cwd=tmp_path)
    assert sft.wait() == 0, sft.output
    assert not marks.exists(), marks.read_text()
    files = [path for folder in ("out", "dpo") for path in (tmp_path / folder / "telemetry").rglob("*.jsonl")]
    assert len(files) == 2
    assert not any(b"s3cret" in path.read_bytes() for path in files)
    assert not list(tmp_path.glob("onelogger*"))


def test_disabled_telemetry_loads_no_package(sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    code = """
import sys
from finetuning.cli.main import main
code = main(["sft", sys.argv[1]])
print("LOADED", [name for name in sys.modules if name.startswith(("opentelemetry", "finetuning.telemetry"))])
sys.exit(code)
"""
    config = write_config(sft_values({"telemetry": {"enabled": False}}))
    result = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=True)
    assert "LOADED []" in result.stdout


@pytest.mark.parametrize(("ranks", "files"), [("zero", 1), ("all", 2)])
def test_two_processes_share_a_trace(
    sft_values: Any, write_config: Any, torchrun: Any, recorded: Any, tmp_path: Path, ranks: str, files: int
) -> None:
    section = {"ranks": ranks, "log_every_n_train_iterations": 2}
    config = write_config(
        sft_values({"telemetry": section, "training_args.save_strategy": "steps", "training_args.save_steps": 2})
    )
    torchrun("sft", config)
    assert len(list((tmp_path / "out").glob("telemetry/*/*.jsonl"))) == files
    main = recorded(tmp_path / "out")
    last = main.updates()[-1]
    assert (main.resource["rank"], main.resource["world_size"]) == (0, 2)
    assert last["num_train_samples"] == 12
    assert last["slowest_rank"] in (0, 1)
    assert last["rank_iteration_time_min_sec"] <= last["rank_iteration_time_median_sec"]
    assert last["tokens_per_second"] > last["tokens_per_second_per_device"]
    if ranks == "all":
        second = recorded(tmp_path / "out", rank=1)
        assert (second.resource["rank"], second.resource["job_id"]) == (1, main.resource["job_id"])
        assert second.resource["session_tag"] == main.resource["session_tag"]
        root, joined = main.span("application"), second.span("application")
        assert (joined["trace_id"], joined["parent_id"]) == (root["trace_id"], root["span_id"])
        assert second.updates()[-1]["train_tokens"] == last["train_tokens"]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["telemetry"]["session"]["jobs"] == 1


def test_an_unreachable_collector_does_not_delay_training(
    sft_values: Any, write_config: Any, run_cli: Any, tmp_path: Path
) -> None:
    """The port of the first run is closed; that of the second accepts connections but never responds."""
    import socket

    losses = []
    with socket.socket() as unresponsive:
        unresponsive.bind(("127.0.0.1", 0))
        unresponsive.listen(50)
        for number, port in enumerate((9, unresponsive.getsockname()[1])):
            output_dir = tmp_path / f"out{number}"
            otlp = {"endpoint": f"http://127.0.0.1:{port}", "timeout_s": 1.0}
            values = sft_values({"telemetry": {"otlp": otlp}, "training_args.output_dir": str(output_dir)})
            result = run_cli(["sft", write_config(values)])
            assert result.returncode == 0, result.stderr
            assert (result.stdout + result.stderr).count("telemetry is incomplete") <= 1
            assert "Traceback" not in result.stdout + result.stderr
            lines = (output_dir / "training_logs.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["data"]["value"] for line in lines])
            assert list(output_dir.glob("telemetry/*/rank0.jsonl"))
    assert losses[0] == losses[1]
