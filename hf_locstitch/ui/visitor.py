"""Who is at the page, and what a process that works for them may know."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY|^OAUTH_", re.IGNORECASE)  # by its name
PASSING = "passing-"  # begins the name of a home for one look
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HUGGINGFACE_HUB_CACHE")


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
    if visitor.here:
        return dict(environment)
    home = home_of(owner_key(visitor), work)
    kept = {key: value for key, value in environment.items() if not SECRET.search(key) and key not in CACHES}
    return {
        **kept,
        "HF_HOME": str(home),
        "HF_TOKEN_PATH": str(home / "no-token"),
    }


def home_of(owner: str, work: Path) -> Path:
    """What stands for HF_HOME for a stranger. owner: as `owner_key` has it."""
    return work / "homes" / owner


def owner_key(visitor: Visitor) -> str:
    """What stands for a visitor in names of files."""
    return hashlib.sha256((visitor.name or "").encode()).hexdigest()[:16] if visitor.name else "anonymous"
