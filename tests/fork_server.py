"""A fork server: runs the console scripts in processes that inherit the imports of their parent.

The parent imports the engine and does nothing else. A process that it forks is a process like any other, with its own
id, environment, signals and exit code, but it does not spend seconds on the import of torch, transformers and TRL.

Reads one JSON request per line:

- `{"program": ..., "args": [...], "environ": {...}, "cwd": ..., "stdout": path, "stderr": path, "before": code}` starts
  a console script, a Python file or a module of the engine in a new process and answers with its process id;
  `environ` is the whole environment, and `before` is executed first.
- `{"wait": pid}` answers with the exit code once the process has ended, negative for a signal.

What a process starts as `python -m finetuning...`, such as the workers of `finetuning launch`, is forked as well.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import threading
import tomllib
import traceback
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NoReturn

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
PACKAGES = (
    "algorithms",
    "callbacks",
    "data",
    "export",
    "inference",
    "launch",
    "model",
    "report",
    "telemetry",
    "tracking",
    "trainer",
    "training",
)
LIBRARIES = ("torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "trl", "datasets")


def import_all() -> None:
    """Import everything that a run imports, apart from its trackers."""
    for library in LIBRARIES:
        importlib.import_module(library)
    import finetuning

    for module in pkgutil.walk_packages(finetuning.__path__, "finetuning."):
        if module.name.split(".")[1] in PACKAGES:
            # Modules for optional packages that are not installed.
            with suppress(ImportError):
                importlib.import_module(module.name)


def fill_caches() -> None:
    """Make what the first run of a process makes: the schemas of configs, and what transformers renames in weights."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from finetuning.config.sections.experiment import EXPERIMENTS

    get_checkpoint_conversion_mapping("llama")
    for experiment in EXPERIMENTS.values():
        experiment.model_rebuild()


def run_program(program: str, args: list[str]) -> Any:
    """Run a console script, a file or a module, and return the exit code."""
    if program.endswith(".py"):
        sys.argv = [program, *args]
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
        return 0
    if program.startswith("finetuning."):
        sys.argv = [program, *args]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return 0
    sys.argv = [str(Path(sys.executable).with_name(program)), *args]
    # Not from the metadata of the installed package, which is older than a console script of a checkout.
    scripts = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["scripts"]
    return EntryPoint(program, scripts[program], "console_scripts").load()()


def run_request(request: dict[str, Any]) -> NoReturn:
    """Turn this process into a console script."""
    for stream, path in ((1, request["stdout"]), (2, request["stderr"])):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, stream)
        os.close(target)
    # The standard input of the parent carries the requests.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.reconfigure(write_through=True)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    fork_workers()
    exec(request["before"], {"__name__": "before"})
    run_and_exit(request["program"], request["args"])


def run_and_exit(program: str, args: list[str]) -> NoReturn:
    try:
        code = run_program(program, args)
    except SystemExit as exit:
        code = exit.code
    # Exit without collecting all imported objects, which takes seconds after a fork.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class ForkingPopen(subprocess.Popen):
    """A `Popen` that forks this process for `python -m finetuning...`, and starts an interpreter for all else.

    The child has the environment, streams, session and default signals of a new interpreter, and no other files.
    """

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(super()._execute_child).bind(*args, **kwargs).arguments
        command = [os.fspath(part) for part in call["args"]]
        module = command[command.index("-m") + 1] if "-m" in command else ""
        if command[0] != sys.executable or not module.startswith("finetuning."):
            super()._execute_child(*args, **kwargs)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                become_new(call)
                run_and_exit(module, command[command.index("-m") + 2 :])
            finally:
                # Reached by an exception only.
                traceback.print_exc()
                os._exit(1)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[name] for name in pipes))


def become_new(call: dict[str, Any]) -> None:
    """Leave behind what a new interpreter would not inherit. `call` has the arguments of `Popen._execute_child`."""
    atexit._clear()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if call["start_new_session"]:
        os.setsid()
    for stream, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if call[name] != -1:
            os.dup2(call[name], stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if call["cwd"] is not None:
        os.chdir(call["cwd"])
    if call["env"] is not None:
        environ = dict(call["env"])
        os.environ.clear()
        os.environ.update(environ)


def fork_workers() -> None:
    """Make this process fork what it starts as `python -m finetuning...`."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess.Popen = subprocess_handler.Popen = ForkingPopen


def serve() -> None:
    import_all()
    fill_caches()
    assert threading.active_count() == 1, "a thread would not be there after a fork"
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                run_request(request)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
