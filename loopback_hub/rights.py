"""Who may do what on the loopback Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from loopback_hub.git import Refusal, Repo
from loopback_hub.store import Store
from loopback_hub.wire import Call

CAS = "_cas"  # where the storage behind Xet is, which has tokens of its own


class Rights:
    """Users, by token, the organisations they write for, and tokens that may only read."""

    def __init__(self, store: Store, users: Mapping[str, str], orgs: Mapping[str, Sequence[str]]) -> None:
        self.users, self.orgs = users, orgs
        self.read_tokens: Collection[str] = ()
        self._store = store

    def identify(self, target: str, authorization: str | None) -> str | None:
        """The user of an Authorization header; None without one, and where other things are sent in it: at the storage,
        which has tokens of its own, and where an application shows its secret.

        Raises Refusal 401 for an unknown token.
        """
        if authorization is None or target.startswith((f"/{CAS}/", "/oauth/token")):
            return None
        user = self.users.get(_token(authorization))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _member(self, user: str | None, owner: str) -> bool:
        return user is not None and (user == owner or owner in self.orgs.get(user, ()))

    def may_read(self, call: Call, repo: Repo) -> bool:
        """Whether the caller sees the repository at all."""
        return not repo.private or self._member(call.user, repo.owner)

    def readable(self, call: Call, repo_type: str, repo_id: str) -> Repo:
        with suppress(Refusal):
            repo = self._store.get(repo_type, repo_id)
            if self.may_read(call, repo):
                return repo
        if call.user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def only_reads(self, call: Call) -> bool:
        """Whether the call's token may not write, whoever its user is."""
        return _token(call.headers.get("Authorization") or "") in self.read_tokens

    def signed_in(self, call: Call) -> str:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        return call.user

    def writer(self, call: Call, owner: str) -> str:
        user = self.signed_in(call)
        if self.only_reads(call):
            raise Refusal(403, "Forbidden: the token may only read")
        if not self._member(user, owner):
            raise Refusal(403, f"Forbidden: {user} does not have the right to write to {owner}")
        return user

    def open_gate(self, call: Call, repo: Repo) -> None:
        if repo.gated and not self._member(call.user, repo.owner):
            raise Refusal(
                401 if call.user is None else 403,
                f"Access to {repo.type} {repo.id} is restricted. You must be granted access to it.",
                "GatedRepo",
            )


def _token(authorization: str) -> str:
    return authorization.removeprefix("Bearer ")
