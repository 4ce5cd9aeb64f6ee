"""The final model is pushed to a Hub that speaks HTTP: complete, after everything is saved, and never at its cost."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import ForkServer, Process

TOKEN = "hf_" + "a" * 34


class Hub(ThreadingHTTPServer):
    """The part of the Hub's API that an upload needs: large files as Git LFS, the others in the commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.broken: dict[str, int] = {}
        """A status for paths that contain a text; 0 for no answer at all."""
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.on_create: Callable[[], None] = lambda: None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        for part, status in self.server.broken.items():
            if part in self.path:
                if not status:
                    time.sleep(600)
                return self._send({"error": "out of order"}, status)
        if self.headers.get("authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/lfs/"):
            return self._send({"error": "Invalid user token."}, 401)
        if self.path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/lfs/")
            self.server.large[self.path.removeprefix("/lfs/")] = body
            return self._send({})
        if self.command == "GET" and self.path.startswith("/api/models/"):
            return self._send({"error": "Repository not found"}, 404)
        if self.path.endswith("/commit/main"):
            return self._commit(body)
        self._send(self._reply(json.loads(body or b"{}")))

    def _reply(self, asked: Any) -> dict[str, Any]:
        address = self.server.address
        if self.path == "/api/whoami-v2":
            return {"type": "user", "name": "me", "orgs": []}
        if self.path == "/api/repos/create":
            self.server.on_create()
            return {"url": f"{address}/me/{asked['name']}"}
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in asked["files"]
                ]
            }
        assert self.path.endswith(".git/info/lfs/objects/batch"), self.path
        objects = [
            {**item, "actions": {"upload": {"href": f"{address}/lfs/{item['oid']}"}}} for item in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]
        self._send(
            {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.address}/me/out/commit/{'1' * 40}"}
        )

    def _send(self, values: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(
    hub: Hub, fork_server: ForkServer, sft_values: Any, write_config: Any, tmp_path: Path
) -> Callable[..., Process]:
    """Trains and pushes to the hub; returns the process when it has ended. The requests time out soon."""

    def run(timeout: float = 60, **changes: Any) -> Process:
        config = write_config(
            sft_values(
                {"training_args.push_to_hub": True, "training_args.hub_token": TOKEN, "training_args.max_steps": 1}
                | {f"training_args.{key}": value for key, value in changes.items()}
            )
        )
        # The server of the processes has imported huggingface_hub, which reads its environment once.
        before = (
            "from huggingface_hub import constants\n"
            f"constants.ENDPOINT, constants.HF_HUB_OFFLINE = {hub.address!r}, False\n"
            "constants.HF_HUB_DISABLE_XET = True\n"
            f"import finetuning.training.final_model as final_model; final_model._HUB_TIMEOUT_S = {timeout}"
        )
        environ = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": None}
        process = fork_server.start(["sft", config], environ, before)
        process.wait()
        return process

    return run


def record_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))


def test_the_final_model_is_pushed_after_everything_is_saved(
    hub: Hub, push: Callable[..., Process], tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", {}
    hub.on_create = lambda: seen.update(
        status=record_of(tmp_path)["status"],
        report=(out / "report.html").exists(),
    )
    process = push()
    assert process.returncode == 0, process.output
    assert seen == {"status": "completed", "report": True}
    final = out / "checkpoint-final"
    written = {path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    assert {"model.safetensors", "README.md", "tokenizer.json", "chat_template.jinja"} <= written.keys()
    assert hub.files == written and len(hub.large) == 1
    assert hub.requests[0] == "GET /api/whoami-v2", "the login is checked first"
    assert record_of(tmp_path)["hub"] == {"address": f"{hub.address}/me/out", "error": None}
    assert f"{hub.address}/me/out" in process.stdout and TOKEN not in process.output


@pytest.mark.parametrize(
    ("path", "status", "timeout", "reason"),
    [
        ("/repos/create", 403, 60, "403 Forbidden"),
        ("/commit/", 500, 60, "500"),
        ("/repos/create", 0, 0.5, "timed out"),
    ],
    ids=["refused", "broken", "hanging"],
)
def test_a_hub_that_does_not_take_it_fails_no_run(
    path: str, status: int, timeout: float, reason: str, hub: Hub, push: Callable[..., Process], tmp_path: Path
) -> None:
    hub.broken[path] = status
    process = push(timeout, hub_model_id="me/tuned")
    assert process.returncode == 0, process.output
    error = record_of(tmp_path)["hub"]["error"]
    assert reason in error and record_of(tmp_path)["status"] == "completed"
    folder = tmp_path / "out" / "checkpoint-final"
    assert f"not pushed to the Hub: {error}. Push it later with: hf upload me/tuned {folder}" in process.stderr
    assert f"not pushed: {error}" in process.stdout
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(("status", "timeout"), [(401, 60), (0, 0.5)], ids=["unknown", "hanging"])
def test_a_login_that_fails_ends_the_run_before_it_trains(
    status: int, timeout: float, hub: Hub, push: Callable[..., Process], tmp_path: Path
) -> None:
    hub.broken["whoami"] = status
    process = push(timeout)
    assert process.returncode == 1
    assert "training_args.push_to_hub: the Hub cannot be reached, or rejects the token" in process.stderr
    assert not (tmp_path / "out").exists() and hub.requests == ["GET /api/whoami-v2"]
