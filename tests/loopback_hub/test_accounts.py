"""Users, organisations and repositories, and who may do what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.wire import client, ndjson, raw, seed, text_file
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from loopback_hub import LoopbackHub


def test_whoami_names_the_user_and_the_organisations(town: LoopbackHub) -> None:
    me = client(town, "hf_ann").whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("ann", ["lab"])


def test_whoami_refuses_an_unknown_or_missing_token(hub: LoopbackHub) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client(hub, "hf_wrong").whoami()
    assert raw(hub, "GET", "/api/whoami-v2", Authorization="")[0] == 401


def test_an_unknown_token_is_refused_even_for_a_public_repo(hub: LoopbackHub) -> None:
    seed(hub)
    with pytest.raises(HfHubHTTPError) as caught:
        client(hub, "hf_wrong").model_info("demo/base")
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_create_repo_makes_the_first_commit(hub: LoopbackHub, api: HfApi) -> None:
    url = api.create_repo("demo/new")
    assert (str(url), url.repo_id, url.repo_type) == (f"{hub.endpoint}/demo/new", "demo/new", "model")
    assert hub.files("demo/new").keys() == {".gitattributes"}
    assert [commit.title for commit in hub.commits("demo/new")] == ["initial commit"]
    assert b"*.safetensors filter=lfs" in hub.read("demo/new", ".gitattributes")
    assert not api.model_info("demo/new").private


def test_create_repo_without_owner_and_as_private_dataset(hub: LoopbackHub, api: HfApi) -> None:
    assert api.create_repo("mine", private=True, repo_type="dataset").repo_id == "demo/mine"
    assert api.dataset_info("demo/mine").private
    assert not api.repo_exists("demo/mine")


def test_create_repo_that_exists_is_a_conflict_with_its_url(hub: LoopbackHub, api: HfApi) -> None:
    head = seed(hub)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("demo/base")
    assert caught.value.response.status_code == 409
    assert api.create_repo("demo/base", exist_ok=True).repo_id == "demo/base"
    assert hub.head("demo/base") == head


@pytest.mark.parametrize(("token", "status"), [("hf_eve", 403), ("hf_ann", 200), (None, 401)])
def test_only_members_create_under_an_organisation(town: LoopbackHub, token: str | None, status: int) -> None:
    body = json.dumps({"name": "x", "organization": "lab"})
    authorization = f"Bearer {token}" if token else ""
    assert raw(town, "POST", "/api/repos/create", body, Authorization=authorization)[0] == status


@pytest.mark.parametrize("name", ["..", "a--b", "x.git", "-a", "a/b", "", "é", "a" * 97, "."])
def test_create_repo_refuses_bad_names(hub: LoopbackHub, name: str) -> None:
    assert raw(hub, "POST", "/api/repos/create", json.dumps({"name": name}))[0] == 400


@pytest.mark.parametrize("wish", [{"type": "tool"}, {"visibility": "hidden"}, {"private": "yes"}])
def test_create_repo_refuses_bad_wishes(hub: LoopbackHub, wish: dict) -> None:
    assert raw(hub, "POST", "/api/repos/create", json.dumps({"name": "x", **wish}))[0] == 400


def test_delete_repo(town: LoopbackHub) -> None:
    seed(town)
    with pytest.raises(HfHubHTTPError, match="403"):
        client(town, "hf_eve").delete_repo("demo/base")
    api = client(town, "hf_loopback")
    api.delete_repo("demo/base")
    assert not api.repo_exists("demo/base")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("demo/base")
    api.delete_repo("demo/base", missing_ok=True)


def test_settings_change_visibility_and_gate(town: LoopbackHub) -> None:
    seed(town)
    api = client(town, "hf_loopback")
    api.update_repo_settings("demo/base", private=True)
    api.update_repo_settings("demo/base", gated="manual")
    info = api.model_info("demo/base")
    assert (info.private, info.gated) == (True, "manual")
    assert raw(town, "PUT", "/api/models/demo/base/settings", '{"gated": "maybe"}')[0] == 400
    with pytest.raises(RepositoryNotFoundError):
        client(town, "hf_eve").update_repo_settings("demo/base", private=False)


def test_private_repos_do_not_exist_for_strangers(town: LoopbackHub) -> None:
    seed(town, "lab/secret", private=True)
    assert client(town, "hf_ann").model_info("lab/secret").private
    for token, status in (("hf_eve", 404), (False, 401)):
        stranger = client(town, token)
        for ask, more in (
            (stranger.model_info, ()),
            (stranger.hf_hub_download, ("config.json",)),
            (stranger.list_repo_refs, ()),
        ):
            with pytest.raises(RepositoryNotFoundError) as caught:
                ask("lab/secret", *more)
            assert caught.value.response.status_code == status


@pytest.mark.parametrize(("token", "status"), [("hf_eve", 403), (False, 401)])
def test_gated_files_are_closed_but_the_model_is_seen(town: LoopbackHub, token: str | bool, status: int) -> None:
    sha = seed(town, "lab/gated", gated=True)
    stranger = client(town, token)
    info = stranger.model_info("lab/gated")
    assert (info.sha, info.gated) == (sha, "auto")
    assert len(list(stranger.list_repo_tree("lab/gated"))) == 4
    for ask in (stranger.hf_hub_download, stranger.file_exists):
        with pytest.raises(GatedRepoError) as caught:
            ask("lab/gated", "config.json")
        assert caught.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        stranger.auth_check("lab/gated")


def test_members_read_gated_files(town: LoopbackHub) -> None:
    seed(town, "lab/gated", gated=True)
    member = client(town, "hf_ann")
    assert Path(member.hf_hub_download("lab/gated", "config.json")).read_text() == "{}\n"
    member.auth_check("lab/gated", write=True)


def test_strangers_cannot_write(town: LoopbackHub) -> None:
    head = seed(town)
    stranger = client(town, "hf_eve")
    for write in (
        lambda: stranger.create_commit("demo/base", [CommitOperationAdd("a", b"a")], commit_message="m"),
        lambda: stranger.create_branch("demo/base", branch="x"),
        lambda: stranger.create_tag("demo/base", tag="x"),
        lambda: stranger.auth_check("demo/base", write=True),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            write()
        assert caught.value.response.status_code == 403
    body = ndjson(text_file("a"))
    commit = "/api/models/demo/base/commit/main"
    assert raw(town, "POST", commit, body, Authorization="Bearer hf_eve")[0] == 403
    assert raw(town, "POST", commit, body, Authorization="")[0] == 401
    batch = json.dumps({"operation": "upload", "objects": [], "ref": {"name": "main"}})
    path = "/demo/base.git/info/lfs/objects/batch"
    assert raw(town, "POST", path, batch, Authorization="Bearer hf_eve")[0] == 403
    assert town.head("demo/base") == head
