"""What is in a repository: files, folders, commits, branches and tags."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from helpers.wire import WEIGHTS, raw, seed, sha256
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from loopback_hub import LoopbackHub


def test_model_info(hub: LoopbackHub, api: HfApi) -> None:
    sha = seed(hub)
    info = api.model_info("demo/base", files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == (
        "demo/base",
        "demo",
        sha,
        False,
        False,
    )
    assert info.card_data is not None and info.card_data.license == "mit"
    assert info.tags == ["merge", "license:mit", "base_model:org/root"]
    assert info.created_at is not None and info.last_modified is not None
    assert info.created_at <= info.last_modified
    siblings = {item.rfilename: item for item in info.siblings or []}
    assert list(siblings) == [".gitattributes", "README.md", "config.json", "sub/model.safetensors"]
    assert siblings["config.json"].blob_id == hashlib.sha1(b"blob 3\0{}\n").hexdigest()
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(WEIGHTS)}\nsize {len(WEIGHTS)}\n"
    ).encode()
    weights = siblings["sub/model.safetensors"]
    assert (weights.size, weights.lfs) == (
        len(WEIGHTS),
        {"size": len(WEIGHTS), "sha256": sha256(WEIGHTS), "pointer_size": len(pointer)},
    )
    assert weights.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()


def test_model_info_without_blobs_at_a_revision_and_expanded(hub: LoopbackHub, api: HfApi) -> None:
    first = seed(hub)
    second = hub.add_repo("demo/base", {"more.txt": "more"})
    old = api.model_info("demo/base", revision=first)
    assert old.sha == first and "more.txt" not in {item.rfilename for item in old.siblings or []}
    assert {item.size for item in old.siblings or []} == {None}
    small = api.model_info("demo/base", expand=["sha", "gated"])
    assert (small.sha, small.gated, small.siblings, small.tags) == (second, False, None, None)


def test_models_and_datasets_are_apart(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("demo/base", {"data.csv": "a,b\n"}, repo_type="dataset")
    assert api.dataset_info("demo/base").sha == hub.head("demo/base", repo_type="dataset")
    assert not api.repo_exists("demo/base")
    path = api.hf_hub_download("demo/base", "data.csv", repo_type="dataset")
    assert Path(path).read_text() == "a,b\n"


def test_missing_things_have_the_codes_the_client_maps(hub: LoopbackHub, api: HfApi) -> None:
    sha = seed(hub)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("demo/none")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("gpt2")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("demo/base", revision="none")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("demo/base", "config.json", revision=sha[:12])
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        api.hf_hub_download("demo/base", "none.json")
    assert caught.value.response.headers["X-Repo-Commit"] == sha
    assert raw(hub, "GET", "/api/models/demo/base/xet-write-token/main")[0] == 404
    assert raw(hub, "POST", "/api/models/demo/base/nonsense", b"{}")[0] == 404


def test_tree(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    top = list(api.list_repo_tree("demo/base"))
    assert [(type(item), item.path) for item in top] == [
        (RepoFile, ".gitattributes"),
        (RepoFile, "README.md"),
        (RepoFile, "config.json"),
        (RepoFolder, "sub"),
    ]
    whole = {item.path: item for item in api.list_repo_tree("demo/base", recursive=True)}
    assert whole.keys() == {item.path for item in top} | {"sub/model.safetensors"}
    inner = list(api.list_repo_tree("demo/base", "sub"))
    assert [item.path for item in inner] == ["sub/model.safetensors"]
    assert isinstance(inner[0], RepoFile) and inner[0].lfs is not None
    assert inner[0].lfs.sha256 == sha256(WEIGHTS)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("demo/base", "none"))


def test_folder_ids_are_those_of_git(hub: LoopbackHub, api: HfApi) -> None:
    """Ids printed by `git ls-tree -t` for the same files; `a` sorts as `a/`, between a.txt and a0."""
    hub.add_repo("demo/base", {"d/a.txt": "1", "d/a/b": "2", "d/a0": "3"})
    folders = {i.path: i.tree_id for i in api.list_repo_tree("demo/base", recursive=True) if isinstance(i, RepoFolder)}
    assert folders == {
        "d": "200eeb5ae704e4419820f8a507989bbd5a1683ce",
        "d/a": "a0d604345bf95a3c18518460dcbf110eed7e24c5",
    }


def test_tree_in_pages(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("demo/base", {f"f{n:02}/x y.txt": str(n) for n in range(5)})
    whole = [item.path for item in api.list_repo_tree("demo/base", recursive=True)]
    hub.page_size = 3
    hub.requests.clear()
    assert [item.path for item in api.list_repo_tree("demo/base", recursive=True)] == whole
    assert len(hub.requests) == 4 and len(whole) == 11


def test_tree_expanded_tells_the_last_commit(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("demo/base", {"a/one": "1", "b/two": "2"}, message="both")
    hub.add_repo("demo/base", {"a/one": "changed", "b/two": "2"}, message="one")
    titles = {
        item.path: item.last_commit.title
        for item in api.list_repo_tree("demo/base", recursive=True, expand=True)
        if item.last_commit
    }
    assert titles == {
        ".gitattributes": "initial commit",
        "a": "one",
        "a/one": "one",
        "b": "both",
        "b/two": "both",
    }


def test_paths_info(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    found = api.get_paths_info("demo/base", ["sub", "none", "config.json"], expand=True)
    assert [(type(item), item.path) for item in found] == [(RepoFolder, "sub"), (RepoFile, "config.json")]
    assert found[0].last_commit is not None and found[0].last_commit.title == "Add files"
    body = json.dumps({"paths": ["config.json"]})
    headers = {"Content_Type": "application/json"}
    answer = raw(hub, "POST", "/api/models/demo/base/paths-info/main", body, **headers)[2]
    assert [item["path"] for item in json.loads(answer)] == ["config.json"]


def test_commits_newest_first_and_in_pages(hub: LoopbackHub, api: HfApi) -> None:
    shas = [hub.add_repo("demo/base", {"n": str(n)}, message=f"commit {n}") for n in range(4)]
    hub.page_size = 2
    listed = api.list_repo_commits("demo/base")
    assert [commit.commit_id for commit in listed[:4]] == shas[::-1]
    assert [commit.title for commit in listed[-2:]] == ["commit 0", "initial commit"]
    assert listed[0].authors == ["demo"]
    assert [commit.sha for commit in hub.commits("demo/base")] == [commit.commit_id for commit in listed]
    assert len(api.list_repo_commits("demo/base", revision=shas[0])) == 2


def test_branches_and_tags(hub: LoopbackHub, api: HfApi) -> None:
    first = seed(hub)
    api.create_tag("demo/base", tag="v1")
    second = hub.add_repo("demo/base", {"config.json": "[]"})
    api.create_branch("demo/base", branch="side/way")
    api.create_branch("demo/base", branch="old", revision=first)
    refs = api.list_repo_refs("demo/base", include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": second,
        "side/way": second,
        "old": first,
    }
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first)]
    assert refs.pull_requests == []
    for revision, content in (("v1", "{}\n"), ("old", "{}\n"), ("side/way", "[]"), (first, "{}\n")):
        path = api.hf_hub_download("demo/base", "config.json", revision=revision)
        assert Path(path).read_text() == content
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("demo/base", branch="old")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("demo/base", tag="v1")
    api.create_branch("demo/base", branch="old", exist_ok=True)
    api.create_tag("demo/base", tag="v1", exist_ok=True)
    api.delete_branch("demo/base", branch="side/way")
    api.delete_tag("demo/base", tag="v1")
    assert not api.revision_exists("demo/base", "side/way") and not api.revision_exists("demo/base", "v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("demo/base", tag="v1")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch("demo/base", branch="main")


@pytest.mark.parametrize("name", ["a..b", "a b", "/a", "a/", "a.lock", ".a", "a//b", "a~1", "a@{b", "", "0" * 40])
def test_references_git_would_refuse(hub: LoopbackHub, name: str) -> None:
    seed(hub)
    assert raw(hub, "POST", "/api/models/demo/base/tag/main", json.dumps({"tag": name}))[0] == 400
