"""Who is at the page: sessions, tokens, and requests that are refused."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from hf_locstitch.errors import RecipeError
from hf_locstitch.ui.config import UiConfig
from hf_locstitch.ui.serve import _check, is_news, is_used, why_refused
from hf_locstitch.ui.sign_in import COOKIE, Expiring, LocalUser, OAuthApp, SignIn, oauth_app, visitor_of
from hf_locstitch.ui.visitor import Visitor, worker_environment
from loopback_hub import LoopbackHub

SERVER = {
    "PATH": "/bin",
    "HF_TOKEN": "hf_server",
    "HF_HOME": "/home/hub",
    "OAUTH_CLIENT_SECRET": "secret",
    "AWS_SECRET_ACCESS_KEY": "aws",
    "WANDB_API_KEY": "wandb",
    "HF_ASSETS_CACHE": "/home/hub/assets",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_ENDPOINT": "http://hub",
}


def test_a_strangers_worker_has_nothing_of_the_servers() -> None:
    environment = worker_environment(SERVER, Visitor("ann", "hf_ann"), Path("/work"))
    assert not {"hf_server", "secret", "hf_ann", "/home/hub", "/home/hub/assets", "aws", "wandb"} & {
        *environment.values()
    }
    assert environment["HF_ENDPOINT"] == "http://hub" and environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["HF_HOME"].startswith("/work/homes/")


def test_each_visitor_has_a_home_of_their_own() -> None:
    visitors = [Visitor("ann", "t"), Visitor("ben", "t"), Visitor()]
    assert len({worker_environment(SERVER, one, Path("/work"))["HF_HOME"] for one in visitors}) == 3


def test_the_user_of_this_machine_has_their_own_login() -> None:
    environment = worker_environment(SERVER, Visitor("me", here=True), Path("/work"))
    assert (environment["HF_TOKEN"], environment["HF_HOME"]) == ("hf_server", "/home/hub")


def test_the_client_sends_the_visitors_token_or_none() -> None:
    assert Visitor().client_token is False  # not even the server's
    assert Visitor("ann", "hf_ann").client_token == "hf_ann"
    assert Visitor("me", here=True).client_token is None  # the client finds the login itself


def test_a_value_is_kept_for_a_time_and_not_more_than_so_many() -> None:
    kept = Expiring(most=2)
    old, late = kept.put("old", 60), kept.put("late", -1)
    assert (kept.get(old), kept.get(late), kept.get(None)) == ("old", None, None)
    newest = kept.put("newest", 60)
    assert kept.get(old) is None and kept.pop(newest) == "newest" and kept.get(newest) is None


def test_a_session_is_known_by_its_cookie_alone() -> None:
    sign_in = SignIn(OAuthApp("client", "secret", "openid", "http://hub"))
    key = sign_in._sessions.put(Visitor("ann", "hf_ann"), 60)
    assert sign_in.visitor({COOKIE: key}).name == "ann"
    assert sign_in.visitor({COOKIE: "guessed"}) == sign_in.visitor({}) == Visitor()


def test_the_visitor_is_who_the_hub_says() -> None:
    orgs = [{"preferred_username": "lab", "roleInOrg": "write"}, {"preferred_username": "fans", "roleInOrg": "read"}]
    assert visitor_of({"preferred_username": "ann", "orgs": orgs}, "t").writable == ("ann", "lab")


def test_a_space_without_oauth_is_told_of_it() -> None:
    with pytest.raises(RecipeError, match=r"OAUTH_CLIENT_ID.*hf_oauth: true"):
        oauth_app({})


@pytest.mark.parametrize(
    ("method", "headers", "refused"),
    [
        ("POST", {"host": "127.0.0.1:7860", "content-length": "9", "origin": "http://127.0.0.1:7860"}, False),
        ("POST", {"host": "127.0.0.1:7860", "content-length": "9"}, False),
        ("POST", {"host": "127.0.0.1:7860", "content-length": "9", "origin": "https://evil.example"}, True),
        ("POST", {"host": "127.0.0.1:7860", "content-length": "9", "origin": "null"}, True),
        ("GET", {"host": "evil.example:7860"}, True),  # a name that was made to point here
        ("GET", {"host": "[::1]:7860"}, False),
        ("GET", {}, True),
    ],
)
def test_what_other_sites_make_a_browser_send_is_refused(method: str, headers: dict[str, str], refused: bool) -> None:
    assert (why_refused(method, headers, ("127.0.0.1", "localhost", "::1")) is not None) == refused


@pytest.mark.parametrize(("origin", "refused"), [("https://me-x.hf.space", False), ("https://evil.hf.space", True)])
def test_a_space_behind_a_proxy_knows_its_own_pages(origin: str, refused: bool) -> None:
    headers = {"host": "10.0.0.7:7860", "content-length": "9", "origin": origin}
    assert (why_refused("POST", headers, None, "me-x.hf.space") is not None) == refused


@pytest.mark.parametrize(("length", "refused"), [("1000000", False), ("1000001", True), ("-1", True), (None, True)])
def test_no_request_fills_the_memory(length: str | None, refused: bool) -> None:
    headers = {"host": "localhost"} | ({} if length is None else {"content-length": length})
    assert (why_refused("POST", headers, None) is not None) == refused


@pytest.mark.parametrize(
    ("path", "used"),
    [
        ("/", True),
        ("/login/callback", True),
        ("/gradio_api/queue/join", True),
        ("/gradio_api/upload", False),  # takes files from anybody
        ("/gradio_api/file=/etc/hostname", False),
        ("/gradio_api/proxy=https://hub/x", False),
        ("/gradio_api/run-history/buckets", False),  # those of the token of this machine
        ("/gradio_api/deep_link", False),  # writes the state of a session to the disk
        ("/gradio_api/run/plan", False),
    ],
)
def test_of_gradios_own_addresses_those_that_the_page_uses_are_there(path: str, used: bool) -> None:
    assert is_used(path) == used


def test_ones_own_login_is_not_lent_to_a_network(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="your own login"):
        _check(UiConfig(tmp_path, host="0.0.0.0"))
    _check(UiConfig(tmp_path, host="0.0.0.0", visitors=True))


def test_the_user_of_this_machine_is_asked_for_once_a_while(home_hub: LoopbackHub) -> None:
    user = LocalUser()
    assert [user.visitor({}) for _ in range(3)] == [Visitor("demo", None, ("lab",), here=True)] * 3
    assert [one.path for one in home_hub.requests] == ["/api/whoami-v2"]


def test_without_a_login_the_user_of_this_machine_has_no_name(home_hub: LoopbackHub, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert LocalUser().visitor({}) == Visitor(here=True)


@pytest.mark.parametrize(("error", "news"), [(asyncio.CancelledError(), False), (ValueError("x"), True), (None, True)])
def test_open_pages_leave_no_traceback_at_the_end(error: BaseException | None, news: bool) -> None:
    found = (type(error), error, None) if error else None
    record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 1, "Exception in ASGI application", (), found)
    assert is_news(record) == news
