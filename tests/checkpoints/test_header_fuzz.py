"""No header is accepted that the safetensors library refuses, and none ends in an exception of another kind."""

from __future__ import annotations

import json
import os
import struct
from random import Random

import pytest
from helpers.fuzzing import TOKENS, changed, damaged, draws, pick, rounds, safetensors_bytes
from safetensors import SafetensorError, deserialize

from hf_locstitch.checkpoints.header import Header, TensorSpec, encode_header, parse_header
from hf_locstitch.errors import CheckpointError

METADATA = {"format": "pt", "é": "\u2028"}
WEIGHTS = [
    TensorSpec("model.layers.0.w", "F32", (2, 3), 24),
    TensorSpec("model.layers.1.w", "BF16", (3,), 6),
    TensorSpec("empty", "F16", (0, 4), 0),
    TensorSpec("scalar", "I64", (), 8),
    TensorSpec("mask", "BOOL", (5,), 5),
    TensorSpec("größe", "F8_E4M3", (3,), 3),
]
HEADERS = [
    encode_header(WEIGHTS, METADATA)[8:],
    encode_header(WEIGHTS[:2], {})[8:],
    encode_header([], METADATA)[8:],
    encode_header(WEIGHTS[2:4], {"a": "b"})[8:],
]
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")


def library(content: bytes) -> bool:
    """Whether the safetensors library accepts the file."""
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def ours(content: bytes) -> Header | None:
    try:
        return parse_header(content, len(content), "file")
    except CheckpointError:
        return None


def drawn(rng: Random) -> bytes:
    raw = pick(rng, HEADERS)
    data = bytes(max((end for entry in _entries(raw) for end in entry), default=0))
    if rng.random() < 0.4:
        text = json.dumps(changed(rng, json.loads(raw)), ensure_ascii=rng.random() < 0.5)
        raw = text.encode(pick(rng, ENCODINGS), "surrogatepass")
    else:
        raw = damaged(rng, raw)
    if rng.random() < 0.05:
        data += bytes(rng.randrange(1, 9))
    content = safetensors_bytes(raw, data)
    if rng.random() < 0.05:
        content = (
            struct.pack("<Q", pick(rng, (0, 1, len(raw) - 1, len(raw) + 1, 2**31, 2**63, 2**64 - 1))) + content[8:]
        )
    return content if rng.random() < 0.97 else content[: rng.randrange(len(content))]


def _entries(raw: bytes) -> list[list[int]]:
    return [entry["data_offsets"] for name, entry in json.loads(raw).items() if name != "__metadata__"]


def test_against_the_library() -> None:
    counts = {"inputs": 0, "accepted": 0, "stricter": 0}
    for rng in draws(rounds(4000)):
        content = drawn(rng)
        header, accepted = ours(content), library(content)
        counts["inputs"] += 1
        counts["accepted"] += header is not None
        counts["stricter"] += accepted and header is None
        assert accepted or header is None, content
    if "FUZZ_INPUTS" in os.environ:
        print(f"headers: {counts}")
    assert counts["accepted"] > counts["inputs"] / 50


def header(text: str | bytes, data: int = 0) -> bytes:
    return safetensors_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text, bytes(data))


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "content",
    [
        header('{"w":%s}'.replace("%s", ENTRY).encode("utf-16"), 4),
        header(b"\xef\xbb\xbf" + b'{"w":%b}' % ENTRY.encode(), 4),
        header(f' {{"w":{ENTRY}}}', 4),
        header(f'{{"w":{ENTRY.replace("F32", "F33")}}}', 4),
        header(f'{{"__metadata__":{{"a":1}},"w":{ENTRY}}}', 4),
        header(f'{{"__metadata__":["a"],"w":{ENTRY}}}', 4),
        header(f'{{"__metadata__":"","w":{ENTRY}}}', 4),
        header(f'{{"__metadata__":0,"w":{ENTRY}}}', 4),
        header('{"w":{"dtype":"F32","shape":[1099511627776,1099511627776,0],"data_offsets":[0,0]}}'),
        header(f'{{"\\ud800":{ENTRY}}}', 4),
        header(f'{{"__metadata__":{{"a":"\\udfff"}},"w":{ENTRY}}}', 4),
        header(f'{{"w":{ENTRY},"w":{ENTRY}}}', 4),
        header(f'{{"w":{ENTRY.replace("[1]", "[true]")}}}', 4),
        header('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        header(f'{{"w":{ENTRY.replace("}", ",")}"x":{"[" * 200}{"]" * 200}}}}}', 4),
        header(f'{{"w":{ENTRY.replace("}", ",")}"x":{"[" * 100_000}{"]" * 100_000}}}}}', 4),
        header(f'{{"w":{ENTRY.replace("}", ",")}"x":NaN}}}}', 4),
        header(f'[{{"w":{ENTRY}}}]', 4),
        header("null"),
    ],
)
def test_malformed_headers(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="file"):
        parse_header(content, len(content), "file")


def test_a_header_larger_than_any_models() -> None:
    with pytest.raises(CheckpointError, match="30000000 bytes"):
        parse_header(struct.pack("<Q", 30_000_000), 40_000_000, "file")


def test_every_token_alone() -> None:
    for token in TOKENS:
        content = header(token)
        assert ours(content) is None or library(content)
