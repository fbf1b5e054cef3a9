"""The Hub on loopback, asked by the real client, or by plain HTTP where the client would never ask."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import struct
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from loopback_hub import LoopbackHub

WEIGHTS = bytes(range(256)) * 40


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
