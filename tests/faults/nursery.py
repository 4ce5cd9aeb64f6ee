"""Starts console runs as processes that share their imports: each is forked from a parent that has imported the engine
and done nothing else, so that killing one fifty times costs fifty runs and not fifty imports.

Reads an order a line, as JSON: `{"args": [...], "environ": {...}, "output": path, "before": code}` starts `finetuning`
with these arguments and answers with its process id; `before` is run in the new process first. `{"wait": pid}` answers
with its exit code once it has ended, negative for a signal.
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

ROOMS = (
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
    """Everything that a run imports; what a plain run leaves out is left out."""
    for name in ("bitsandbytes", "scipy", "sklearn"):
        sys.modules[name] = None  # type: ignore[assignment]
    for library in ("torch", "transformers.trainer", "peft", "trl", "datasets"):
        importlib.import_module(library)
    import finetuning

    for found in pkgutil.walk_packages(finetuning.__path__, "finetuning."):
        if found.name.split(".")[1] in ROOMS:
            # What needs a package that is not installed is no part of a plain run.
            with suppress(ImportError):
                importlib.import_module(found.name)


def become(order: dict[str, Any]) -> NoReturn:
    """This process turns into a run."""
    target = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.environ.update(order["environ"])
    sys.argv = ["finetuning", *order["args"]]
    exec(order["before"], {"__name__": "before"})
    from finetuning.cli.main import main

    code = main(order["args"])
    # What an exit does, but for the collection of all that was imported, which takes seconds after a fork.
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
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                become(order)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
