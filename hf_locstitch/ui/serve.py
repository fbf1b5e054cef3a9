"""The server of the page: who may reach it, what a browser may load from it, and its end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from hf_locstitch.errors import RecipeError
from hf_locstitch.runtime.files import is_writable
from hf_locstitch.runtime.packages import need
from hf_locstitch.ui.calls import forget_looks
from hf_locstitch.ui.config import UiConfig
from hf_locstitch.ui.jobs import Jobs, forget_home, merge_worker
from hf_locstitch.ui.sign_in import LocalUser, SignIn, oauth_app
from hf_locstitch.ui.visitor import Visitor

HERE = ("127.0.0.1", "localhost", "::1")
BARE = ("GET", "HEAD", "OPTIONS")  # requests that change nothing and carry nothing
LARGEST = 1_000_000  # bytes of a request: the page sends a form
HOW: dict[str, Any] = {
    "log_level": "warning",
    "timeout_graceful_shutdown": 2,
}  # of uvicorn; pages hold connections open
# Of Gradio's own addresses, those that the page uses: not uploads, files, proxies, links to states, or its API by name.
OWN, USED = "/gradio_api/", ("queue/join", "queue/data", "heartbeat/", "startup-events", "cancel", "reset", "info")
# Everything comes from this server: no fonts, scripts or frames of others. Gradio's page needs inline code.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'self'; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self' https://huggingface.co"
)


def check_installed() -> None:
    """Raises RecipeError unless the libraries of the page are there."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    need("the page in the browser", "gradio", "authlib")


class Server:
    """A page and its jobs.

    Args:
        config: How it is served.
        environment: With what a Space is told of its OAuth application, if there are visitors.
    """

    def __init__(self, config: UiConfig, environment: Mapping[str, str] = os.environ) -> None:
        check_installed()
        _check(config)
        self.config = config
        application = oauth_app(environment) if config.visitors else None
        self._host = application.host if application else None
        self._users = SignIn(application) if application else LocalUser()
        work = config.work
        forget_looks(work, lambda _: False)  # of a dead server
        self.jobs = Jobs(work / "jobs", merge_worker(work), at_once=config.at_once, forget=forget_home(work))

    def visitor(self, cookies: Mapping[str, str]) -> Visitor:
        """Who a request comes from."""
        return self._users.visitor(cookies)

    def application(self) -> Any:
        """As an ASGI application."""
        import gradio  # pyright: ignore[reportMissingImports]
        from fastapi import FastAPI  # pyright: ignore[reportMissingImports]

        from hf_locstitch.ui.app import build

        server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        if isinstance(self._users, SignIn):
            self._users.attach(server)
        hosts = None if self.config.visitors or self.config.host not in HERE else HERE
        server.add_middleware(Guard, hosts=hosts, own=self._host)
        blocks, look = build(self.config, self.jobs, self.visitor)
        return gradio.mount_gradio_app(
            server, blocks, path="/", show_error=False, footer_links=[], max_file_size="1mb",
            run_history=False, enable_monitoring=False, **look,
        )  # fmt: skip

    def run(self) -> None:
        """Serve until a signal ends it; merges that run are stopped, and can be gone on with."""
        import uvicorn  # pyright: ignore[reportMissingImports]

        logging.getLogger("uvicorn.error").addFilter(is_news)
        try:
            uvicorn.run(self.application(), host=self.config.host, port=self.config.port, **HOW)
        finally:
            self.jobs.close()


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's is: that the connections of open pages are cut at the end is none."""
    cut = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and not record.getMessage().startswith("Cancel ")


def _check(config: UiConfig) -> None:
    """Raises RecipeError."""
    if not is_writable(config.work):
        raise RecipeError(f"{config.work} cannot be written to, and merges are made there. Use another --work-dir.")
    if not config.visitors and config.host not in HERE:
        raise RecipeError(
            f"--host {config.host} would let others merge with your own login. Use 127.0.0.1, and for others a Space "
            "(space/ has one), where each signs in."
        )


class Guard:
    """ASGI middleware: refuses requests that another site makes a browser send, and adds headers that keep a browser
    from loading anything from elsewhere.

    Args:
        app: What answers.
        hosts: Names that the server may be called by; None for any.
        own: That of a Space, as browsers see it.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] | None, own: str | None = None) -> None:
        self._app, self._hosts, self._own = app, hosts, own

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = why_refused(scope["method"], headers, self._hosts, self._own)
        if refusal is None and not is_used(scope["path"]):
            refusal = "this page has no such address"
        if refusal:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": refusal.encode()})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = {
                    "content-security-policy": POLICY,
                    "referrer-policy": "same-origin",
                    "x-content-type-options": "nosniff",
                }
                message["headers"] = [
                    *message.get("headers", ()),
                    *((k.encode(), v.encode()) for k, v in added.items()),
                ]
            await send(message)

        await self._app(scope, receive, guarded)


def is_used(path: str) -> bool:
    """Whether the page asks for it. path: of a request, decoded."""
    return not path.startswith(OWN) or path.removeprefix(OWN).startswith(USED)


def why_refused(
    method: str, headers: Mapping[str, str], hosts: tuple[str, ...] | None, own: str | None = None
) -> str | None:
    """Why a request is not answered, if it is not. headers: by names in lower case. hosts, own: as `Guard` has them."""
    called = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    if hosts is not None and called not in hosts:
        return f"this server is not called {called[:100]!r}"
    if method not in BARE and not 0 <= _length(headers) <= LARGEST:
        return f"this request does not tell its length, or is longer than {LARGEST:,} bytes"
    origin = headers.get("origin")
    if method not in BARE and origin is not None and urlsplit(origin).netloc not in (headers.get("host"), own):
        return "this request comes from another site"
    return None


def _length(headers: Mapping[str, str]) -> int:
    """Of a request's body, in bytes; -1 if it is not told."""
    told = headers.get("content-length", "")
    return int(told) if told.isdecimal() else -1
