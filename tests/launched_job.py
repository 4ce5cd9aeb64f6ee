"""A job of `finetuning launch` in real processes, whose steps take long enough to be interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from processes import SECONDS

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
SAVED = {
    "peft_conf": LORA,
    "training_args.max_steps": 100_000,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 5,
    "training_args.save_total_limit": 2,
    "run_conf.resume_from_checkpoint": "auto",
    "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 1},
}
# A step of 20 ms or more, whatever the machine.
SLOW_STEPS = """
import time
from transformers import TrainerCallback
from finetuning.training.signals import StopOnSignal
_end = StopOnSignal.on_step_end
def slow(self, args, state, control, **kwargs):
    time.sleep(0.02)
    return _end(self, args, state, control, **kwargs)
StopOnSignal.on_step_end = slow
"""
# `make gpu-cluster-check`: with NCCL, on the GPUs of this machine.
ON_GPUS = os.environ.get("FINETUNING_CLUSTER_DEVICE") == "cuda"
DEVICE: dict[str, object] = {"training_args.use_cpu": None, "run_conf.model_args.dtype": "float32"} if ON_GPUS else {}
"""Changes of a config for the device."""
ENVIRON = {} if ON_GPUS else {"DS_ACCELERATOR": "cpu"}
FSDP_SETUP = (
    ""
    if ON_GPUS
    else f"""
import sys
sys.path.insert(0, {str(Path(__file__).with_name("end_to_end"))!r})
import sharding_on_cpu
"""
)
"""What every process executes first so that FSDP2 shards, which accelerate asks for on GPUs only."""


class Job:
    """`finetuning launch` in a session of its own.

    Args:
        folder: for its output
        before: Python code that every process of the job executes before anything else
        prefix: a command that runs the launcher
    """

    def __init__(
        self,
        folder: Path,
        config: Path,
        options: Sequence[str],
        before: str = SLOW_STEPS,
        *,
        overrides: Sequence[str] = (),
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ):
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(
            f"import os\nif os.environ.get('RANK'):\n    exec({before!r})\n" if before else ""
        )
        self.log = folder / "job.log"
        path = os.pathsep.join([str(site), *sys.path[1:]])
        command = [*prefix, sys.executable, "-m", "finetuning.cli.main", "launch", *options, "sft", str(config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environ or {})},
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """The process ids of the ranks."""
        pids = {}
        for pid in children_of(self.process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for variable in variables:
                if variable.startswith(b"RANK="):
                    pids[int(variable[5:])] = pid
        return pids

    def wait(self) -> int:
        return self.process.wait(timeout=SECONDS)

    def kill(self) -> None:
        """Kill what still runs of it."""
        pids = [*self.ranks().values(), self.process.pid] if self.process.poll() is None else []
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def newest(out: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-[0-9]*")), default=0)
