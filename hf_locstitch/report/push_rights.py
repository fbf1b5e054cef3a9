"""Whether a result can be pushed where it is asked to go, before any work: name, token, branch. Nothing is created."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_locstitch.checkpoints.hub_client import is_transient, retrying, short
from hf_locstitch.errors import OutputError, PublishError
from hf_locstitch.plan.push_target import PushTarget
from hf_locstitch.runtime.human import some


def check_target(target: PushTarget) -> None:
    """Raises OutputError unless this user may push there. Creates nothing."""
    repo = target.repo
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(
            f"{repo} cannot be the name of a repo on the Hub: {str(error).splitlines()[0]} Use another --push-to."
        ) from error
    try:
        user = retrying(lambda: HfApi().whoami())
    except OfflineModeIsEnabled as error:
        raise OutputError(f"HF_HUB_OFFLINE is set, so {repo} cannot be pushed to. Unset it, or use --out.") from error
    except LocalTokenNotFoundError as error:
        raise OutputError(
            f"pushing to {repo} needs a token with the right to write, and there is none: log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except Exception as error:
        if is_transient(error):
            raise PublishError(f"{constants.ENDPOINT} does not respond ({error}). Try again later.") from error
        raise OutputError(
            f"pushing to {repo} needs a token that {constants.ENDPOINT} accepts ({short(error)}): "
            "log in with `hf auth login` or set HF_TOKEN."
        ) from error
    if refusal := _cannot_write(user) if target.pull_request else why_not(user, repo):
        raise OutputError(f"{user['name']} cannot push to {target}: {refusal}")
    if target.pull_request:
        _check_open(target)


def _check_open(target: PushTarget) -> None:
    """Raises OutputError unless there is what a pull request would be merged into."""
    try:
        retrying(lambda: HfApi().model_info(target.repo, revision=target.branch))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise OutputError(
            f"{target.ref} does not exist or is not accessible with this token, so no pull request can be opened "
            "there. Check the name, or drop --create-pr."
        ) from error


def check_branch(target: PushTarget) -> None:
    """Raises OutputError unless the repo has this branch, which a commit, a tag or a pull request's ref is not."""
    branches = [one.name for one in retrying(lambda: HfApi().list_repo_refs(target.repo)).branches]
    if target.branch not in branches:
        raise OutputError(
            f"{target.branch} is no branch of {target.repo}, so nothing can be committed there. Name one of "
            f"{some(branches)}."
        )


def namespaces(user: Mapping[str, Any]) -> list[str]:
    """Those that a user may write to: their own, and of their organisations. user: as whoami answers."""
    return [user["name"], *(org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") != "read")]


def why_not(user: Mapping[str, Any], repo: str) -> str | None:
    """What keeps a token from writing to a repo, and what to do; None if nothing does. user: as whoami answers."""
    if refusal := _cannot_write(user):
        return refusal
    namespace, token = repo.split("/")[0], _token(user)
    writable = namespaces(user)
    if namespace not in writable:
        return (
            f"the token can write to {', '.join(writable)} only. Choose one of these namespaces, or use another token."
        )
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if scoped is None:
        return None
    allowed = [one["entity"].get("name") for one in scoped if "repo.write" in one.get("permissions", ())]
    return None if {namespace, repo} & {*allowed} else f"the fine-grained token may not write there. {_make_one()}"


def _token(user: Mapping[str, Any]) -> Mapping[str, Any]:
    return user.get("auth", {}).get("accessToken") or {}


def _cannot_write(user: Mapping[str, Any]) -> str | None:
    return f"the token may only read. {_make_one()}" if _token(user).get("role") == "read" else None


def _make_one() -> str:
    return f"Make one that can at {constants.ENDPOINT}/settings/tokens, or use --out."
