"""The server of `finetuning watch`: pages, their updates as server-sent events, and what a token allows."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from finetuning.errors import ConfigError, parse_json
from finetuning.report.html import page_templates
from finetuning.watch.conversation import Conversations
from finetuning.watch.pages import MOST_COMPARED, LivePage, RunPages, render_list, templates
from finetuning.watch.run_folders import RunFolders, WatchedRun, request_stop

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from finetuning.inference.chat import Chat

HOST = "127.0.0.1"
# Any other name means that a page of elsewhere has its name resolved to this machine, to read what is shown here.
_ALLOWED_HOSTS = ("127.0.0.1", "localhost")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_POLL_S, _KEEP_ALIVE_S = 0.25, 15.0
_IDLE_SHARE = 4
"""Looking takes at most one part in five of the time, however many runs there are."""
_MAX_BODY = 64 * 1024


class _SecurityHeaders:
    """Adds the headers to every response, those of errors included."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class _Refreshed:
    """A page that is rendered again when it is asked for, but not too often; all browsers share it."""

    def __init__(self, render: Callable[[], LivePage], least_s: float):
        self._render = render
        self._least_s = least_s
        self._lock = asyncio.Lock()
        self._due = 0.0
        self._page = LivePage("")

    async def latest(self) -> LivePage:
        async with self._lock:
            began = time.monotonic()
            if began >= self._due:
                self._page = await asyncio.to_thread(self._render)
                now = time.monotonic()
                self._due = now + max(self._least_s, _IDLE_SHARE * (now - began))
            return self._page


class WatchServer:
    """The pages of the runs in and below directories.

    Args:
        roots: the directories. One may be the output directory of a run, and need not exist yet.
        token: needed to stop runs and to chat; without one nobody can.
        open_chat: loads the model of an output directory.
        is_stopping: whether open connections have to end.
        refresh_s: the shortest time between two looks at the files of a run; twice that between two looks for runs.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        *,
        token: str | None = None,
        open_chat: Callable[[Path], Chat] | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
        refresh_s: float = 1.0,
    ):
        self._roots = [str(root) for root in roots]
        self._token = token
        self._is_stopping = is_stopping
        self._refresh_s = refresh_s
        self._folders = RunFolders(roots)
        self._run_pages = RunPages(self._folders)
        self._conversations = Conversations(open_chat) if open_chat else None
        self._refreshed: dict[tuple[str, ...], _Refreshed] = {}
        self._files = _static_files()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/", self._show_list),
                Route("/run/{run}", self._show_runs),
                Route("/compare", self._show_runs),
                Route("/events/list", self._stream),
                Route("/events/run/{run}", self._stream),
                Route("/events/compare", self._stream),
                Route("/run/{run}/stop", self._stop, methods=["POST"]),
                Route("/run/{run}/chat", self._chat, methods=["POST"]),
                *(Route(f"/{name}", self._file) for name in self._files),
            ],
            middleware=[
                Middleware(_SecurityHeaders),
                Middleware(TrustedHostMiddleware, allowed_hosts=_ALLOWED_HOSTS, www_redirect=False),
            ],
        )

    def _page(self, key: tuple[str, ...]) -> _Refreshed:
        """Return the page of these runs; without any, the list."""
        if key not in self._refreshed:
            if len(self._refreshed) >= 64:
                self._refreshed.pop(next(iter(self._refreshed)))
            render = partial(self._run_pages.render, key) if key else self._render_list
            self._refreshed[key] = _Refreshed(render, self._refresh_s if key else 2 * self._refresh_s)
        return self._refreshed[key]

    def _render_list(self) -> LivePage:
        return render_list(self._folders.refresh(), self._roots)

    def _html(self, page: LivePage, **values: object) -> HTMLResponse:
        values = {"page": page, "control": self._token is not None, "address": "", **values}
        return HTMLResponse(templates().get_template("shell.jinja").render(values))

    async def _show_list(self, request: Request) -> Response:
        runs = await asyncio.to_thread(self._folders.refresh)
        # Who names one run wants to see it, also one that is yet to begin.
        follows = len(self._roots) == 1 and "all" not in request.query_params
        if follows and len(runs) == 1 and runs[0].folder == runs[0].root:
            return RedirectResponse(f"/run/{runs[0].id}", status_code=302)
        page = await self._page(()).latest()
        return self._html(page, kind="list", events="/events/list", follow=follows and not runs)

    async def _show_runs(self, request: Request) -> Response:
        runs = await self._requested(request)
        if isinstance(runs, Response):
            return runs
        page = await self._page(tuple(run.id for run in runs)).latest()
        if "run" in request.path_params:
            address = f"/run/{runs[0].id}"
            return self._html(page, kind="run", address=address, events=f"/events{address}", follow=False)
        query = "&".join(f"run={run.id}" for run in runs)
        return self._html(page, kind="compare", events=f"/events/compare?{query}", follow=False)

    async def _requested(self, request: Request) -> list[WatchedRun] | Response:
        """Return the runs that a request names; if there is one that does not exist, the response that says so."""
        named = [request.path_params["run"]] if "run" in request.path_params else request.query_params.getlist("run")
        if not 1 <= len(set(named)) <= MOST_COMPARED:
            return Response(f"compare 2 to {MOST_COMPARED} runs", status_code=400, media_type="text/plain")
        matches = [await asyncio.to_thread(self._folders.find, run_id) for run_id in dict.fromkeys(named)]
        runs = [run for run in matches if run is not None]
        if len(runs) < len(matches):
            return Response("there is no such run here", status_code=404, media_type="text/plain")
        return runs

    async def _stream(self, request: Request) -> Response:
        key: tuple[str, ...] = ()
        if request.url.path != "/events/list":
            runs = await self._requested(request)
            if isinstance(runs, Response):
                return runs
            key = tuple(run.id for run in runs)
        return StreamingResponse(self._events(self._page(key)), media_type="text/event-stream")

    async def _events(self, page: _Refreshed) -> AsyncIterator[str]:
        """Yield the parts that have changed, until the server stops."""
        sent = LivePage("")
        quiet_since = time.monotonic()
        while not self._is_stopping():
            latest = await page.latest()
            if latest is not sent:
                changed = {name: text for name, text in latest.sections.items() if sent.sections.get(name) != text}
                if changed or latest.title != sent.title:
                    quiet_since = time.monotonic()
                    yield f"data: {json.dumps({'title': latest.title, 'sections': changed})}\n\n"
                sent = latest
            if time.monotonic() - quiet_since > _KEEP_ALIVE_S:
                quiet_since = time.monotonic()
                yield ": still here\n\n"
            await asyncio.sleep(_POLL_S)

    async def _file(self, request: Request) -> Response:
        content, media_type = self._files[request.url.path.removeprefix("/")]
        return Response(content, media_type=media_type)

    async def _permitted(self, request: Request, act: Callable[[WatchedRun, bytes], Awaitable[Response]]) -> Response:
        """Let a request with the token act on a run."""
        if self._token is None:
            return _refusal("finetuning watch was started without --control", 403)
        scheme, _, offered = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(offered.encode(), self._token.encode()):
            return _refusal("the token is missing or wrong: open the address that finetuning watch printed", 403)
        run = await asyncio.to_thread(self._folders.find, request.path_params["run"])
        if run is None:
            return _refusal("there is no such run here", 404)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BODY:
                return _refusal(f"more than {_MAX_BODY // 1024} KiB", 413)
        return await act(run, body)

    async def _stop(self, request: Request) -> Response:
        async def stop(run: WatchedRun, body: bytes) -> Response:
            if not run.may_run:
                return _refusal(f"the run is {run.state.state}", 409)
            try:
                is_new = request_stop(run)
            except OSError as error:
                return _refusal(f"{run.name} cannot be written to: {error.strerror}", 409)
            return JSONResponse({"message": "It stops at its next step" if is_new else "It was asked to before"})

        return await self._permitted(request, stop)

    async def _chat(self, request: Request) -> Response:
        async def chat(run: WatchedRun, body: bytes) -> Response:
            if self._conversations is None or run.may_run:
                return _refusal("the run has not ended", 409)
            try:
                asked = parse_json(body)
                question, adapter, is_new = str(asked["question"]), bool(asked["adapter"]), bool(asked["new"])
            except (ValueError, LookupError, TypeError):
                return _refusal("not a question", 400)
            pieces = self._conversations.ask(
                run.folder, question, adapter=adapter, is_new=is_new, is_stopping=self._is_stopping
            )
            lines = (f"{json.dumps({piece.kind: piece.text})}\n" async for piece in pieces)
            return StreamingResponse(lines, media_type="application/x-ndjson")

        return await self._permitted(request, chat)


def _refusal(message: str, status: int) -> Response:
    # The form of an answer in the chat too, which reads lines of JSON.
    return Response(json.dumps({"message": message, "error": message}) + "\n", status, media_type="application/json")


def _static_files() -> dict[str, tuple[str, str]]:
    folder = resources.files("finetuning.watch")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    report = page_templates()
    return {
        "style.css": (report.get_template("style.jinja").render() + read("watch.css"), "text/css"),
        "page.js": (report.get_template("page.js").render(), "text/javascript"),
        "watch.js": (read("watch.js"), "text/javascript"),
        "icon.svg": (read("icon.svg"), "image/svg+xml"),
    }


def open_socket(port: int) -> socket.socket:
    """Return a socket that listens on a port of this machine only; port 0 is any free one.

    Raises:
        ConfigError: the port is in use, or not permitted.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"port {port} cannot be used: {reason}",
            hint="Another finetuning watch may be running. Choose another port with --port; 0 takes a free one.",
        ) from error
    return listener


def serve(roots: Sequence[Path], listener: socket.socket, token: str | None, open_chat: Callable[[Path], Chat]) -> None:
    """Serve the pages until SIGINT or SIGTERM.

    Raises:
        KeyboardInterrupt: after SIGINT.
    """
    stopping = lambda: server.should_exit  # noqa: E731
    app = WatchServer(roots, token=token, open_chat=open_chat, is_stopping=stopping).app()
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
