"""Signing in with the Hub, by OAuth. Tokens stay in this process: a browser gets a random number that stands for one.

What a Space is told of its OAuth application: https://huggingface.co/docs/hub/spaces-oauth
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_locstitch.errors import RecipeError
from hf_locstitch.ui import views
from hf_locstitch.ui.visitor import Visitor

if TYPE_CHECKING:
    from fastapi import FastAPI  # pyright: ignore[reportMissingImports]

COOKIE = "locstitch_session"
MOST = 5_000  # sessions, and sign-ins under way
UNDER_WAY = 600.0  # seconds to sign in
ASKED_EVERY = 60.0  # seconds between two questions to the Hub who the user of this machine is
LONGEST = 8 * 3600.0  # seconds of a session, if the Hub does not say
DECLINED = "The sign-in was declined, was begun in another browser, or took longer than ten minutes. Begin it again."
NO_ANSWER = "The Hub did not answer, or returned an unexpected response. Nothing is lost: try again in a few minutes."
VARIABLES = ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OAuthApp:
    """What the Hub calls this application. host: of the Space, as browsers see it; None takes the request's own."""

    client_id: str
    client_secret: str = field(repr=False)
    scopes: str
    provider: str
    host: str | None = None


def oauth_app(environment: Mapping[str, str]) -> OAuthApp:
    """From the variables that a Space with `hf_oauth: true` has. Raises RecipeError."""
    if missing := [name for name in VARIABLES if not environment.get(name)]:
        raise RecipeError(
            f"visitors sign in by OAuth, and {', '.join(missing)} is not set. Put `hf_oauth: true` into the README.md "
            "of the Space, or run `hf-locstitch ui` for yourself alone."
        )
    host = environment.get("SPACE_HOST", "").split(",")[0] or None
    client_id, client_secret, scopes, provider = (environment[name] for name in VARIABLES)
    return OAuthApp(client_id, client_secret, scopes, provider, host)


class Expiring:
    """Values by random keys, for a time."""

    def __init__(self, most: int = MOST) -> None:
        self._lock, self._most = threading.Lock(), most
        self._values: OrderedDict[str, tuple[float, Any]] = OrderedDict()

    def put(self, value: Any, seconds: float) -> str:
        """Keep a value for so long; returns its key."""
        key = secrets.token_urlsafe(32)
        with self._lock:
            self._values[key] = (time.time() + seconds, value)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return key

    def get(self, key: str | None) -> Any:
        """The value, or None."""
        with self._lock:
            until, value = self._values.get(key or "", (0.0, None))
            return value if time.time() < until else None

    def pop(self, key: str | None) -> Any:
        """The value for the last time, or None."""
        value = self.get(key)
        with self._lock:
            self._values.pop(key or "", None)
        return value


class SignIn:
    """Who a request comes from, by its cookie."""

    def __init__(self, app: OAuthApp) -> None:
        self._app = app
        self._sessions, self._under_way = Expiring(), Expiring()

    def visitor(self, cookies: Mapping[str, str]) -> Visitor:
        """Somebody without a name if they are not signed in."""
        return self._sessions.get(cookies.get(COOKIE)) or Visitor()

    def attach(self, server: FastAPI) -> None:
        """Add /login, /login/callback and /logout."""
        from fastapi import Request  # pyright: ignore[reportMissingImports]
        from fastapi.responses import HTMLResponse, RedirectResponse  # pyright: ignore[reportMissingImports]

        async def login(request: Request) -> RedirectResponse:
            async with self._client(request) as client:
                found = await self._provider(client)
                verifier, own = secrets.token_urlsafe(48), secrets.token_urlsafe(16)
                state = self._under_way.put((verifier, own), UNDER_WAY)
                url, _ = client.create_authorization_url(
                    found["authorization_endpoint"], state=state, code_verifier=verifier
                )
            answer = RedirectResponse(url, 303)
            answer.set_cookie(f"{COOKIE}_began", own, max_age=int(UNDER_WAY), **self._cookie(request))
            return answer

        async def callback(request: Request) -> HTMLResponse | RedirectResponse:
            verifier, own = self._under_way.pop(request.query_params.get("state")) or ("", "")
            if not own or request.cookies.get(f"{COOKIE}_began") != own or "code" not in request.query_params:
                return HTMLResponse(views.not_signed_in(DECLINED), 400)
            async with self._client(request) as client:
                found = await self._provider(client)
                token = await client.fetch_token(
                    found["token_endpoint"], code=request.query_params["code"], code_verifier=verifier
                )
                about = (await client.get(found["userinfo_endpoint"])).raise_for_status().json()
            seconds = float(token.get("expires_in") or LONGEST)
            answer = RedirectResponse("/", 303)
            session = self._sessions.put(visitor_of(about, token["access_token"]), seconds)
            answer.set_cookie(COOKIE, session, max_age=int(seconds), **self._cookie(request))
            answer.delete_cookie(f"{COOKIE}_began")
            return answer

        async def logout(request: Request) -> RedirectResponse:
            self._sessions.pop(request.cookies.get(COOKIE))
            answer = RedirectResponse("/", 303)
            answer.delete_cookie(COOKIE)
            return answer

        def told(handler: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
            """With a page that says so where the Hub does not answer, or not as it should."""

            async def answer(request: Request) -> Any:
                try:
                    return await handler(request)
                except Exception as error:  # of the connection, of OAuth, of what the answer holds
                    log.warning("signing in failed: %s", type(error).__name__)
                    return HTMLResponse(views.not_signed_in(NO_ANSWER), 502)

            answer.__annotations__["request"] = Request
            return answer

        for path, handler in (("/login", login), ("/login/callback", callback), ("/logout", logout)):
            server.add_api_route(path, told(handler), methods=["GET"], include_in_schema=False, response_model=None)

    def _origin(self, request: Any) -> str:
        return f"https://{self._app.host}" if self._app.host else str(request.base_url).rstrip("/")

    def _cookie(self, request: Any) -> dict[str, Any]:
        return {"httponly": True, "samesite": "lax", "secure": self._origin(request).startswith("https:"), "path": "/"}

    def _client(self, request: Any) -> Any:
        from authlib.integrations.httpx_client import AsyncOAuth2Client  # pyright: ignore[reportMissingImports]

        return AsyncOAuth2Client(
            self._app.client_id,
            self._app.client_secret,
            scope=self._app.scopes,
            redirect_uri=f"{self._origin(request)}/login/callback",
            code_challenge_method="S256",
            timeout=20,
        )

    async def _provider(self, client: Any) -> Mapping[str, str]:
        url = f"{self._app.provider.rstrip('/')}/.well-known/openid-configuration"
        return (await client.request("GET", url, withhold_token=True)).raise_for_status().json()


def visitor_of(about: Mapping[str, Any], token: str) -> Visitor:
    """about: as the Hub's userinfo endpoint answers, with the organisations that the visitor has granted."""
    orgs = [org.get("preferred_username") for org in about.get("orgs") or () if org.get("roleInOrg") != "read"]
    return Visitor(str(about["preferred_username"]), token, tuple(str(org) for org in orgs if org))


class LocalUser:
    """The user of this machine, by their own login to the Hub, if they have one."""

    def __init__(self) -> None:
        self._known, self._until = Visitor(here=True), 0.0

    def visitor(self, cookies: Mapping[str, str]) -> Visitor:
        """Asks the Hub now and then, for the user may log in meanwhile."""
        if time.monotonic() > self._until:
            self._known = _logged_in()
            self._until = time.monotonic() + (ASKED_EVERY if self._known.name else 2.0)
        return self._known


def _logged_in() -> Visitor:
    from huggingface_hub import HfApi

    from hf_locstitch.report.push_rights import namespaces

    try:
        own, *orgs = namespaces(HfApi().whoami())
    except Exception:
        return Visitor(here=True)
    return Visitor(own, None, tuple(orgs), here=True)
