"""Pushes that cannot succeed are refused before any work, by the dry run too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from helpers.models import State, finetune, save
from helpers.runs import quick_merge

from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, OutputError
from hf_locstitch.report.push_rights import why_not
from loopback_hub import LoopbackHub


@pytest.fixture
def models(base: State, tmp_path: Path) -> list[str]:
    return [str(tmp_path / "base"), str(save(tmp_path / "ft", finetune(base, 1)))]


def refused(models: list[str], repo: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutputError, match=words):
        quick_merge(models[0], models[1], push_to=repo)
    assert main(["merge", "--base", models[0], "--ft", models[1], "--push-to", repo, "--dry-run"]) == 2
    assert repo in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a--b", "a..b", "a.git", "-a", "x" * 97])
def test_names(home_hub: LoopbackHub, models: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(models, f"demo/{name}", "cannot be the name of a repo", capsys)
    assert not home_hub.requests


def test_a_token_that_may_only_read(
    home_hub: LoopbackHub, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    home_hub.read_tokens = {"hf_loopback"}
    try:
        refused(models, "demo/merged-read-only", "demo cannot push to .*may only read.*settings/tokens", capsys)
    finally:
        home_hub.read_tokens = ()


def test_no_token(
    home_hub: LoopbackHub, models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(models, "demo/merged", "there is none: log in", capsys)


def test_an_invalid_token_is_not_a_missing_repo(
    home_hub: LoopbackHub,
    models: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home_hub.add_repo("demo/there", {file.name: file for file in (tmp_path / "base").iterdir()})
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(parse_ref("demo/not-there"))
    monkeypatch.setenv("HF_TOKEN", "hf_invalid")
    for repo in ("demo/there", "demo/not-there"):
        with pytest.raises(CheckpointError, match=r"rejects the token.*401.*invalid or has expired") as raised:
            open_checkpoint(parse_ref(repo))
        assert "does not exist" not in str(raised.value)
    refused(models, "demo/merged", "401: the token is invalid", capsys)


@pytest.mark.parametrize("case", [str, str.title])
def test_the_repo_of_an_input(
    home_hub: LoopbackHub, models: list[str], case: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    repo = f"demo/{uuid4().hex[:12]}"
    home_hub.add_repo(repo, {file.name: file for file in Path(models[1]).iterdir()})
    refused([models[0], repo], case(repo), "is an input of this merge", capsys)


WRITER = {"type": "user", "name": "ann"}
ORGS = [{"name": "lab", "roleInOrg": "contributor"}, {"name": "club", "roleInOrg": "read"}]


def token(role: str, *scoped: tuple[str, str]) -> dict[str, Any]:
    fine = [{"entity": {"name": name}, "permissions": ["repo.content.read", right]} for name, right in scoped]
    access = {"role": role, **({"fineGrained": {"scoped": fine}} if role == "fineGrained" else {})}
    return {"name": "ann", "orgs": ORGS, "auth": {"accessToken": access}}


@pytest.mark.parametrize(
    ("user", "repo", "words"),
    [
        (token("write"), "ann/x", None),
        (token("write"), "lab/x", None),
        (token("write"), "club/x", "ann, lab only"),
        (token("read"), "ann/x", "may only read"),
        (token("fineGrained", ("ann", "repo.write")), "ann/x", None),
        (token("fineGrained", ("ann/x", "repo.write")), "ann/x", None),
        (token("fineGrained", ("ann/x", "repo.write")), "ann/y", "may not write there"),
        (token("fineGrained", ("ann", "discussion.write")), "ann/x", "may not write there"),
        (WRITER, "ann/x", None),
    ],
)
def test_why_not(user: dict[str, Any], repo: str, words: str | None) -> None:
    got = why_not(user, repo)
    assert (got is None) if words is None else (got is not None and words in got)
