"""Files on their way out: etags, ranges, redirects."""

from __future__ import annotations

import hashlib
import http.client
import json
from pathlib import Path

import pytest
from helpers.wire import WEIGHTS, raw, safetensors, seed, sha256
from huggingface_hub import (
    HfApi,
    hf_hub_download,
    snapshot_download,
)

from loopback_hub import LoopbackHub


def test_download_and_etags(hub: LoopbackHub, api: HfApi) -> None:
    sha = seed(hub)
    path = Path(hf_hub_download("demo/base", "sub/model.safetensors", endpoint=hub.endpoint, token=False))
    assert path.read_bytes() == WEIGHTS
    assert path.resolve().name == (sha256(WEIGHTS) if path.is_symlink() else path.name)
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
