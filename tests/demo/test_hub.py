"""The loopback Hub, asked by the real client; by plain HTTP where the client would never ask."""

import base64
import hashlib
import http.client
import json
import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from loopback_hub import Fault, LoopbackHub, Refusal

WEIGHTS = bytes(range(256)) * 40
USERS = {"hf_loopback": "demo", "hf_ann": "ann", "hf_eve": "eve"}


@pytest.fixture
def town(tmp_path: Path, hub_cache: Path) -> Iterator[LoopbackHub]:
    """A Hub with three users; ann is in the organisation lab."""
    with LoopbackHub(tmp_path / "town", users=USERS, orgs={"ann": ["lab"]}) as started:
        yield started


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="hf_loopback")


def client(hub: LoopbackHub, token: str | bool) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def seed(hub: LoopbackHub, repo_id: str = "demo/base", **settings: Any) -> str:
    files: dict[str, bytes | str | Path] = {
        "README.md": "---\nlicense: mit\nbase_model: org/root\ntags:\n- merge\n---\n# Base\n",
        "config.json": "{}\n",
        "sub/model.safetensors": WEIGHTS,
    }
    return hub.add_repo(repo_id, files, **settings)


def raw(
    hub: LoopbackHub, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request without the client. Header names: _ stands for -."""
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rsplit(":")[-1]), timeout=10)
    names = {"Authorization": "Bearer hf_loopback", **{k.replace("_", "-"): v for k, v in headers.items()}}
    try:
        connection.request(method, path, body, {k: v for k, v in names.items() if v})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def ndjson(*lines: tuple[str, dict], summary: str = "m", **header: str) -> bytes:
    rows = [("header", {"summary": summary, **header}), *lines]
    return b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in rows)


def text_file(path: str, content: bytes = b"text") -> tuple[str, dict]:
    return "file", {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}


def lfs_file(path: str, oid: str, size: int | None = None) -> tuple[str, dict]:
    return "lfsFile", {"path": path, "algo": "sha256", "oid": oid, **({} if size is None else {"size": size})}


def lfs_batch(hub: LoopbackHub, *objects: dict, repo: str = "demo/base", **wish: Any) -> dict:
    body = json.dumps({"operation": "upload", "transfers": ["basic"], "objects": objects, **wish})
    status, _, answer = raw(hub, "POST", f"/{repo}.git/info/lfs/objects/batch", body)
    assert status == 200
    return json.loads(answer)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def target(url: str) -> str:
    return "/" + url.split("/", 3)[3]


def safetensors(**tensors: list[float]) -> bytes:
    header, payload = {}, b""
    for name, values in tensors.items():
        begin, payload = len(payload), payload + struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [begin, len(payload)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


# Accounts and repositories


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


# Rights


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


# What is in a repository


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


# Download


def test_download_and_etags(hub: LoopbackHub, api: HfApi) -> None:
    sha = seed(hub)
    path = Path(hf_hub_download("demo/base", "sub/model.safetensors", endpoint=hub.endpoint, token=False))
    assert path.read_bytes() == WEIGHTS
    assert path.resolve().name == sha256(WEIGHTS)
    status, headers, body = raw(hub, "HEAD", "/demo/base/resolve/main/sub/model.safetensors")
    assert (status, body, headers["content-length"]) == (200, b"", str(len(WEIGHTS)))
    assert headers["x-repo-commit"] == sha
    assert headers["x-linked-etag"] == headers["etag"] == f'"{sha256(WEIGHTS)}"'
    assert headers["x-linked-size"] == str(len(WEIGHTS))
    _, headers, body = raw(hub, "GET", "/demo/base/resolve/main/config.json")
    assert (body, headers["etag"].strip('"')) == (b"{}\n", hashlib.sha1(b"blob 3\0{}\n").hexdigest())
    assert "x-linked-etag" not in headers


def test_snapshot_download(hub: LoopbackHub, tmp_path: Path) -> None:
    names = ["ä ö.txt", "100%.txt", "a#b?.txt", "deep/er/x.txt", "empty.safetensors"]
    hub.add_repo("demo/odd", {**{name: name for name in names[:-1]}, names[-1]: b""})
    folder = snapshot_download("demo/odd", endpoint=hub.endpoint, local_dir=tmp_path / "out")
    assert {name: (Path(folder) / name).read_bytes() for name in names} == {
        **{name: name.encode() for name in names[:-1]},
        names[-1]: b"",
    }


DIGITS = b"0123456789"


@pytest.mark.parametrize(
    ("asked", "body", "described"),
    [
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=5-", b"56789", "bytes 5-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=8-999", b"89", "bytes 8-9/10"),
        ("bytes=-999", DIGITS, "bytes 0-9/10"),
    ],
)
def test_range(hub: LoopbackHub, asked: str, body: bytes, described: str) -> None:
    hub.add_repo("demo/base", {"d.txt": DIGITS})
    status, headers, answer = raw(hub, "GET", "/demo/base/resolve/main/d.txt", Range=asked)
    assert (status, answer, headers["content-range"]) == (206, body, described)
    assert headers["content-length"] == str(len(body))


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=10-12", "bytes=-0"])
def test_range_out_of_the_file(hub: LoopbackHub, asked: str) -> None:
    hub.add_repo("demo/base", {"d.txt": DIGITS, "empty": b""})
    status, headers, _ = raw(hub, "GET", "/demo/base/resolve/main/d.txt", Range=asked)
    assert (status, headers["content-range"]) == (416, "bytes */10")
    assert raw(hub, "GET", "/demo/base/resolve/main/empty", Range="bytes=0-")[0] == 416


@pytest.mark.parametrize("asked", ["bytes=0-1,3-4", "bytes=4-2", "bytes=-", "lines=1-2", "bytes=a-b"])
def test_ranges_that_http_ignores(hub: LoopbackHub, asked: str) -> None:
    hub.add_repo("demo/base", {"d.txt": DIGITS})
    status, headers, body = raw(hub, "GET", "/demo/base/resolve/main/d.txt", Range=asked)
    assert (status, body) == (200, DIGITS) and "content-range" not in headers


def test_if_range_protects_a_resume(hub: LoopbackHub) -> None:
    hub.add_repo("demo/base", {"d.txt": DIGITS})
    path = "/demo/base/resolve/main/d.txt"
    etag = raw(hub, "HEAD", path)[1]["etag"]
    assert raw(hub, "GET", path, Range="bytes=8-", If_Range=etag)[::2] == (206, b"89")
    assert raw(hub, "GET", path, Range="bytes=8-", If_Range='"other"')[::2] == (200, DIGITS)


def test_lfs_by_redirect_sends_no_token_to_the_other_origin(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    hub.redirect_lfs = True
    assert Path(api.hf_hub_download("demo/base", "sub/model.safetensors")).read_bytes() == WEIGHTS
    *_, head, storage = hub.requests
    assert (head.method, head.status, head.authorization) == ("HEAD", 302, True)
    assert storage.path.startswith("/_lfs/download/")
    assert (storage.status, storage.authorization, storage.sent) == (200, False, len(WEIGHTS))
    assert raw(hub, "GET", storage.path, Range="bytes=1-2")[::2] == (206, WEIGHTS[1:3])
    assert raw(hub, "GET", storage.path[:-1] + "x")[0] == 403


def test_safetensors_metadata(hub: LoopbackHub, api: HfApi) -> None:
    one, two = safetensors(a=[1.0, 2.0]), safetensors(b=[3.0])
    hub.add_repo("demo/single", {"model.safetensors": one})
    single = api.get_safetensors_metadata("demo/single")
    assert (single.sharded, single.parameter_count) == (False, {"F32": 2})
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    hub.add_repo(
        "demo/sharded",
        {"model.safetensors.index.json": json.dumps(index), "1.safetensors": one, "2.safetensors": two},
    )
    sharded = api.get_safetensors_metadata("demo/sharded")
    assert (sharded.sharded, sharded.parameter_count) == (True, {"F32": 3})


def test_a_long_safetensors_header_takes_two_ranges(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("demo/long", {"model.safetensors": safetensors(**{f"t{n:05}": [0.5] for n in range(2000)})})
    hub.requests.clear()
    found = api.parse_safetensors_file_metadata("demo/long", "model.safetensors")
    assert len(found.tensors) == 2000
    assert [(r.range or "")[:9] for r in hub.requests] == ["bytes=0-1", "bytes=8-1"]
    assert [r.status for r in hub.requests] == [206, 206]


def test_a_connection_goes_on_after_a_refusal(hub: LoopbackHub) -> None:
    seed(hub)
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rsplit(":")[-1]), timeout=10)
    connection.connect()
    socket = connection.sock
    for method, path, body, status in (
        ("POST", "/api/models/demo/none/commit/main", b"x" * 300_000, 401),
        ("POST", "/api/models/demo/base/paths-info/main", iter([b"paths=", b"config.json"]), 200),
        ("GET", "/demo/base/resolve/main/config.json", None, 200),
    ):
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.read()
        assert response.status == status
        assert connection.sock is socket
    assert answer == b"{}\n"
    assert [r.received for r in hub.requests] == [300_000, 17, 0]
    connection.close()


# Upload


@pytest.mark.parametrize(
    ("path", "size", "sample", "mode"),
    [
        ("config.json", 100, b"{}", "regular"),
        ("config.json", 10_000_000, b"{}", "regular"),
        ("config.json", 10_000_001, b"{}", "lfs"),
        ("a/model.safetensors", 10, b"text", "lfs"),
        ("pytorch_model.bin", 10, b"text", "lfs"),
        ("plot.png", 10, b"text", "lfs"),
        ("unknown.xyz", 10, b"\x00\x01", "lfs"),
        ("tokenizer.json", 10, "ä".encode(), "regular"),
        ("empty.safetensors", 0, b"", "regular"),
    ],
)
def test_preupload_chooses_lfs(hub: LoopbackHub, path: str, size: int, sample: bytes, mode: str) -> None:
    seed(hub)
    files = [{"path": path, "size": size, "sample": base64.b64encode(sample).decode()}]
    body = json.dumps({"files": files})
    answer = json.loads(raw(hub, "POST", "/api/models/demo/base/preupload/main", body)[2])
    assert [(file["path"], file["uploadMode"], file["shouldIgnore"]) for file in answer["files"]] == [
        (path, mode, False)
    ]


def test_gitattributes_of_the_repo_rule(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo("demo/base", {".gitattributes": "data/*.txt filter=lfs diff=lfs\n*.md text\n# x filter=lfs\n"})
    additions = [CommitOperationAdd(name, b"text") for name in ("data/a.txt", "a.txt", "w.safetensors")]
    api.create_commit("demo/base", additions, commit_message="m")
    files = hub.commits("demo/base")[0].files
    assert {name: bool(files[name].lfs) for name in ("data/a.txt", "a.txt", "w.safetensors")} == {
        "data/a.txt": True,
        "a.txt": False,
        "w.safetensors": False,
    }


def test_create_commit_adds_copies_and_deletes_at_once(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    seed(hub)
    hub.add_repo("demo/base", {"old/a": "a", "old/b": "b", "gone.txt": "x"})
    (tmp_path / "new.safetensors").write_bytes(WEIGHTS[::-1])
    info = api.create_commit(
        "demo/base",
        [
            CommitOperationAdd("new.safetensors", tmp_path / "new.safetensors"),
            CommitOperationAdd("text.txt", b"text"),
            CommitOperationCopy("sub/model.safetensors", "copy.safetensors"),
            CommitOperationCopy("config.json", "copy.json"),
            CommitOperationDelete("old/"),
            CommitOperationDelete("gone.txt"),
        ],
        commit_message="all at once",
        commit_description="really",
    )
    assert info.oid == hub.head("demo/base")
    assert info.commit_url == f"{hub.endpoint}/demo/base/commit/{info.oid}"
    assert hub.files("demo/base").keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "copy.json",
        "copy.safetensors",
        "new.safetensors",
        "sub/model.safetensors",
        "text.txt",
    }
    assert hub.read("demo/base", "new.safetensors") == WEIGHTS[::-1]
    assert hub.read("demo/base", "copy.safetensors") == WEIGHTS
    commit, parent, *_ = hub.commits("demo/base")
    assert (commit.title, commit.message, commit.author) == ("all at once", "really", "demo")
    assert "old/a" in parent.files


def test_what_is_there_already_is_neither_uploaded_nor_committed(hub: LoopbackHub, api: HfApi) -> None:
    head = seed(hub)
    same = [CommitOperationAdd("sub/model.safetensors", WEIGHTS), CommitOperationAdd("config.json", b"{}\n")]
    assert api.create_commit("demo/base", same, commit_message="same").oid == head
    api.create_commit("demo/base", [CommitOperationAdd("b.safetensors", WEIGHTS)], commit_message="again")
    assert hub.read("demo/base", "b.safetensors") == WEIGHTS
    assert not [r for r in hub.requests if r.method == "PUT"]


def test_another_repo_does_not_own_an_object(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    hub.add_repo("demo/other", {})
    body = ndjson(lfs_file("w.safetensors", sha256(WEIGHTS), len(WEIGHTS)))
    assert raw(hub, "POST", "/api/models/demo/other/commit/main", body)[0] == 400
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.safetensors", repo_id="demo/other")
    assert hub.read("demo/other", "w.safetensors") == WEIGHTS
    stored = [path for path in (hub._store.root / "lfs").rglob("*") if path.is_file()]
    assert [path.name for path in stored] == [sha256(WEIGHTS)]


def test_preupload_lfs_files_then_commit(hub: LoopbackHub, api: HfApi) -> None:
    head = seed(hub)
    operations = []
    for number in range(3):
        operation = CommitOperationAdd(f"{number}.safetensors", WEIGHTS + bytes([number]))
        api.preupload_lfs_files("demo/base", [operation])
        operations.append(operation)
    assert hub.head("demo/base") == head
    api.create_commit("demo/base", operations, commit_message="m", parent_commit=head)
    assert hub.read("demo/base", "2.safetensors") == WEIGHTS + b"\x02"
    assert hub.commits("demo/base")[0].parent == head


def test_upload_folder(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("demo/folder", repo_type="dataset")
    for name in ("a/x.bin", "a/y.txt", "README.md"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("---\nlicense: mit\n---\n" + name)
    api.upload_folder(folder_path=tmp_path / "folder", repo_id="demo/folder", repo_type="dataset")
    files = hub.files("demo/folder", repo_type="dataset")
    assert files.keys() == {".gitattributes", "README.md", "a/x.bin", "a/y.txt"}
    assert hub.commits("demo/folder", repo_type="dataset")[0].files["a/x.bin"].lfs is not None


def test_multipart_upload(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    hub.multipart_chunk = 1000
    data = WEIGHTS + b"tail"
    api.upload_file(path_or_fileobj=data, path_in_repo="big.bin", repo_id="demo/base")
    assert hub.read("demo/base", "big.bin") == data
    parts = [r for r in hub.requests if r.path.startswith("/_lfs/part/")]
    assert [r.received for r in parts] == [1000] * 10 + [244]
    assert not list((hub._store.root / "parts").iterdir())
    hub.requests.clear()
    api.upload_file(path_or_fileobj=b"\0small", path_in_repo="small.bin", repo_id="demo/base")
    assert [r.path.split("/")[2] for r in hub.requests if r.method == "PUT"] == ["upload"]


def test_multipart_wants_every_part(hub: LoopbackHub) -> None:
    seed(hub)
    hub.multipart_chunk = 4
    item = {"oid": sha256(b"abcdef"), "size": 6}
    upload = lfs_batch(hub, item, transfers=["basic", "multipart"])["objects"][0]["actions"]["upload"]
    etags = {}
    for number, content in (("1", b"abcd"), ("2", b"ef")):
        etags[number] = raw(hub, "PUT", target(upload["header"][number]), content)[1]["etag"]
    done = {"oid": item["oid"], "parts": [{"partNumber": int(n), "etag": e} for n, e in etags.items()]}
    complete = target(upload["href"])
    assert raw(hub, "POST", complete, json.dumps({**done, "parts": done["parts"][:1]}))[0] == 400
    assert raw(hub, "PUT", target(upload["header"]["2"]), b"gh")[0] == 200
    assert raw(hub, "POST", complete, json.dumps(done))[0] == 400
    assert raw(hub, "PUT", target(upload["header"]["2"]), b"ef")[0] == 200
    assert raw(hub, "POST", complete, json.dumps(done))[0] == 200
    assert raw(hub, "POST", complete, json.dumps(done))[0] == 200


@pytest.mark.parametrize("content", [b"\0right length, other", b"\0short", b"\0content and more bytes"])
def test_lfs_storage_checks_what_arrived(hub: LoopbackHub, content: bytes) -> None:
    seed(hub)
    right = b"\0right length, right"
    oid = sha256(right)
    item = lfs_batch(hub, {"oid": oid, "size": len(right)})["objects"][0]
    href = target(item["actions"]["upload"]["href"])
    verify, body = target(item["actions"]["verify"]["href"]), json.dumps({"oid": oid, "size": len(right)})
    commit = ndjson(lfs_file("w.bin", oid, len(right)))
    assert raw(hub, "PUT", href, content)[0] == 400
    assert raw(hub, "POST", verify, body)[0] == 400
    assert raw(hub, "POST", "/api/models/demo/base/commit/main", commit)[0] == 400
    assert raw(hub, "PUT", href, right, Authorization="")[0] == 200
    assert raw(hub, "POST", verify, body)[0] == 200
    wrong = ndjson(lfs_file("w.bin", oid, len(right) + 1))
    assert raw(hub, "POST", "/api/models/demo/base/commit/main", wrong)[0] == 400
    assert raw(hub, "POST", "/api/models/demo/base/commit/main", commit)[0] == 200
    assert hub.read("demo/base", "w.bin") == right
    assert not list((hub._store.root / "tmp").iterdir())


def test_lfs_storage_checks_the_size_that_was_announced(hub: LoopbackHub) -> None:
    seed(hub)
    data = b"\0content"
    item = lfs_batch(hub, {"oid": sha256(data), "size": len(data) - 1})["objects"][0]
    assert raw(hub, "PUT", target(item["actions"]["upload"]["href"]), data)[0] == 400
    assert "actions" in lfs_batch(hub, {"oid": sha256(data), "size": len(data)})["objects"][0]


def test_lfs_links_are_good_for_one_object_only(hub: LoopbackHub) -> None:
    seed(hub)
    data = b"\0content"
    href = target(lfs_batch(hub, {"oid": sha256(data), "size": 8})["objects"][0]["actions"]["upload"]["href"])
    other = href.replace(sha256(data), sha256(b"\0other"))
    assert raw(hub, "PUT", other, b"\0other")[0] == 403
    assert raw(hub, "PUT", href.split("?")[0], data)[0] == 403
    assert raw(hub, "GET", href)[0] == 405


def test_lfs_batch_refuses_nonsense(hub: LoopbackHub) -> None:
    seed(hub)
    path = "/demo/base.git/info/lfs/objects/batch"
    assert raw(hub, "POST", path, json.dumps({"operation": "download", "objects": []}))[0] == 422
    bad = json.dumps({"operation": "upload", "objects": [{"oid": "../x", "size": 1}]})
    assert raw(hub, "POST", path, bad)[0] == 422
    assert lfs_batch(hub, {"oid": "0" * 64, "size": 0})["objects"][0]["error"]["code"] == 422


def test_a_stale_parent_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    first = seed(hub)
    second = hub.add_repo("demo/base", {"n": "2"})
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit("demo/base", [CommitOperationAdd("n", b"3")], commit_message="m", parent_commit=first)
    assert caught.value.response.status_code == 412
    too_short = ndjson(text_file("n"), parentCommit=second[:6])
    assert raw(hub, "POST", "/api/models/demo/base/commit/main", too_short)[0] == 412
    assert hub.head("demo/base") == second
    api.create_commit("demo/base", [CommitOperationAdd("n", b"3")], commit_message="m", parent_commit=second[:7])
    assert hub.read("demo/base", "n") == b"3"


def test_commit_to_a_branch(hub: LoopbackHub, api: HfApi) -> None:
    head = seed(hub)
    api.create_branch("demo/base", branch="side")
    operation = CommitOperationAdd("side.txt", b"side")
    api.create_commit("demo/base", [operation], commit_message="m", revision="side")
    assert hub.head("demo/base") == head
    assert hub.read("demo/base", "side.txt", "side") == b"side"
    for revision, status in (("none", 404), (head, 400)):
        path = f"/api/models/demo/base/commit/{revision}"
        assert raw(hub, "POST", path, ndjson(text_file("a")))[0] == status


def test_a_stranger_may_open_a_pull_request(town: LoopbackHub) -> None:
    head = seed(town)
    stranger = client(town, "hf_eve")
    operations = [CommitOperationAdd("w.bin", b"\0weights"), CommitOperationAdd("t.txt", b"text")]
    info = stranger.create_commit("demo/base", operations, commit_message="please", create_pr=True)
    assert (info.pr_revision, info.pr_num) == ("refs/pr/1", 1)
    assert town.head("demo/base") == head
    assert town.read("demo/base", "t.txt", "refs/pr/1") == b"text"
    assert Path(stranger.hf_hub_download("demo/base", "w.bin", revision="refs/pr/1")).read_bytes() == b"\0weights"
    pulls = stranger.list_repo_refs("demo/base", include_pull_requests=True).pull_requests or []
    assert [(ref.ref, ref.target_commit) for ref in pulls] == [("refs/pr/1", info.oid)]


@pytest.mark.parametrize(
    "path",
    ["../x", "/x", "a//b", "a/../b", "./a", ".git/config", "a/.GIT/x", "", ".", "a\\b", "a\0b", "a\nb"],
)
def test_paths_that_are_refused(hub: LoopbackHub, path: str) -> None:
    head = seed(hub)
    before = sorted(hub._store.root.rglob("*"))
    body = ndjson(text_file(path))
    assert raw(hub, "POST", "/api/models/demo/base/commit/main", body)[0] == 400
    with pytest.raises(Refusal, match="400"):
        hub.add_repo("demo/base", {path: "x"})
    assert hub.head("demo/base") == head
    assert sorted(hub._store.root.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    [
        "/demo/base/resolve/main/../../../../secret",
        "/demo/base/resolve/main/..%2f..%2f..%2f..%2fsecret",
        "/demo/base/resolve/..%2f..%2f..%2fsecret/config.json",
        "/..%2f..%2fsecret/base/resolve/main/config.json",
        "/../../secret",
        "/api/models/..%2f..%2f/secret",
        "/api/models/demo/base/tree/main/..%2f..",
    ],
)
def test_addresses_do_not_leave_the_repository(hub: LoopbackHub, path: str) -> None:
    seed(hub)
    status, _, body = raw(hub, "GET", path)
    assert status == 404 and hub._store.secret() not in body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not json\n", 400),
        (b"[]\n", 400),
        (ndjson(), 400),
        (ndjson(text_file("a"), summary=""), 400),
        (json.dumps({"key": "file", "value": text_file("a")[1]}).encode(), 400),
        (ndjson(("file", {"path": "a", "content": "%%", "encoding": "base64"})), 400),
        (ndjson(text_file("a.txt", b"\0binary")), 400),
        (ndjson(text_file("a.safetensors", b"text")), 400),
        (ndjson(text_file("a.txt", b"x" * 10_000_001)), 400),
        (ndjson(text_file("config.json/inside")), 400),
        (ndjson(text_file("sub")), 400),
        (ndjson(text_file("a/b"), text_file("a")), 400),
        (ndjson(text_file("README.md", b"---\nbase_model: 3\n---\n")), 400),
        (ndjson(lfs_file("w.bin", "0" * 64, 3)), 400),
        (ndjson(lfs_file("w.bin", "xyz", 3)), 422),
        (ndjson(("renamedFile", {"path": "a"})), 400),
        (ndjson(("deletedFile", {"path": "none"})), 404),
        (ndjson(("deletedFile", {"path": "sub"})), 404),
        (ndjson(("deletedFolder", {"path": "config.json"})), 404),
        (ndjson(text_file("a"), parentCommit="0" * 40), 412),
    ],
)
def test_a_bad_commit_changes_nothing(hub: LoopbackHub, body: bytes, status: int) -> None:
    head = seed(hub)
    good = ndjson(text_file("good"))
    assert raw(hub, "POST", "/api/models/demo/base/commit/main", body)[0] == status
    assert hub.head("demo/base") == head
    assert raw(hub, "POST", "/api/models/demo/base/commit/main", good)[0] == 200


def test_deleting_what_is_not_there_tells_the_client(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("sub", "demo/base")


def test_commits_at_the_same_time(hub: LoopbackHub) -> None:
    head = seed(hub)
    path, statuses = "/api/models/demo/base/commit/main", []

    def send(number: int, **header: str) -> None:
        body = ndjson(text_file(f"file {number}"), **header)
        statuses.append(raw(hub, "POST", path, body)[0])

    def together(**header: str) -> None:
        threads = [threading.Thread(target=send, args=(n,), kwargs=header) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together(parentCommit=head)
    assert sorted(statuses) == [200] + [412] * 7
    together()
    assert len(hub.commits("demo/base")) == 11
    assert {f"file {n}" for n in range(8)} <= hub.files("demo/base").keys()


# Cards


@pytest.mark.parametrize(
    "block",
    [
        "license: mit",
        "base_model: org/name",
        "base_model:\n- org/a\n- org/b\nbase_model_relation: merge",
        "language: en\ntags: [a, b]\ndatasets: org/data\nlibrary_name: x\npipeline_tag: text-generation",
        "date: 2020-01-01\nmodel-index:\n- name: x\n  results: []",
    ],
)
def test_good_cards(hub: LoopbackHub, api: HfApi, block: str) -> None:
    seed(hub)
    card = f"---\n{block}\n---\n# Title\n".encode()
    answer = raw(hub, "POST", "/api/validate-yaml", json.dumps({"content": card.decode(), "repoType": "model"}))
    assert (answer[0], json.loads(answer[2])) == (200, {"errors": [], "warnings": []})
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="demo/base")
    assert api.model_info("demo/base").card_data is not None


@pytest.mark.parametrize(
    ("block", "word"),
    [
        ("base_model: 3", "base_model"),
        ("base_model:\n  a: b", "base_model"),
        ("base_model: [org/a, 3]", "base_model"),
        ("base_model: /home/me/model", "base_model"),
        ("base_model_relation: child", "base_model_relation"),
        ("tags: merge", "tags"),
        ("license: [1]", "license"),
        ("model-index: x", "model-index"),
        ("- a\n- b", "mapping"),
        ("a: b: c", "YAML"),
    ],
)
def test_bad_cards(hub: LoopbackHub, api: HfApi, block: str, word: str) -> None:
    head = seed(hub)
    card = f"---\n{block}\n---\n".encode()
    with pytest.raises(ValueError, match=word):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="demo/base")
    with pytest.raises(Refusal, match=word):
        hub.add_repo("demo/base", {"README.md": card})
    assert hub.head("demo/base") == head


def test_a_card_without_metadata_is_warned_about(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Title\n", path_in_repo="README.md", repo_id="demo/base")
    assert api.model_info("demo/base").card_data is None


def test_dataset_cards_have_their_own_rules(hub: LoopbackHub) -> None:
    for configs, status in (("- config_name: a\n  data_files: a.csv", 200), ("- name: a", 400)):
        body = {"content": f"---\nconfigs:\n{configs}\n---\n", "repoType": "dataset"}
        assert raw(hub, "POST", "/api/validate-yaml", json.dumps(body))[0] == status


# Faults


def test_status_and_how_often(hub: LoopbackHub) -> None:
    seed(hub)
    hub.fail(Fault("status", r"/resolve/", "GET", status=429, retry_after=7, skip=1, times=2))
    path = "/demo/base/resolve/main/config.json"
    answers = [raw(hub, method, path) for method in ("GET", "HEAD", "GET", "GET", "GET")]
    assert [answer[0] for answer in answers] == [200, 200, 429, 429, 200]
    assert answers[2][1]["retry-after"] == "7" and "retry-after" not in answers[4][1]
    assert [r.fault for r in hub.requests] == [None, None, "status", "status", None]
    assert hub.faults == []


def test_status_carries_nothing_out_and_is_seen_by_the_client(hub: LoopbackHub, api: HfApi) -> None:
    head = seed(hub)
    hub.fail(Fault("status", "/commit/", status=500))
    hub.fail(Fault("status", "/api/models/demo/base$", status=503))
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_commit("demo/base", [CommitOperationAdd("a", b"a")], commit_message="m")
    assert hub.head("demo/base") == head
    with pytest.raises(HfHubHTTPError, match="503"):
        api.model_info("demo/base")
    assert api.model_info("demo/base").sha == head


def test_the_client_waits_out_a_429(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    hub.fail(Fault("status", "safetensors", "GET", status=429, retry_after=0))
    assert Path(api.hf_hub_download("demo/base", "sub/model.safetensors")).read_bytes() == WEIGHTS


def test_reset_before_anything(hub: LoopbackHub) -> None:
    head = seed(hub)
    hub.fail(Fault("reset", times=2))
    with pytest.raises(ConnectionResetError):
        raw(hub, "GET", "/demo/base/resolve/main/config.json")
    with pytest.raises(ConnectionResetError):
        raw(hub, "POST", "/api/models/demo/base/commit/main", ndjson(text_file("a")))
    assert hub.head("demo/base") == head
    assert [(r.status, r.sent, r.fault) for r in hub.requests] == [(0, 0, "reset")] * 2


def read_until_error(hub: LoopbackHub, path: str) -> tuple[bytes, Exception | None]:
    """Body bytes that arrive, read one by one, and the error that ends them."""
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rsplit(":")[-1]), timeout=10)
    connection.request("GET", path)
    response, found = connection.getresponse(), bytearray()
    try:
        while piece := response.read1(1000):
            found += piece
    except (ConnectionResetError, http.client.IncompleteRead, TimeoutError) as error:
        return bytes(found), error
    finally:
        connection.close()
    return bytes(found), None


@pytest.mark.parametrize("after", [0, 1, 5000, len(WEIGHTS) - 1])
def test_reset_inside_a_body(hub: LoopbackHub, after: int) -> None:
    seed(hub)
    hub.fail(Fault("reset", after_bytes=after))
    body, error = read_until_error(hub, "/demo/base/resolve/main/sub/model.safetensors")
    assert body == WEIGHTS[:after] and isinstance(error, ConnectionResetError)
    assert [(r.status, r.sent, r.fault) for r in hub.requests] == [(200, after, "reset")]


def test_a_slow_reader_gets_all_that_precedes_a_reset(hub: LoopbackHub) -> None:
    size, after = 24 << 20, 20 << 20
    hub.add_repo("demo/base", {"big.bin": b"\1" * size})
    hub.fail(Fault("reset", after_bytes=after))
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rsplit(":")[-1]), timeout=10)
    connection.request("GET", "/demo/base/resolve/main/big.bin")
    response, got = connection.getresponse(), 0
    with pytest.raises(ConnectionResetError):
        while piece := response.read1(1 << 20):
            got += len(piece)
            time.sleep(0.01)
    connection.close()
    assert got == after


def test_reset_inside_an_upload(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    hub.fail(Fault("reset", "/_lfs/upload/", after_bytes=3000))
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="new.bin", repo_id="demo/base")
    assert hub.read("demo/base", "new.bin") == WEIGHTS[::-1]
    puts = [r for r in hub.requests if r.method == "PUT"]
    assert [(r.received, r.status) for r in puts] == [(3000, 0), (len(WEIGHTS), 200)]
    assert not list((hub._store.root / "tmp").iterdir())


@pytest.mark.parametrize("after", [0, 5000])
def test_cut(hub: LoopbackHub, after: int) -> None:
    seed(hub)
    hub.fail(Fault("cut", after_bytes=after))
    with pytest.raises(http.client.IncompleteRead) as caught:
        raw(hub, "GET", "/demo/base/resolve/main/sub/model.safetensors")
    assert caught.value.partial == WEIGHTS[:after]
    assert [(r.status, r.sent, r.fault) for r in hub.requests] == [(200, after, "cut")]


def test_the_client_resumes_after_a_cut(hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    seed(hub)
    hub.fail(Fault("cut", "safetensors", after_bytes=5000))
    assert Path(api.hf_hub_download("demo/base", "sub/model.safetensors")).read_bytes() == WEIGHTS
    assert [(r.range, r.sent) for r in hub.requests if r.method == "GET"] == [
        (None, 5000),
        ("bytes=5000-", len(WEIGHTS) - 5000),
    ]


def test_faults_wait_for_a_request_that_they_can_harm(hub: LoopbackHub) -> None:
    seed(hub)
    hub.fail(Fault("cut", after_bytes=10))
    path = "/demo/base/resolve/main/"
    assert raw(hub, "HEAD", path + "sub/model.safetensors")[0] == 200
    assert raw(hub, "GET", path + "config.json")[::2] == (200, b"{}\n")
    assert raw(hub, "GET", path + "none")[0] == 404
    assert len(hub.faults) == 1
    with pytest.raises(http.client.IncompleteRead):
        raw(hub, "GET", path + "sub/model.safetensors")
    assert hub.faults == []


def test_stall(hub: LoopbackHub) -> None:
    seed(hub)
    path = "/demo/base/resolve/main/sub/model.safetensors"
    hub.fail(Fault("stall", after_bytes=100, seconds=0.3))
    begin = time.monotonic()
    assert raw(hub, "GET", path)[2] == WEIGHTS
    assert time.monotonic() - begin >= 0.3
    hub.fail(Fault("stall", after_bytes=100, seconds=60))
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rsplit(":")[-1]), timeout=0.3)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.read(100) == WEIGHTS[:100]
    with pytest.raises(TimeoutError):
        response.read(1)
    connection.close()
    begin = time.monotonic()
    hub.stop()
    assert time.monotonic() - begin < 5
    assert [r.fault for r in hub.requests] == ["stall", "stall"]


def test_flip_is_not_noticed_by_the_client(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    hub.fail(Fault("flip", "safetensors", offset=700))
    path = Path(api.hf_hub_download("demo/base", "sub/model.safetensors"))
    expected = bytearray(WEIGHTS)
    expected[700] ^= 0xFF
    assert path.read_bytes() == expected


def test_ignore_range(hub: LoopbackHub) -> None:
    seed(hub)
    hub.fail(Fault("ignore_range"))
    path = "/demo/base/resolve/main/sub/model.safetensors"
    assert raw(hub, "GET", path)[0] == 200
    status, headers, body = raw(hub, "GET", path, Range="bytes=10-19")
    assert (status, body) == (200, WEIGHTS) and "content-range" not in headers
    assert raw(hub, "GET", path, Range="bytes=10-19")[::2] == (206, WEIGHTS[10:20])


def test_a_range_can_be_ignored_and_cut(hub: LoopbackHub) -> None:
    seed(hub)
    hub.fail(Fault("ignore_range"))
    hub.fail(Fault("cut", after_bytes=50))
    with pytest.raises(http.client.IncompleteRead) as caught:
        raw(hub, "GET", "/demo/base/resolve/main/sub/model.safetensors", Range="bytes=10-99")
    assert caught.value.partial == WEIGHTS[:50]


def test_lost_answer_of_a_commit(hub: LoopbackHub, api: HfApi) -> None:
    head = seed(hub)
    hub.fail(Fault("lost_answer", "/commit/"))
    with pytest.raises(Exception, match="reset"):
        api.create_commit("demo/base", [CommitOperationAdd("a", b"a")], commit_message="m", parent_commit=head)
    landed = hub.commits("demo/base")[0]
    assert landed.parent == head and hub.read("demo/base", "a") == b"a"


def test_lost_answer_of_an_upload(hub: LoopbackHub, api: HfApi) -> None:
    seed(hub)
    hub.fail(Fault("lost_answer", "/_lfs/upload/"))
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="new.bin", repo_id="demo/base")
    assert hub.read("demo/base", "new.bin") == WEIGHTS[::-1]
    puts = [r for r in hub.requests if r.method == "PUT"]
    assert [(r.received, r.status, r.fault) for r in puts] == [
        (len(WEIGHTS), 0, "lost_answer"),
        (len(WEIGHTS), 200, None),
    ]


@pytest.mark.parametrize("wrong", [{"kind": "explode"}, {"times": 0}, {"skip": -1}, {"after_bytes": -1}])
def test_faults_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ValueError):
        Fault(**{"kind": "cut", **wrong})


# The hub as a thing


def test_the_log(town: LoopbackHub) -> None:
    seed(town)
    path = "/demo/base/resolve/main/config.json"
    wishes: list[tuple[str, str, bytes | None, dict[str, str]]] = [
        ("GET", path + "?download=true", None, {"Range": "bytes=0-1", "Authorization": "Bearer hf_eve"}),
        ("GET", path, None, {"Authorization": ""}),
        ("GET", path, None, {"Authorization": "Bearer hf_wrong"}),
        ("POST", "/api/validate-yaml", b'{"content": ""}', {}),
    ]
    for count, (method, target, body, headers) in enumerate(wishes, start=1):
        raw(town, method, target, body, **headers)
        assert len(town.requests) == count  # an entry is made when an answer ends, so one after the other
    assert [(r.method, r.path, r.user, r.authorization, r.range, r.status) for r in town.requests] == [
        ("GET", path + "?download=true", "eve", True, "bytes=0-1", 206),
        ("GET", path, None, False, None, 200),
        ("GET", path, None, True, None, 401),
        ("POST", "/api/validate-yaml", "demo", True, None, 200),
    ]
    assert [(r.sent, r.received) for r in town.requests[:2]] == [(2, 0), (3, 0)]
    assert town.requests[3].received == 15


def test_content_survives_a_restart(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as first:
        sha = seed(first, gated="manual", private=True)
        endpoint = first.endpoint
        item = lfs_batch(first, {"oid": sha256(b"\0later"), "size": 6})["objects"][0]
    with pytest.raises(ConnectionRefusedError):
        raw(first, "GET", "/api/whoami-v2")
    with first:
        assert first.endpoint == endpoint
        assert raw(first, "GET", "/api/whoami-v2")[0] == 200
    with LoopbackHub(tmp_path / "hub") as second:
        info = client(second, "hf_loopback").model_info("demo/base")
        assert (info.sha, info.private, info.gated) == (sha, True, "manual")
        assert second.read("demo/base", "sub/model.safetensors") == WEIGHTS
        assert raw(second, "PUT", target(item["actions"]["upload"]["href"]), b"\0later")[0] == 200


def test_stopping_ends_open_connections(hub: LoopbackHub) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rsplit(":")[-1]), timeout=10)
    connection.request("GET", "/api/whoami-v2")
    connection.getresponse().read()
    hub.stop()
    assert connection.sock.recv(1) == b""
    connection.close()


def test_an_endpoint_needs_a_start(tmp_path: Path) -> None:
    hub = LoopbackHub(tmp_path / "hub")
    seed(hub)
    assert hub.files("demo/base")["config.json"] == 3
    with pytest.raises(RuntimeError, match="started"):
        _ = hub.endpoint


def test_local_access_names_what_is_missing(hub: LoopbackHub) -> None:
    sha = seed(hub)
    assert hub.head("demo/base", sha) == sha
    for wrong, match in (
        (lambda: hub.head("demo/none"), "RepoNotFound"),
        (lambda: hub.files("demo/base", "none"), "RevisionNotFound"),
        (lambda: hub.read("demo/base", "none"), "EntryNotFound"),
        (lambda: hub.add_repo("demo", {}), "Invalid repository name"),
    ):
        with pytest.raises(Refusal, match=match):
            wrong()


def test_add_repo_adds_one_commit_each_time(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "t.txt").write_text("text")
    first = hub.add_repo("org/x", {"w.safetensors": tmp_path / "w.safetensors", "t.txt": tmp_path / "t.txt"})
    (tmp_path / "w.safetensors").write_bytes(b"changed afterwards")
    second = hub.add_repo("org/x", {"t.txt": "new", "a.txt": "a"}, message="second", private=True)
    assert list(hub.files("org/x")) == [".gitattributes", "a.txt", "t.txt", "w.safetensors"]
    assert [commit.sha for commit in hub.commits("org/x")[:2]] == [second, first]
    assert len(hub.commits("org/x")) == 3
    assert hub.read("org/x", "w.safetensors") == WEIGHTS
    assert hub.read("org/x", "t.txt", first) == b"text"
    assert client(hub, False).model_info("org/x").private is False


def test_large_files_are_streamed(hub: LoopbackHub, tmp_path: Path) -> None:
    size = 48 << 20
    source = tmp_path / "big.bin"
    with source.open("wb") as stream:
        stream.truncate(size)
    digest = hashlib.sha256()
    for _ in range(48):
        digest.update(bytes(1 << 20))
    hub.add_repo("demo/up", {})
    href = lfs_batch(hub, {"oid": digest.hexdigest(), "size": size}, repo="demo/up")
    put = target(href["objects"][0]["actions"]["upload"]["href"])
    tracemalloc.start()
    try:
        hub.add_repo("demo/local", {"big.bin": source})
        with source.open("rb") as stream:
            connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rsplit(":")[-1]))
            connection.blocksize = 1 << 18
            connection.request("PUT", put, stream, {"Content-Length": str(size)})
            assert connection.getresponse().status == 200
            connection.close()
        connection.request("GET", "/demo/local/resolve/main/big.bin")
        response, got = connection.getresponse(), 0
        while piece := response.read(1 << 18):
            got += len(piece)
        connection.close()
        assert got == size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_environment(hub: LoopbackHub, tmp_path: Path) -> None:
    variables = hub.environment(tmp_path)
    assert variables["HF_ENDPOINT"] == hub.endpoint
    assert (variables["HF_HOME"], variables["HF_TOKEN"]) == (str(tmp_path), "hf_loopback")
    assert variables["HF_HUB_DISABLE_XET"] == variables["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert "127.0.0.1" in variables["NO_PROXY"]
    assert "HF_TOKEN" not in hub.environment(tmp_path, token=None)


LOAD = """
import datasets
easy = datasets.load_dataset("lab/quiz", "easy", split="test")
both = datasets.load_dataset("lab/quiz", "hard")
assert easy.column_names == ["question", "choices"], easy.column_names
assert easy[1]["choices"]["label"] == ["A", "B"], easy[1]
assert {name: len(split) for name, split in both.items()} == {"train": 3, "test": 1}
print(datasets.get_dataset_config_names("lab/quiz"))
"""


def test_load_dataset_with_named_configs(hub: LoopbackHub, tmp_path: Path) -> None:
    card = """---
configs:
- config_name: easy
  data_files:
  - split: test
    path: easy/test.jsonl
- config_name: hard
  data_files:
  - split: train
    path: hard/train-*.jsonl
  - split: test
    path: hard/test.jsonl
---
"""
    row = json.dumps({"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}) + "\n"
    files = {
        "README.md": card,
        "easy/test.jsonl": row * 2,
        "hard/train-0.jsonl": row,
        "hard/train-1.jsonl": row * 2,
        "hard/test.jsonl": row,
    }
    hub.add_repo("lab/quiz", files, repo_type="dataset", private=False)
    result = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**os.environ, **hub.environment(tmp_path / "home", token=None)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "['easy', 'hard']"
    assert all(r.status in (200, 206, 404) for r in hub.requests)


def test_the_log_is_in_the_order_in_which_requests_began(hub: LoopbackHub) -> None:
    """Not in that of their ends: a slow answer comes before what was asked meanwhile."""
    seed(hub)
    hub.fail(Fault("stall", "config.json", "GET", after_bytes=1, seconds=0.5))
    path = "/demo/base/resolve/main/config.json"
    slow = threading.Thread(target=raw, args=(hub, "GET", path))
    slow.start()
    while hub.faults:  # taken by the slow one
        time.sleep(0.001)
    raw(hub, "HEAD", path)
    slow.join()
    assert [request.method for request in hub.requests] == ["GET", "HEAD"]
