"""Signing in with the Hub, from the link to the session and out again; skipped without the page's libraries."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers.browsing import OAUTH, free_port

from hf_locstitch.ui.sign_in import COOKIE, SignIn, oauth_app
from loopback_hub import LoopbackHub

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("authlib")
httpx = pytest.importorskip("httpx")


@pytest.fixture
def signing(home_hub: LoopbackHub) -> tuple[SignIn, Any]:
    """Who signs in whom, and a browser that does not follow redirects."""
    from fastapi.testclient import TestClient

    sign_in, server = SignIn(oauth_app({**OAUTH, "OPENID_PROVIDER_URL": home_hub.endpoint})), fastapi.FastAPI()
    sign_in.attach(server)
    return sign_in, TestClient(server, follow_redirects=False)


def approve(url: str) -> str:
    """The address that the Hub's page sends a browser back to."""
    page = httpx.get(url, trust_env=False).text
    return re.search(r'href="([^"]+)"', page)[1].replace("&amp;", "&")  # type: ignore[index]


def test_a_visitor_signs_in_and_out(signing: tuple[SignIn, Any]) -> None:
    sign_in, browser = signing
    back = approve(browser.get("/login").headers["location"])
    assert browser.get(back).headers["location"] == "/"
    visitor = sign_in.visitor(browser.cookies)
    assert (visitor.name, visitor.token, visitor.orgs) == ("demo", "hf_loopback", ("lab",))
    assert "hf_loopback" not in str(dict(browser.cookies))
    session = {COOKIE: browser.cookies[COOKIE]}
    browser.get("/logout")
    assert sign_in.visitor(session).name is None and sign_in.visitor(browser.cookies).name is None


def test_a_sign_in_that_another_browser_began_is_refused(signing: tuple[SignIn, Any]) -> None:
    sign_in, browser = signing
    back = approve(browser.get("/login").headers["location"])
    browser.cookies.clear()
    answer = browser.get(back)
    assert answer.status_code == 400 and "begun in another browser" in answer.text
    assert sign_in.visitor(browser.cookies).name is None


def test_a_code_counts_once(signing: tuple[SignIn, Any]) -> None:
    _, browser = signing
    back = approve(browser.get("/login").headers["location"])
    browser.get(back)
    assert browser.get(back).status_code == 400


def test_a_hub_that_is_down_is_said_in_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    from fastapi.testclient import TestClient

    server = fastapi.FastAPI()
    SignIn(oauth_app({**OAUTH, "OPENID_PROVIDER_URL": f"http://127.0.0.1:{free_port()}"})).attach(server)
    answer = TestClient(server).get("/login")
    assert answer.status_code == 502 and "The Hub did not answer" in answer.text and 'href="/"' in answer.text
    assert "signing in failed: ConnectError" in caplog.text and "secret" not in caplog.text


def test_a_code_that_the_hub_does_not_take_is_said_in_a_sentence(signing: tuple[SignIn, Any]) -> None:
    sign_in, browser = signing
    back = approve(browser.get("/login").headers["location"])
    answer = browser.get(re.sub("code=[^&]+", "code=forged", back))
    assert answer.status_code == 502 and "unexpected response" in answer.text
    assert sign_in.visitor(browser.cookies).name is None
