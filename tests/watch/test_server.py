"""The server of `finetuning watch`: updates while files change, what the token allows, and how it starts and ends."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import ForkServer

from finetuning.cli.watch import main
from finetuning.inference.chat import Chat
from finetuning.watch.conversation import Conversations
from finetuning.watch.server import open_socket

TOKEN = "a-token-of-this-test-only"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def ids_of(served: Any) -> list[str]:
    return re.findall(r'data-run="(\w+)"', served.client.get("/?all").text)


def test_a_run_is_followed_while_it_is_written(make_run: Callable[..., Path], serve: Callable[..., Any]) -> None:
    folder = make_run(status="running")
    served = serve(folder)
    (run_id,) = ids_of(served)
    events = served.events(f"/events/run/{run_id}")
    first = next(events)
    assert (
        first["title"].startswith("30% · loss 0.3333")
        and {"metrics", "log", "rows", "config"} <= first["sections"].keys()
    )
    whole = '{"step": 7, "kind": "training", "time": 1767225607, "loss": 0.875}\n'
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(whole[:30])
        log.flush()
        torn = threading.Timer(0.3, lambda: (log.write(whole[30:]), log.flush()))
        torn.start()
        second = next(events)
        torn.join()
    assert "0.8750" in second["sections"]["log"] and second["title"].startswith("35% · loss 0.8750")
    assert "config" not in second["sections"], "only what has changed is sent"
    shutil.rmtree(folder)
    third = next(events)
    assert "not here any more" in third["sections"]["top"]
    events.close()


def test_runs_appear_in_the_list_and_disappear(
    make_run: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    served = serve(tmp_path)
    events = served.events("/events/list")
    assert next(events)["title"] == "0 runs"
    folder = make_run("later", status="running")
    assert next(events)["title"] == "1 run, 1 running"
    shutil.rmtree(folder)
    assert next(events)["title"] == "0 runs"
    events.close()


def test_stopping_needs_the_token(make_run: Callable[..., Path], serve: Callable[..., Any]) -> None:
    running, done = make_run("a", status="running"), make_run("b")
    served = serve(running.parent, token=TOKEN)
    first, second = (f"/run/{run_id}/stop" for run_id in ids_of(served))
    wrong = ("", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer é")
    for headers in ({}, {"cookie": f"token={TOKEN}"}, *({"authorization": value.encode()} for value in wrong)):
        assert served.client.post(first, headers=headers).status_code == 403
    assert served.client.get(first, headers=BEARER).status_code == 405
    assert not (running / "STOP").exists()
    assert served.client.post(first, headers=BEARER).json() == {"message": "It stops at its next step"}
    assert (running / "STOP").is_file()
    assert served.client.post(first, headers=BEARER).json() == {"message": "It was asked to before"}
    assert "stops at its next step" in served.client.get(first.removesuffix("/stop")).text
    refused = served.client.post(second, headers=BEARER)
    assert refused.status_code == 409 and refused.json()["message"] == "the run is completed"
    assert not (done / "STOP").exists()
    assert served.client.post(first, headers=BEARER, content=b"x" * 70_000).status_code == 413


def test_nothing_is_written_through_a_link(
    make_run: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    running = make_run("a", status="running")
    (running / "STOP").symlink_to(tmp_path / "elsewhere")
    served = serve(running, token=TOKEN)
    assert served.client.post(f"/run/{ids_of(served)[0]}/stop", headers=BEARER).status_code == 200
    assert not (tmp_path / "elsewhere").exists()


def test_without_control_nobody_can(make_run: Callable[..., Path], serve: Callable[..., Any]) -> None:
    running = make_run(status="running")
    served = serve(running)
    (run_id,) = ids_of(served)
    for headers in ({}, BEARER, {"authorization": "Bearer None"}, {"authorization": "Bearer x"}):
        for path in ("stop", "chat"):
            assert served.client.post(f"/run/{run_id}/{path}", headers=headers).status_code == 403
    assert not (running / "STOP").exists()
    assert 'id="chat"' not in served.client.get(f"/run/{run_id}").text


def said(answer: httpx.Response) -> dict[str, str]:
    """The pieces of an answer, joined by kind."""
    pieces: dict[str, str] = {}
    for line in answer.text.splitlines():
        for kind, text in json.loads(line).items():
            pieces[kind] = pieces.get(kind, "") + text
    return pieces


def test_a_finished_run_can_be_talked_to(
    make_run: Callable[..., Path], serve: Callable[..., Any], open_chat: Callable[[Path], Chat]
) -> None:
    going, done = make_run("a", status="running"), make_run("b")
    served = serve(going.parent, token=TOKEN, open_chat=open_chat)
    first, second = (f"/run/{run_id}/chat" for run_id in ids_of(served))
    question = {"question": "What is two plus two?", "adapter": True, "new": True}
    answer = served.client.post(second, json=question, headers=BEARER)
    expected = open_chat(done)
    assert said(answer) == {"note": "loading the model", "text": expected.ask("What is two plus two?").text}
    again = served.client.post(second, json={**question, "question": "And four?", "new": False}, headers=BEARER)
    assert said(again)["text"] == expected.ask("And four?").text, "it remembers what was said"
    fresh = served.client.post(second, json=question, headers=BEARER)
    assert said(fresh)["text"] == said(answer)["text"]
    assert served.client.post(first, json=question, headers=BEARER).status_code == 409
    assert served.client.post(second, content=b"{", headers=BEARER).status_code == 400
    assert served.client.post(second, json=question).status_code == 403


def test_a_model_that_cannot_be_loaded_is_an_answer(make_run: Callable[..., Path], serve: Callable[..., Any]) -> None:
    from finetuning.cli.watch import _open_chat

    served = serve(make_run(), token=TOKEN, open_chat=_open_chat)
    question = {"question": "Hello?", "adapter": True, "new": True}
    answer = served.client.post(f"/run/{ids_of(served)[0]}/chat", json=question, headers=BEARER)
    assert "neither a final model nor a checkpoint" in said(answer)["error"]


def test_one_answer_at_a_time_and_an_abandoned_one_ends(open_chat: Callable[[Path], Chat], tmp_path: Path) -> None:
    opened = threading.Event()

    def open_slowly(folder: Path) -> Chat:
        opened.wait(60)
        return open_chat(folder)

    conversations = Conversations(open_slowly)

    async def talk() -> tuple[list[str], list[str]]:
        options = {"adapter": True, "is_new": True, "is_stopping": lambda: False}
        first = conversations.ask(tmp_path, "Hello?", **options)
        begun = await anext(first)
        refused = [piece.text async for piece in conversations.ask(tmp_path, "And I?", **options)]
        await first.aclose()
        opened.set()
        while (pieces := [piece.text async for piece in conversations.ask(tmp_path, "And now?", **options)]) == refused:
            await asyncio.sleep(0.02)
        return [begun.text, *refused], pieces

    refused, answered = asyncio.run(talk())
    assert refused == ["loading the model", "The model is answering another question. Ask again when it has finished."]
    assert answered


@pytest.mark.parametrize("control", [False, True])
def test_the_command_prints_an_address_and_ends_with_ctrl_c(
    control: bool, make_run: Callable[..., Path], fork_server: ForkServer
) -> None:
    folder = make_run(status="running")
    process = fork_server.start(
        ["watch", folder.name, "later", "--port", "0", *(["--control"] * control)], cwd=folder.parent
    )
    pattern = r"  (http://127\.0\.0\.1:\d+/)(?:#(\S{32}))?\n.*Ctrl-C"
    assert process.wait_for(lambda: re.search(pattern, process.stdout) is not None), process.output
    matched = re.search(pattern, process.stdout)
    assert matched is not None and bool(matched[2]) == control
    (run_id,) = re.findall(r'data-run="(\w+)"', httpx.get(matched[1]).text)
    if control:
        headers = {"authorization": f"Bearer {matched[2]}"}
        assert httpx.post(f"{matched[1]}run/{run_id}/stop", headers=headers).status_code == 200
        assert (folder / "STOP").is_file()
    with httpx.stream("GET", f"{matched[1]}events/run/{run_id}") as events:
        assert next(events.iter_lines()).startswith("data: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert process.stdout.endswith("stopped; the runs go on\n") and not process.stderr
    assert "later does not exist yet; it is shown once it does" in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 110


def test_a_port_that_is_taken_and_other_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_socket(0) as listener:
        port = listener.getsockname()[1]
        assert main([str(tmp_path), "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: port {port} cannot be used: Address already in use. Another finetuning watch may be running. Choose"
        " another port with --port; 0 takes a free one.\n"
    )
    assert main([str(tmp_path), "--port", "70000"]) == 1
    assert "port 70000 cannot be used" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 1
    assert "file is a file. Name an output directory" in capsys.readouterr().err
    monkeypatch.setenv("FINETUNING_WATCH_TOKEN", "short")
    assert main([str(tmp_path), "--control"]) == 1
    assert "FINETUNING_WATCH_TOKEN must have at least 16 printable ASCII characters" in capsys.readouterr().err
