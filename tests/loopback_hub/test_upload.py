"""Files on their way in: what goes to LFS, in how many parts, and that it arrived."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from helpers.wire import WEIGHTS, lfs_batch, lfs_file, ndjson, raw, seed, sha256, target
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
)

from loopback_hub import LoopbackHub


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
