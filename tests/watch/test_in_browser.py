"""The page in a real browser, where Chromium is installed: updates, the policy, the filter, stopping and chat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuning.inference.chat import Chat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKEN = "a-token-of-this-test-only"
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


class Browser:
    """Chromium, driven through a pipe by the DevTools protocol."""

    def __init__(self, profile: Path):
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()

        # Chromium reads requests from descriptor 3, and writes answers to 4.
        def connect() -> None:
            first, second = os.dup(requests), os.dup(answers)
            os.dup2(first, 3)
            os.dup2(second, 4)
            os.set_inheritable(3, True)
            os.set_inheritable(4, True)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-dev-shm-usage"]
        self._process = subprocess.Popen(
            [str(CHROMIUM), *flags], preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(requests)
        os.close(answers)
        self._rest, self._count = b"", 0
        self.messages: list[str] = []
        """What the console of the page has displayed: errors, among them of the policy."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        request = {"id": self._count, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            request["sessionId"] = self._session
        os.write(self._requests, json.dumps(request).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._answers, 1 << 20)
                assert data, "Chromium has ended"
                self._rest += data
            text, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(text)
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.messages.append(json.dumps(message["params"]))
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + 60
        while not self.value(f"(() => {{ try {{ return Boolean({script}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < deadline, f"{script}\n{self.value('document.body.innerText')}\n{self.messages}"
            time.sleep(0.05)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._requests)
        os.close(self._answers)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    started = Browser(tmp_path / "profile")
    yield started
    started.close()


def test_a_run_is_followed_stopped_and_compared(
    make_run: Callable[..., Path], serve: Callable[..., Any], browser: Browser
) -> None:
    going = make_run("runs/going", status="running")
    make_run("runs/done")
    served = serve(going.parent, token=TOKEN)
    browser.open(f"{served.address}/#{TOKEN}")
    browser.wait_for("document.querySelectorAll('[data-run]').length === 2 && document.querySelector('.connection.on')")
    assert browser.value("location.hash") == "" and TOKEN not in browser.value("document.documentElement.outerHTML")
    assert browser.value("getComputedStyle(document.querySelector('[data-run]')).display") == "grid", (
        "the style is loaded"
    )

    browser.value("(f => { f.value = 'DONE'; f.dispatchEvent(new Event('input')) })(document.getElementById('filter'))")
    visible = "[...document.querySelectorAll('[data-run]')].filter((row) => row.offsetHeight).length"
    assert browser.value(visible) == 1
    browser.value("document.querySelectorAll('[data-compare]').forEach((box) => box.click())")
    browser.value("document.getElementById('compare').click()")
    browser.wait_for("document.body.classList.contains('compare') && document.querySelectorAll('figure').length")
    assert "Config differences" in browser.value("document.body.innerText")

    browser.open(f"{served.address}/?all")
    browser.wait_for("document.querySelector('.name a')")
    browser.value("document.querySelector('.name a').click()")
    browser.wait_for("document.querySelector('figure svg') && document.querySelector('.connection.on')")
    assert "alert(1)" in browser.value("document.body.innerText"), "a row that holds a script is text"
    assert browser.value("document.querySelectorAll('img').length") == 0
    with (going / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "kind": "training", "time": 1767225607, "loss": 0.875}\n')
    browser.wait_for("document.querySelector('.log').innerText.includes('0.8750')")
    browser.wait_for("document.title.startsWith('35% · loss 0.8750')")
    # A chart answers the pointer also after it was replaced.
    move = "new PointerEvent('pointermove', { clientX: box.left + box.width / 2, clientY: box.top + 20 })"
    browser.value(
        f"(svg => {{ const box = svg.getBoundingClientRect(); svg.dispatchEvent({move}) }})"
        "(document.querySelector('figure svg[data-chart]'))"
    )
    assert browser.value("document.querySelector('.tip').innerText").startswith("step ")

    browser.wait_for("document.querySelector('[data-stop]')?.offsetHeight")
    browser.value("document.querySelector('[data-stop]').click()")
    assert not (going / "STOP").exists(), "it asks first"
    browser.value("document.querySelector('[data-stop]').click()")
    browser.wait_for("document.body.innerText.includes('stops at its next step, with a checkpoint')")
    assert (going / "STOP").exists()
    assert not browser.messages


def test_the_chat_of_a_finished_run(
    make_run: Callable[..., Path], serve: Callable[..., Any], open_chat: Callable[[Path], Chat], browser: Browser
) -> None:
    done = make_run()
    served = serve(done, token=TOKEN, open_chat=open_chat)
    browser.open(f"{served.address}/")
    browser.wait_for("document.querySelector('.connection.on')")
    assert not browser.value("document.getElementById('chat').offsetHeight"), "hidden without the token"
    browser.open("about:blank")
    browser.open(f"{served.address}/#{TOKEN}")
    browser.wait_for("document.getElementById('chat')?.offsetHeight")
    lines = "[...document.querySelectorAll('.said')].map((line) => line.firstChild.textContent)"

    def ask(question: str, count: int) -> list[str]:
        form = "document.querySelector('#chat form')"
        browser.value(f"(form => {{ form.question.value = {json.dumps(question)}; form.requestSubmit() }})({form})")
        displayed = f"document.querySelectorAll('.said').length === {count}"
        browser.wait_for(f"document.querySelector('[data-cancel]').disabled && {displayed}")
        return browser.value(lines)[-2:]

    expected = open_chat(done)
    question = "Hello <i>you</i>"
    first = ask(question, 2)
    assert first == [question, expected.ask(question).text]
    assert ask("And four?", 4) == ["And four?", expected.ask("And four?").text]
    browser.value("document.querySelector('[data-new]').click()")
    assert ask(question, 2) == first, "a new conversation remembers nothing"
    assert not browser.messages
