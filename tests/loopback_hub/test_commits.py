"""Commits that are refused, and those that meet."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from helpers.wire import client, lfs_file, ndjson, raw, seed, text_file
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
)

from loopback_hub import LoopbackHub, Refusal


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
