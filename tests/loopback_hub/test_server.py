"""The server as a whole: its log, its end, its content on the disk, data sets through `datasets`."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from helpers.wire import WEIGHTS, client, lfs_batch, raw, seed, sha256, target

from loopback_hub import Fault, LoopbackHub, Refusal


def test_the_log(town: LoopbackHub) -> None:
    seed(town)
    path = "/demo/base/resolve/main/config.json"
    wishes: list[tuple[str, str, bytes | None, dict[str, str]]] = [
        ("GET", path + "?download=true", None, {"Range": "bytes=0-1", "Authorization": "Bearer hf_eve"}),
        ("GET", path, None, {"Authorization": ""}),
        ("GET", path, None, {"Authorization": "Bearer hf_wrong"}),
        ("POST", "/api/validate-yaml", b'{"content": ""}', {}),
    ]
    for count, (method, address, body, headers) in enumerate(wishes, start=1):
        raw(town, method, address, body, **headers)
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
