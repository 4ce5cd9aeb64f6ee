"""A fork server: starts `finetuning` in processes that inherit the imports of their parent.

The parent imports the engine and does nothing else, so that a test that kills a run fifty times does not import
everything fifty times.

Reads one JSON request per line: `{"args": [...], "environ": {...}, "output": path, "before": code}` starts `finetuning`
with these arguments and answers with its process id; `before` is executed in the new process first. `{"wait": pid}`
answers with the exit code once the process has ended, negative for a signal.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn

PACKAGES = (
    "algorithms",
    "callbacks",
    "data",
    "inference",
    "launch",
    "model",
    "report",
    "telemetry",
    "tracking",
    "trainer",
    "training",
)


def import_all() -> None:
    """Import everything that a run imports, without optional packages that are slow to import."""
    for name in ("bitsandbytes", "scipy", "sklearn"):
        sys.modules[name] = None  # type: ignore[assignment]
    for library in ("torch", "transformers.trainer", "peft", "trl", "datasets"):
        importlib.import_module(library)
    import finetuning

    for module in pkgutil.walk_packages(finetuning.__path__, "finetuning."):
        if module.name.split(".")[1] in PACKAGES:
            # Modules for optional packages that are not installed.
            with suppress(ImportError):
                importlib.import_module(module.name)


def run_request(request: dict[str, Any]) -> NoReturn:
    """Turn this process into a run."""
    target = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.environ.update(request["environ"])
    sys.argv = ["finetuning", *request["args"]]
    exec(request["before"], {"__name__": "before"})
    from finetuning.cli.main import main

    code = main(request["args"])
    # Exit without collecting all imported objects, which takes seconds after a fork.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    import_all()
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
