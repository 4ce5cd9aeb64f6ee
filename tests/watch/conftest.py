"""Output directories as runs leave them, and a server of their pages."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from finetuning.inference.chat import Chat
from finetuning.watch.server import WatchServer, open_socket

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'>"


def log_rows(first: int, last: int) -> str:
    rows = [
        {"step": step, "kind": "training", "time": 1767225600.0 + step, "loss": 2.0 / step, "learning_rate": 0.1}
        for step in range(first, last + 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes an output directory. That of a run that goes on is locked, as a run does, until the test ends."""
    locks = []

    def make(name: str = "out", *, status: str = "completed", steps: int = 6, **record: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        job = {"pid": os.getpid(), "host": platform.node(), "started": "2026-01-01T10:00:00Z", "command": ["ft", name]}
        values = {"status": status, "method": "sft", "model": {"name": "/m/tiny"}, "plan": {"steps": {"total": 20}}}
        (folder / "run.json").write_text(json.dumps({**values, "jobs": [job], **record}))
        (folder / "metrics.jsonl").write_text(log_rows(1, steps))
        (folder / "config.resolved.yaml").write_text(f"training_args:\n  learning_rate: {len(name)}\n")
        (folder / "preview.txt").write_text(
            f"--- rows.jsonl:1 (row): 9 tokens, 3 trained\nQ {HOSTILE}\nA ⟦yes⟧ end ⟦no⟧\n"
        )
        if status == "running":
            locks.append((folder / ".finetuning.lock").open("w"))
            fcntl.flock(locks[-1], fcntl.LOCK_EX)
        return folder

    yield make
    for lock in locks:
        lock.close()


@dataclass
class Served:
    """A server in a thread, and a client of it."""

    client: httpx.Client
    server: uvicorn.Server
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.client.base_url)

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        """The server-sent events of an address."""
        with self.client.stream("GET", path) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Serves the runs below directories with uvicorn; the files are looked at without a pause."""
    started: list[Served] = []

    def start(*roots: Path, **options: Any) -> Served:
        listener = open_socket(0)
        app = WatchServer(roots, is_stopping=lambda: server.should_exit, refresh_s=0.01, **options).app()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        client = httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60)
        served = Served(client, server)
        served.threads.append(threading.Thread(target=server.run, kwargs={"sockets": [listener]}))
        served.threads[0].start()
        started.append(served)
        while not server.started:
            assert served.threads[0].is_alive()
            time.sleep(0.01)
        return served

    yield start
    for served in started:
        served.server.should_exit = True
        served.client.close()
        served.threads[0].join(30)
        assert not served.threads[0].is_alive()


@pytest.fixture
def open_chat(chatml_llama_dir: Path) -> Callable[[Path], Chat]:
    """Opens a conversation with the tiny model, whatever the run."""

    def open_chat(folder: Path) -> Chat:
        from finetuning.config.sections.model import NoQuantization
        from finetuning.inference.load import load_generator, model_conf_of

        generator = load_generator(model_conf_of(str(chatml_llama_dir), None), NoQuantization())
        return Chat(generator, {"max_new_tokens": 6, "do_sample": False})

    return open_chat
