"""The SLURM script on a real SLURM of one node: the time limit saves a checkpoint, and the job requeues itself."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "finetuning.sbatch"
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
# The script asks for eight GPUs and 64 cores, which this node pretends to have.
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
GresTypes=gpu
ReturnToService=2
KillWait=20
JobRequeue=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    folder: Path
    environ: dict[str, str]

    def run(self, *command: str) -> str:
        result = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def submit(self, limit: str, script: Path, config: Path) -> str:
        """Submit a job on one node, and return its number."""
        options = ["--nodes=1", limit, f"--output={self.folder}/job.log", f"--chdir={self.folder}"]
        return self.run("sbatch", "--parsable", "--export=ALL", *options, str(script), str(config)).partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        files = [*self.folder.glob("*.log")]
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-4000:]}" for file in files)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    """A controller and a node of SLURM on this machine."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and slurm-wlm, munge; missing: {', '.join(missing) or 'root'}")
    folder = tmp_path / "slurm"
    for name in ("state", "slurmd", "bin"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(2)))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n")
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "cgroup.conf").write_text("")
    program = folder / "bin" / "finetuning"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m finetuning.cli.main "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"], "/usr/sbin"])
    # The job inherits this environment: two processes, as there is no GPU to count.
    variables = {"PET_NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    environ = {**os.environ, **variables, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = [f"--socket={folder}/munge.socket", f"--log-file={folder}/munged.log"]
    munge += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"]
    services: list[subprocess.Popen[bytes]] = []
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    try:
        for command in commands:
            with (folder / f"{command[0]}.out.log").open("wb") as log:
                services.append(
                    subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
                )
            time.sleep(2)
        started = Slurm(folder, environ)
        started.wait_for(lambda: "idle" in started.run("sinfo", "--noheader", "--format=%T"), 60)
        yield started
        subprocess.run(["scancel", "--user=root"], env=environ, check=False, timeout=30)
        started.wait_for(lambda: not started.run("squeue", "--noheader"), 60)
    finally:
        for service in reversed(services):
            service.terminate()
            try:
                service.wait(20)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()


def checkpoints(out: Path) -> set[str]:
    return {path.name for path in out.glob("checkpoint-[0-9]*")}


def test_the_time_limit_saves_and_the_job_requeues_itself(
    slurm: Slurm, sft_values: Any, write_config: Any, last_step: Any, run_record: Any, tmp_path: Path
) -> None:
    """SLURM's limits are minutes, and its signal may come up to a minute early: so two minutes and a lead of one."""
    out = tmp_path / "out"
    changes = {
        "peft_conf": LORA,
        "training_args.max_steps": 1_000_000,
        "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 1},
    }
    config = write_config(sft_values(changes), "experiment.yaml")
    script = slurm.folder / "short.sbatch"
    script.write_text(SCRIPT.read_text().replace("USR1@300", "USR1@60").replace("--grace 300", "--grace 30"))
    job = slurm.submit("--time=3", script, config)
    slurm.wait_for(lambda: last_step(out) >= 3, 150)
    assert not checkpoints(out), "nothing is saved before the signal"
    slurm.wait_for(lambda: slurm.job(job).get("Restarts") == "1", 240)
    log = (slurm.folder / "job.log").read_text()
    [saved] = checkpoints(out)
    assert f"stopped by signal 10 at step {saved.rpartition('-')[2]}: {saved} is saved" in log
    assert run_record(out)["status"] == "interrupted"
    # SLURM starts a requeued job after two minutes.
    step = int(saved.rpartition("-")[2])
    slurm.wait_for(lambda: last_step(out) > step + 2, 330)
    record = json.loads((out / "run.json").read_text())
    assert record["resumed_from"].endswith(saved) and len(record["jobs"]) == 2


def test_a_cancelled_job_saves_and_is_not_requeued(
    slurm: Slurm, sft_values: Any, write_config: Any, last_step: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = write_config(sft_values({"peft_conf": LORA, "training_args.max_steps": 1_000_000}), "experiment.yaml")
    job = slurm.submit("--time=60", SCRIPT, config)
    slurm.wait_for(lambda: last_step(out) >= 3, 150)
    slurm.run("scancel", "--signal=TERM", job)
    slurm.wait_for(lambda: bool(checkpoints(out)), 60)
    slurm.wait_for(lambda: slurm.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), 60)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("FAILED", "0")
    assert slurm.job(job)["ExitCode"].startswith("143:")
