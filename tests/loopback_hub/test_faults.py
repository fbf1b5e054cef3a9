"""Faults on the wire, as they were asked for."""

from __future__ import annotations

import http.client
import time
from pathlib import Path

import pytest
from helpers.wire import WEIGHTS, ndjson, raw, seed, text_file
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
)
from huggingface_hub.errors import HfHubHTTPError

from loopback_hub import Fault, LoopbackHub, RateLimit
from loopback_hub.server import TELLS_UNSENT


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


def test_a_rate_limit(hub: LoopbackHub) -> None:
    seed(hub)
    hub.rate_limit = RateLimit(2, 60)
    path = "/demo/base/resolve/main/config.json"
    answers = [raw(hub, "GET", path) for _ in range(3)]
    assert [answer[0] for answer in answers] == [200, 200, 429]
    assert [answer[1]["ratelimit"] for answer in answers] == [f'"resolvers";r={left};t=60' for left in (1, 0, 0)]
    assert raw(hub, "GET", "/api/models/demo/base")[0] == 200  # of another kind
    hub.rate_limit = RateLimit(2, 60, "Retry-After")
    assert raw(hub, "GET", path)[1]["retry-after"] == "60"
    hub.rate_limit = None
    assert raw(hub, "GET", path)[0] == 200


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


@pytest.mark.skipif(not TELLS_UNSENT, reason="the system does not tell what it has yet to send")
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
