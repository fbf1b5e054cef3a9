"""Where a result is pushed: a repo, a branch of it, or a pull request."""

from __future__ import annotations

from dataclasses import dataclass

from hf_locstitch.checkpoints.ref import REPO_ID, REVISION

MAIN = "main"


@dataclass(frozen=True)
class PushTarget:
    """repo: org/name. branch: that the commit goes on top of. pull_request: whether it is only proposed there."""

    repo: str
    branch: str = MAIN
    pull_request: bool = False

    def __str__(self) -> str:
        return f"a pull request of {self.ref}" if self.pull_request else self.ref

    @property
    def ref(self) -> str:
        """What names the result there, once a pull request is merged."""
        return self.repo if self.branch == MAIN else f"{self.repo}@{self.branch}"

    @property
    def replaces(self) -> bool:
        """Whether what people get who name the repo alone changes."""
        return self.branch == MAIN and not self.pull_request


def parse_target(text: str, pull_request: bool = False) -> PushTarget:
    """Of org/name or org/name@branch. Raises ValueError if it is neither."""
    repo, at, branch = text.partition("@")
    if "/" not in repo or not REPO_ID.fullmatch(repo) or (at and not REVISION.fullmatch(branch)):
        raise ValueError("must be org/name or org/name@branch")
    if branch.startswith("refs/"):
        raise ValueError("must name a branch after the @; --create-pr opens a pull request")
    return PushTarget(repo, branch or MAIN, pull_request)
