"""The pages of `finetuning watch`: what they show, that all of it is escaped, and what they never read."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from finetuning.report.html import render
from finetuning.report.run_folder import files_read, read_run
from finetuning.watch.run_folders import RunFolders, links_outside
from finetuning.watch.server import WatchServer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'>"
OPENED: list[str] = []
"""Files that were opened, while `record_opened` is in use."""
_is_recording = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_recording and event == "open" and isinstance(arguments[0], str):
        OPENED.append(arguments[0])


@pytest.fixture
def opened() -> Any:
    """The files that Python opens from now on."""
    global _is_recording
    if not OPENED:
        sys.addaudithook(_hook)
        OPENED.append("the hook cannot be removed, and is added once")
    del OPENED[1:]
    _is_recording = True
    yield OPENED
    _is_recording = False


def client_of(*roots: Path, **options: Any) -> TestClient:
    return TestClient(
        WatchServer(roots, refresh_s=0, **options).app(), base_url="http://127.0.0.1:8778", follow_redirects=False
    )


def ids_on(page: str) -> list[str]:
    return re.findall(r'data-run="(\w+)"', page)


class Markup(html.parser.HTMLParser):
    """The tags of a page, and the attributes that a content security policy forbids."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.forbidden: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.forbidden += [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_shows_what_its_report_shows(make_run: Callable[..., Path]) -> None:
    folder = make_run(artifact={"kind": "adapter", "folder": "out/final", "checks": ["all values finite"]})
    client = client_of(folder.parent)
    (run_id,) = ids_on(client.get("/").text)
    page = client.get(f"/run/{run_id}").text
    report = render([read_run(folder)])
    for part in ("adapter", "all values finite", "learning_rate: 3", "ft out", "rows.jsonl:1 (row)"):
        assert part in page and part in report
    charts = re.findall(r'<svg viewBox="0 0 400.*?</svg>', report, re.DOTALL)
    assert charts and all(chart in page for chart in charts)
    assert re.findall("<mark>(.*?)</mark>", page) == re.findall("<mark>(.*?)</mark>", report)
    assert "step  6/20  epoch –  loss 0.3333  lr 0.1  – tokens/s" in page


def test_planted_html_stays_text(make_run: Callable[..., Path]) -> None:
    first = make_run("a<b>&\"'", model={"name": HOSTILE}, method=HOSTILE, warnings=[HOSTILE], error=HOSTILE)
    second = make_run("b", summary=[[HOSTILE, HOSTILE, HOSTILE]], artifact={"kind": HOSTILE, "folder": HOSTILE})
    for folder in (first, second):
        (folder / "config.resolved.yaml").write_text(json.dumps({HOSTILE: HOSTILE + folder.name}))
        with (folder / "metrics.jsonl").open("a") as log:
            log.writelines(json.dumps({"step": step, "kind": "training", HOSTILE: step}) + "\n" for step in (7, 8))
    client = client_of(first.parent)
    listed = client.get("/").text
    ids = ids_on(listed)
    pages = [listed, *(client.get(f"/run/{run_id}").text for run_id in ids)]
    pages.append(client.get(f"/compare?run={ids[0]}&run={ids[1]}").text)
    for page in pages:
        parsed = Markup(page)
        assert parsed.tags.count("script") == 2 and "img" not in parsed.tags, "only the scripts of the page itself"
        assert not parsed.forbidden
        assert "onerror" in parsed.text


def test_secrets_are_redacted_in_what_is_sent(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3t-value-of-mine")
    folder = make_run(warnings=["cannot reach http://me:s3cr3t-value-of-mine@host"])
    client = client_of(folder.parent)
    (run_id,) = ids_on(client.get("/").text)
    page = client.get(f"/run/{run_id}").text
    assert "cannot reach http://" in page and "s3cr3t" not in page


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8778", 200),
        ("localhost:9000", 200),
        ("evil.example", 400),
        ("evil.example:8778", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.", 400),
        ("", 400),
    ],
)
def test_only_names_of_this_machine_are_answered(host: str, status: int, make_run: Callable[..., Path]) -> None:
    client = client_of(make_run().parent)
    for path in ("/", "/style.css", "/events/run/x", "/run/x/stop"):
        answer = client.get(path, headers={"host": host})
        if path == "/" or status == 400:
            assert answer.status_code == status
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_a_path_in_an_address_reads_nothing(make_run: Callable[..., Path], opened: list[str]) -> None:
    folder = make_run("runs/a")
    outside = make_run("elsewhere")
    client = client_of(folder.parent, token="t" * 24)
    del opened[1:]
    for name in ("..%2f..%2felsewhere", "%2e%2e", str(outside).replace("/", "%2f"), "elsewhere", "%00", "x" * 5000):
        for path in (f"/run/{name}", f"/events/run/{name}", f"/compare?run={name}&run={name}2", f"/{name}"):
            assert client.get(path).status_code == 404
        answer = client.post(f"/run/{name}/stop", headers={"authorization": "Bearer " + "t" * 24})
        assert answer.status_code == 404
    assert client.get("/compare").status_code == 400
    assert client.get("/compare?" + "&".join(f"run={n}" for n in range(9))).status_code == 400
    assert not [path for path in opened if "elsewhere" in path]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.resolved.yaml", "preview.txt", "evaluations/x.json",
                                  "telemetry/job/rank0.jsonl", "merged/merge_verification.json"])  # fmt: skip
def test_links_to_outside_are_not_followed(
    name: str, make_run: Callable[..., Path], tmp_path: Path, opened: list[str]
) -> None:
    folder = make_run("runs/a")
    secret = tmp_path / "secret"
    secret.write_text('{"step": 1, "kind": "training", "loss": 4242}\n')
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    client = client_of(tmp_path / "runs")
    del opened[1:]
    ids = ids_on(client.get("/").text)
    pages = [client.get(f"/run/{run_id}").text for run_id in ids]
    assert not [path for path in opened if "secret" in path or Path(path).resolve() == secret]
    assert not any("4242" in page for page in pages)
    if name == "metrics.jsonl":
        assert not ids, "not even listed: the list reads it"
    else:
        assert f"{Path(name).name} in" in pages[0] and "is a link to a file outside of" in pages[0]


def test_a_whole_folder_that_is_a_link_is_read_only_if_the_user_names_it(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    target = make_run("elsewhere/a")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(target)
    assert RunFolders([tmp_path / "runs"]).refresh() == []
    (run,) = RunFolders([tmp_path / "runs" / "linked"]).refresh()
    assert run.folder == target and links_outside(run) == []


def test_every_file_that_is_read_of_a_run_is_checked_for_links(
    make_run: Callable[..., Path], opened: list[str]
) -> None:
    folder = make_run()
    for name in ("evaluations/a.json", "merged/merge_verification.json", "checkpoint-3/trainer_state.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    (folder / "telemetry" / "job").mkdir(parents=True)
    (folder / "telemetry" / "job" / "rank0.jsonl").write_text('{"type": "span"}\n')
    # Without it, losses come from the checkpoints and from training_logs.jsonl.
    (folder / "metrics.jsonl").write_text("")
    (folder / "training_logs.jsonl").write_text('{"name": "training_loss", "data": {"step": 1, "value": 2}}\n')
    client = client_of(folder.parent)
    del opened[1:]
    (run_id,) = ids_on(client.get("/").text)
    assert client.get(f"/run/{run_id}").status_code == 200
    read = {Path(path) for path in opened if str(folder) in path} - {folder / ".finetuning.lock"}
    assert len(read) >= 7 and read <= set(files_read(folder))


def test_hundreds_of_runs_are_read_once(make_run: Callable[..., Path], tmp_path: Path, opened: list[str]) -> None:
    first = make_run("runs/0")
    for number in range(1, 300):
        shutil.copytree(first, first.parent / f"deep/{number}")
    folders = RunFolders([first.parent])
    assert len(folders.refresh()) == 300
    (first.parent / "deep" / "7" / "metrics.jsonl").write_text('{"step": 9, "loss": 0.125}\n')
    del opened[1:]
    runs = folders.refresh()
    assert {Path(path).parent.name for path in opened[1:] if str(first.parent) in path} <= {"7"}
    assert [run.name for run in runs if run.state.loss == 0.125] == [str(first.parent / "deep" / "7")]


def test_a_damaged_record_is_said_and_the_rest_is_shown(make_run: Callable[..., Path]) -> None:
    folder = make_run(data={"statistics": [{"split": "training", "rows": 5}]}, warnings=["look here"])
    client = client_of(folder.parent)
    (run_id,) = ids_on(client.get("/").text)
    page = client.get(f"/run/{run_id}").text
    assert "data cannot be shown: " in page
    assert "look here" in page and "learning_rate: 3" in page


def test_states_progress_and_time_left(make_run: Callable[..., Path]) -> None:
    make_run("gone", status="failed")
    make_run("going", status="running")
    running, failed, _ = RunFolders([make_run("done").parent]).refresh()
    assert (running.state.state, failed.state.state) == ("running", "failed")
    assert running.is_running and running.seconds_left == pytest.approx(14.0)
    assert failed.seconds_left is None
    client = client_of(running.root)
    listed = client.get("/").text
    assert "3 runs, 1 running" in listed and 'max="20" value="6"' in listed and "14s left" in listed
    page = client.get(f"/run/{running.id}").text
    assert '<span class="status busy">running</span>' in page and "30% · loss 0.3333" in page
    assert "<dt>loss</dt>" in page and "<dt>final loss</dt>" not in page, "nothing is final while it runs"


def test_one_named_run_is_shown_at_once_and_one_to_come_is_waited_for(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    client = client_of(tmp_path / "out")
    waiting = client.get("/").text
    assert "No run in" in waiting and 'data-follow="yes"' in waiting
    make_run("out")
    answer = client.get("/")
    assert answer.status_code == 302 and client.get(answer.headers["location"]).status_code == 200
    listed = client.get("/?all").text
    assert len(ids_on(listed)) == 1 and 'data-follow="no"' in listed
