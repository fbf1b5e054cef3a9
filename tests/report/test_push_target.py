"""Pushed to a branch, or proposed as a pull request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.models import finetune, load, random_state, same_bits, save
from helpers.runs import quick_localize, quick_merge
from huggingface_hub import HfApi, snapshot_download

from hf_locstitch import export
from hf_locstitch.checkpoints import hub_client
from hf_locstitch.cli.main import main
from hf_locstitch.errors import OutputError, PublishError, RecipeError
from hf_locstitch.plan.push_target import PushTarget, parse_target
from loopback_hub import Fault, LoopbackHub

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    state = random_state(0)
    return [
        save(tmp_path / name, one)
        for name, one in (("base", state), ("a", finetune(state, 1)), ("b", finetune(state, 2)))
    ]


@pytest.fixture
def repo(home_hub: LoopbackHub, tmp_path: Path, inputs: list[Path]) -> str:
    """One that has a model."""
    name = f"demo/{tmp_path.name}".replace("[", "-").replace("]", "")
    home_hub.add_repo(name, {file.name: file for file in inputs[0].iterdir()})
    return name


def merge(inputs: list[Path], **fields: Any) -> Any:
    return quick_merge(inputs[0], inputs[1:], **fields)


def held(hub: LoopbackHub, repo: str, revision: str, tmp: Path) -> Any:
    del hub
    return load(Path(snapshot_download(repo, revision=revision, local_dir=tmp / revision.replace("/", "-"))))


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("org/name", PushTarget("org/name")),
        ("org/name@main", PushTarget("org/name")),
        ("org/name@v2", PushTarget("org/name", "v2")),
        ("org/name@feature/x", PushTarget("org/name", "feature/x")),
    ],
)
def test_what_a_target_names(text: str, due: PushTarget) -> None:
    assert parse_target(text) == due


@pytest.mark.parametrize("text", ["name", "org/name@", "org/name@../x", "org/name/sub", "org/name@a b", "@x", "org/"])
def test_what_names_no_target(text: str, inputs: list[Path]) -> None:
    with pytest.raises(RecipeError, match=r"push_to: must be org/name or org/name@branch"):
        merge(inputs, push_to=text)


def test_a_pull_request_is_no_branch(inputs: list[Path]) -> None:
    with pytest.raises(RecipeError, match="--create-pr opens a pull request"):
        merge(inputs, push_to="org/name@refs/pr/1")


@pytest.mark.parametrize("fields", [{"create_pr": True}, {"create_pr": True, "push_to": "demo/x", "private": True}])
def test_pull_requests_that_cannot_be(inputs: list[Path], fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"it needs push_to|drop one"):
        merge(inputs, out=tmp_path / "out", **fields)


@pytest.mark.parametrize("new", [True, False])
def test_a_branch(new: bool, repo: str, inputs: list[Path], home_hub: LoopbackHub, tmp_path: Path) -> None:
    if not new:
        HfApi().create_branch(repo, branch="feature/merge")
    main_head = home_hub.head(repo)
    result = merge(inputs, out=tmp_path / "out", push_to=f"{repo}@feature/merge")
    assert home_hub.head(repo) == main_head
    assert result.commit == home_hub.head(repo, "feature/merge")
    assert result.url == f"{home_hub.endpoint}/{repo}/tree/feature/merge"
    assert same_bits(held(home_hub, repo, "feature/merge", tmp_path), load(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'load_mask("{repo}@feature/merge"' in card
    again = merge(inputs, push_to=f"{repo}@feature/merge")
    assert again.commit == result.commit, "nothing was left to do"


def test_a_branch_of_a_new_repo(inputs: list[Path], home_hub: LoopbackHub, tmp_path: Path) -> None:
    name = f"demo/{tmp_path.name}-new"
    result = merge(inputs, push_to=f"{name}@try", private=True)
    assert WEIGHTS in home_hub.files(name, "try") and WEIGHTS not in home_hub.files(name)
    assert result.commit == home_hub.head(name, "try")


def test_a_pull_request(repo: str, inputs: list[Path], home_hub: LoopbackHub, tmp_path: Path) -> None:
    main_head = home_hub.head(repo)
    result = merge(inputs, out=tmp_path / "out", push_to=repo, create_pr=True)
    assert home_hub.head(repo) == main_head
    assert result.url == f"{home_hub.endpoint}/{repo}/discussions/1"
    assert result.commit == home_hub.head(repo, "refs/pr/1")
    assert same_bits(held(home_hub, repo, "refs/pr/1", tmp_path), load(tmp_path / "out"))
    again = merge(inputs, push_to=repo, create_pr=True)
    assert (again.url, again.commit) == (result.url, result.commit), "no second one is opened"


@pytest.mark.parametrize("kind", ["lost_answer", "status", "reset"])
def test_a_fault_opens_one_pull_request(kind: str, repo: str, inputs: list[Path], home_hub: LoopbackHub) -> None:
    home_hub.fail(Fault(kind, method="POST", path=f"{repo}/commit/"))  # type: ignore[arg-type]
    result = merge(inputs, push_to=repo, create_pr=True)
    pulls = HfApi().list_repo_refs(repo, include_pull_requests=True).pull_requests or []
    assert [pull.ref for pull in pulls] == ["refs/pr/1"] and result.commit == pulls[0].target_commit


def test_in_a_repo_of_others(inputs: list[Path], home_hub: LoopbackHub, tmp_path: Path) -> None:
    """Who may not push there may propose."""
    name = f"strangers/{tmp_path.name}"
    home_hub.add_repo(name, {file.name: file for file in inputs[0].iterdir()})
    with pytest.raises(OutputError, match="the token can write to"):
        merge(inputs, push_to=name)
    assert merge(inputs, push_to=name, create_pr=True).url == f"{home_hub.endpoint}/{name}/discussions/1"


def test_a_repo_that_is_not_there(inputs: list[Path], home_hub: LoopbackHub) -> None:
    del home_hub
    for target in ("demo/nothing-here", "demo/nothing-here@branch"):
        with pytest.raises(OutputError, match=r"no pull request can be opened there"):
            merge(inputs, push_to=target, create_pr=True)


def test_beside_an_input(repo: str, inputs: list[Path], home_hub: LoopbackHub) -> None:
    """The base's own repo takes a branch and a pull request, and nothing on its main branch."""
    with pytest.raises(OutputError, match=rf"is an input of this merge.*a branch \(--push-to {repo}@BRANCH\)"):
        quick_merge(repo, inputs[1:], push_to=repo)
    before = home_hub.head(repo)
    quick_merge(repo, inputs[1:], push_to=f"{repo}@merged")
    quick_merge(repo, inputs[1:], push_to=repo, create_pr=True)
    assert home_hub.head(repo) == before


def test_a_failed_upload_says_how_to_do_it_by_hand(
    repo: str, inputs: list[Path], home_hub: LoopbackHub, tmp_path: Path
) -> None:
    home_hub.fail(Fault("status", status=403, method="POST", path=f"{repo}/commit/"))
    out = tmp_path / "out"
    with pytest.raises(PublishError, match=rf"hf upload {repo} {out} --revision v2"):
        merge(inputs, out=out, push_to=f"{repo}@v2")


def test_localized_exported_and_on_the_command_line(
    repo: str, inputs: list[Path], home_hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_localize(inputs[0], inputs[1], push_to=f"{repo}@skills")
    assert "values/a.safetensors" in home_hub.files(repo, "skills")
    command = [
        "merge",
        "--base",
        str(inputs[0]),
        "--ft",
        str(inputs[1]),
        "--push-to",
        repo,
        "--create-pr",
        "--no-figures",
    ]
    assert main(command) == 0
    assert f"published  {home_hub.endpoint}/{repo}/discussions/1 at" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="create_pr opens a pull request"):
        export(tmp_path, out=tmp_path / "x", create_pr=True)
