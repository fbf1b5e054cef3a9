"""Signing in by OAuth, as an application on the Hub does: a page that asks, a code, a token for the code."""

from __future__ import annotations

import base64
import hashlib
import html
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, urlencode

from loopback_hub.git import Refusal
from loopback_hub.rights import Rights
from loopback_hub.wire import Answer, Call

SECONDS = 8 * 3600  # of a token, as the Hub says of its own


@dataclass(frozen=True)
class Grant:
    """What a code stands for. challenge: of PKCE, by SHA-256."""

    token: str
    client: str
    redirect: str
    scope: str
    challenge: str


class OAuth:
    """The endpoints below /oauth, and the document that names them."""

    def __init__(self, rights: Rights, origin: Callable[[], str]) -> None:
        self._rights, self._origin = rights, origin
        self._grants: dict[str, Grant] = {}

    def configuration(self, call: Call) -> Answer:
        """GET /.well-known/openid-configuration"""
        at = f"{self._origin()}/oauth"
        return Answer(
            {
                "issuer": self._origin(),
                "authorization_endpoint": f"{at}/authorize",
                "token_endpoint": f"{at}/token",
                "userinfo_endpoint": f"{at}/userinfo",
            }
        )

    def authorize(self, call: Call) -> Answer:
        """A page with one link for each user, which goes back to the application with a code."""
        asked = {key: values[0] for key, values in call.query.items()}
        if missing := {"client_id", "redirect_uri", "state", "code_challenge"} - asked.keys():
            raise Refusal(400, f"missing: {', '.join(sorted(missing))}")
        links = []
        for token, user in self._rights.users.items():
            code = secrets.token_urlsafe(16)
            scope = asked.get("scope", "")
            self._grants[code] = Grant(token, asked["client_id"], asked["redirect_uri"], scope, asked["code_challenge"])
            url = f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"
            links.append(f'<p><a href="{html.escape(url)}">Authorize as {html.escape(user)}</a></p>')
        page = f"<!doctype html><title>Authorize</title><h1>Authorize</h1>{''.join(links)}"
        return Answer(page.encode(), headers={"Content-Type": "text/html; charset=utf-8"})

    def token(self, call: Call) -> Answer:
        """The token for a code, once. Raises Refusal 400."""
        form = {key: values[0] for key, values in parse_qs(call.body.read().decode("utf-8", "replace")).items()}
        grant = self._grants.pop(form.get("code", ""), None)
        if grant is None or form.get("redirect_uri") != grant.redirect:
            raise Refusal(400, "invalid_grant")
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != grant.challenge:
            raise Refusal(400, "invalid_grant: the code verifier is another")
        return Answer(
            {"access_token": grant.token, "token_type": "bearer", "expires_in": SECONDS, "scope": grant.scope}
        )

    def userinfo(self, call: Call) -> Answer:
        """Whose token it is."""
        user = self._rights.signed_in(call)
        orgs = [
            {"sub": name, "preferred_username": name, "roleInOrg": "admin"} for name in self._rights.orgs.get(user, ())
        ]
        return Answer({"sub": user, "name": user, "preferred_username": user, "orgs": orgs})
