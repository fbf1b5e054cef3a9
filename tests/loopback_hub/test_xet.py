"""Xet, spoken by the real client."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from helpers.wire import raw, sha256
from huggingface_hub import HfApi, constants, snapshot_download

from loopback_hub import Fault, LoopbackHub
from loopback_hub.git import Refusal
from loopback_hub.xorb import chunks

RANDOM = os.urandom(300_001)
KINDS = {  # what the client packs in different ways
    "random": RANDOM,
    "words": b"the same words again, " * 20_000,
    "floats": struct.pack("<50000f", *(n % 7 for n in range(50_000))) + b"tail",
    "ones": b"\1" * 500_000,
}
CAS = "/_cas/v1"


@pytest.fixture
def xet_hub(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = True
    return hub


def targets(hub: LoopbackHub) -> list[tuple[str, str]]:
    return [(one.method, one.path.split("?")[0]) for one in hub.requests if one.status in (200, 206)]


def token(hub: LoopbackHub, right: str, repo: str = "demo/base", **headers: str) -> str:
    status, _, answer = raw(hub, "GET", f"/api/models/{repo}/xet-{right}-token/main", **headers)
    assert status == 200
    return f"Bearer {json.loads(answer)['accessToken']}"


@pytest.mark.parametrize("size", [1, 65_536, 65_537, 900_000])
@pytest.mark.parametrize("version", [1, 2])
def test_downloads_come_from_the_storage(
    xet_hub: LoopbackHub, size: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopback_hub.xorb.IN_XORB", 4)
    if version == 1:  # what the client asks for where there is no second one
        xet_hub.fail(Fault("status", "/v2/", status=404, times=9))
    data = os.urandom(size)
    xet_hub.add_repo("demo/base", {"model.safetensors": data, "config.json": "{}"})
    folder = Path(snapshot_download("demo/base", endpoint=xet_hub.endpoint, cache_dir=tmp_path / "cache"))
    assert (folder / "model.safetensors").read_bytes() == data
    asked = targets(xet_hub)
    assert not any("/resolve/" in path and path.endswith(".safetensors") for _, path in asked)
    assert sum("/_lfs/xorb/" in path for _, path in asked) == -(-size // (4 * 65_536))
    assert any(f"/v{version}/reconstructions/" in path for _, path in asked)


def test_uploads_of_all_kinds(xet_hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    for name, data in KINDS.items():
        (tmp_path / "up").mkdir(exist_ok=True)
        (tmp_path / "up" / f"{name}.safetensors").write_bytes(data)
    api.create_repo("demo/up")
    api.upload_folder(repo_id="demo/up", folder_path=tmp_path / "up")
    for name, data in KINDS.items():
        assert xet_hub.read("demo/up", f"{name}.safetensors") == data
    asked = targets(xet_hub)
    assert ("POST", f"{CAS}/shards") in asked and not any(method == "PUT" for method, _ in asked)
    again = Path(snapshot_download("demo/up", endpoint=xet_hub.endpoint, cache_dir=tmp_path / "cache"))
    assert {path.stem: path.read_bytes() for path in again.glob("*.safetensors")} == KINDS


def test_what_the_lists_and_the_files_tell(xet_hub: LoopbackHub, api: HfApi) -> None:
    commit = xet_hub.add_repo("demo/base", {"model.safetensors": RANDOM, "config.json": "{}"})
    hashes = {one.path: getattr(one, "xet_hash", None) for one in api.list_repo_tree("demo/base")}
    assert hashes == {".gitattributes": None, "config.json": None, "model.safetensors": sha256(RANDOM)}
    _, headers, _ = raw(xet_hub, "HEAD", "/demo/base/resolve/main/model.safetensors")
    assert headers["x-xet-hash"] == sha256(RANDOM)
    assert f'/api/models/demo/base/xet-read-token/{commit}>; rel="xet-auth"' in headers["link"]
    assert "x-xet-hash" not in raw(xet_hub, "HEAD", "/demo/base/resolve/main/config.json")[1]
    xet_hub.xet = False
    assert "x-xet-hash" not in raw(xet_hub, "HEAD", "/demo/base/resolve/main/model.safetensors")[1]
    assert raw(xet_hub, "GET", "/api/models/demo/base/xet-read-token/main")[0] == 404


def test_environment_allows_it(hub: LoopbackHub, tmp_path: Path) -> None:
    before = hub.environment(tmp_path)["HF_HUB_DISABLE_XET"]
    hub.xet = True
    assert (before, hub.environment(tmp_path)["HF_HUB_DISABLE_XET"]) == ("1", "0")


def test_tokens_open_one_repo(town: LoopbackHub) -> None:
    town.xet = True
    town.add_repo("demo/base", {"model.safetensors": RANDOM})
    town.add_repo("ann/own", {"model.safetensors": RANDOM + b"1"}, private=True)
    wanted = f"{CAS}/reconstructions/{sha256(RANDOM)}"
    reader = token(town, "read", Authorization="")
    assert raw(town, "GET", wanted, Authorization=reader)[0] == 200
    assert raw(town, "GET", f"{CAS}/reconstructions/{sha256(RANDOM + b'1')}", Authorization=reader)[0] == 400
    assert raw(town, "POST", f"{CAS}/shards", b"", Authorization=reader)[0] == 404
    assert raw(town, "GET", wanted)[0] == 401  # with a token of the Hub
    assert raw(town, "GET", wanted, Authorization=reader[:-1] + "x")[0] == 401
    assert raw(town, "GET", "/api/whoami-v2", Authorization=reader)[0] == 401
    assert raw(town, "GET", "/api/models/demo/base/xet-write-token/main", Authorization="Bearer hf_eve")[0] == 403
    assert raw(town, "GET", "/api/models/ann/own/xet-read-token/main", Authorization="Bearer hf_eve")[0] == 404


def test_a_token_expires(xet_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    xet_hub.add_repo("demo/base", {"model.safetensors": RANDOM})
    monkeypatch.setattr("loopback_hub.xet.LIFETIME", 0)
    old = token(xet_hub, "read")
    assert raw(xet_hub, "GET", f"{CAS}/reconstructions/{sha256(RANDOM)}", Authorization=old)[0] == 401


@pytest.mark.parametrize("path", ["xorbs/default/" + "a" * 64, "shards"])
def test_nonsense_is_refused(xet_hub: LoopbackHub, path: str) -> None:
    xet_hub.add_repo("demo/base", {"model.safetensors": RANDOM})
    writer = token(xet_hub, "write")
    assert raw(xet_hub, "POST", f"{CAS}/{path}", b"\1" * 100, Authorization=writer)[0] == 400
    assert raw(xet_hub, "GET", f"{CAS}/xorbs/default/{'a' * 64}", Authorization=writer)[0] == 404


def test_a_damaged_xorb() -> None:
    whole = b"\0\4\0\0\0\4\0\0data" + b"XETBLOB and what follows"
    frame = b"\x04\x22\x4d\x18\x40\x40\0" + b"\4\0\0\0" + b"\x10a" + b"\2\0" + b"\0\0\0\0"
    copied_from_nowhere = bytes([0, len(frame), 0, 0, 1, 5, 0, 0]) + frame
    assert chunks(whole) == [b"data"]
    of_other_kinds = (b"\1" + whole[1:], whole[:4] + b"\3" + whole[5:], whole[:4] + b"\1" + whole[5:])
    for damaged in (*of_other_kinds, whole[:3], whole[:10], copied_from_nowhere):
        with pytest.raises(Refusal):
            chunks(damaged)
