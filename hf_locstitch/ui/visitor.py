"""Who is at the page, and what a process that works for them may know."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE")


@dataclass(frozen=True)
class Visitor:
    """name: on the Hub, None if not signed in. token: of their session; no part of any text about them.

    here: it is the user of this machine, whose own login and cache count; then there is no token.
    """

    name: str | None = None
    token: str | None = field(default=None, repr=False)
    orgs: tuple[str, ...] = ()
    here: bool = False

    @property
    def client_token(self) -> str | bool | None:
        """For the Hub's client: of a visitor who is not signed in, none is sent, not even the server's."""
        return None if self.here else self.token or False

    @property
    def writable(self) -> tuple[str, ...]:
        """The namespaces to push to."""
        return () if self.name is None else (self.name, *self.orgs)


def worker_environment(environment: Mapping[str, str], visitor: Visitor, work: Path) -> dict[str, str]:
    """The environment of a process that works for a visitor: without the server's secrets, and for a stranger with
    a home of their own instead of the server's cache and login.

    Args:
        environment: That of the server.
        visitor: Their token is not in it: it is handed over through a pipe.
        work: The server's folder, with a home for each visitor.
    """
    kept = {key: value for key, value in environment.items() if not key.startswith("OAUTH_")}
    if visitor.here:
        return kept
    home = work / "homes" / owner_key(visitor)
    return {
        **{key: value for key, value in kept.items() if key not in TOKENS},
        "HF_HOME": str(home),
        "HF_TOKEN_PATH": str(home / "no-token"),
    }


def owner_key(visitor: Visitor) -> str:
    """What stands for a visitor in names of files."""
    return hashlib.sha256((visitor.name or "").encode()).hexdigest()[:16] if visitor.name else "anonymous"
