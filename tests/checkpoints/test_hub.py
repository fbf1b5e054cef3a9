"""Fetching from the Hub with the real client against the loopback Hub, under faults."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.models import finetune, load, random_state, same_bits, save
from helpers.runs import carry_out, quick_merge
from helpers.streaming import restart
from helpers.systems import needs_signals
from huggingface_hub import constants, hf_hub_download

from hf_locstitch.checkpoints import hub_client
from hf_locstitch.checkpoints.download import CachingDownload
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import Ref, parse_ref
from hf_locstitch.errors import CheckpointError, DownloadError, IntegrityError
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.chunks import for_each
from loopback_hub import Fault, Link, LoopbackHub

FILE = "model.safetensors"
SIZE = 3_000_000


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)


@pytest.fixture
def repo(home_hub: LoopbackHub) -> str:
    """A repo with one LFS file of random bytes and a small regular one."""
    name = f"demo/{uuid4().hex}"
    home_hub.add_repo(name, {FILE: os.urandom(SIZE), "config.json": '{"model_type": "toy"}'})
    home_hub.requests.clear()
    return name


def served(hub: LoopbackHub, repo: str) -> int:
    """Bytes of the LFS file that went over the wire."""
    gets = [r for r in hub.requests if r.method == "GET" and f"{repo}/resolve" in r.path and FILE in r.path]
    return sum(r.sent for r in gets if r.status in (0, 200, 206))


def test_a_second_fetch_reads_the_cache(home_hub: LoopbackHub, repo: str) -> None:
    heard: list[int] = []
    path = HubSource(repo, None).fetch(FILE, heard.append)
    assert path.read_bytes() == home_hub.read(repo, FILE)
    assert served(home_hub, repo) == sum(heard) == SIZE
    again: list[int] = []
    source = HubSource(repo, None)
    assert source.fetch(FILE, again.append) == path and sum(again) == SIZE
    assert served(home_hub, repo) == SIZE
    assert source.sha256(FILE) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_commit_is_pinned(home_hub: LoopbackHub, repo: str) -> None:
    before = home_hub.read(repo, "config.json")
    source = HubSource(repo, "main")
    home_hub.add_repo(repo, {"config.json": '{"model_type": "moved"}'})
    assert source.fetch("config.json").read_bytes() == before
    assert source.commit != home_hub.head(repo)
    assert HubSource(repo, source.commit).commit == source.commit


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", after_bytes=634_567, times=2),
        Fault("cut", after_bytes=500_001, times=2),
        Fault("reset", times=2),
        Fault("status", status=500, times=2),
        Fault("status", status=503, times=2),
        Fault("status", status=429, retry_after=1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.after_bytes}",
)
def test_a_passing_fault_costs_no_byte_twice(home_hub: LoopbackHub, repo: str, fault: Fault) -> None:
    from dataclasses import replace

    home_hub.fail(replace(fault, method="GET", path=f"{repo}/resolve/.*{FILE}"))
    heard: list[int] = []
    path = HubSource(repo, None).fetch(FILE, heard.append)
    assert path.read_bytes() == home_hub.read(repo, FILE)
    assert not home_hub.faults
    assert sum(heard) == SIZE
    # What a reset throws away unread in the client's buffers is served again; no more than that.
    assert served(home_hub, repo) <= SIZE + (2_500_000 if fault.kind == "reset" else 0)
    if fault.kind == "cut":
        assert served(home_hub, repo) == SIZE


def test_a_stalled_connection(home_hub: LoopbackHub, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    home_hub.fail(Fault("stall", method="GET", path=f"{repo}/resolve/.*{FILE}", after_bytes=300_000, seconds=5))
    assert HubSource(repo, None).fetch(FILE).read_bytes() == home_hub.read(repo, FILE)
    restart(home_hub)


def test_an_ignored_range(home_hub: LoopbackHub, repo: str) -> None:
    home_hub.fail(Fault("cut", method="GET", path=f"{repo}/resolve/.*{FILE}", after_bytes=300_000))
    home_hub.fail(Fault("ignore_range", path=f"{repo}/resolve/.*{FILE}"))
    heard: list[int] = []
    assert HubSource(repo, None).fetch(FILE, heard.append).read_bytes() == home_hub.read(repo, FILE)
    assert sum(heard) == SIZE and not home_hub.faults


@pytest.fixture
def elsewhere(home_hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """A Hub that sends on to storage, whose requests it does not count."""
    home_hub.redirect_lfs = True
    yield home_hub
    home_hub.redirect_lfs = False


def test_the_hub_is_asked_once_for_the_pieces_of_a_file(elsewhere: LoopbackHub, repo: str) -> None:
    assert HubSource(repo, None).fetch(FILE).read_bytes() == elsewhere.read(repo, FILE)
    weights = [request for request in elsewhere.requests if request.method == "GET" and request.status in (206, 302)]
    asked = [request for request in weights if request.status == 302]
    sent = [request for request in weights if request.status == 206]
    assert len(sent) == 3 and sum(request.sent for request in sent) == SIZE
    assert 1 <= len(asked) <= 3 and all(request.authorization for request in asked)
    assert not any(request.authorization for request in sent)  # the token is not the storage's


def test_the_hub_is_not_asked_again_after_the_header(elsewhere: LoopbackHub, repo: str) -> None:
    source = HubSource(repo, None)
    source.read_start(FILE, 1000)
    elsewhere.requests.clear()
    assert len(b"".join(source.stream(FILE))) == SIZE
    assert not [request for request in elsewhere.requests if "/resolve/" in request.path]


def test_a_link_that_expires_is_asked_for_again(elsewhere: LoopbackHub, repo: str) -> None:
    source = HubSource(repo, None)
    source.read_start(FILE, 1000)
    elsewhere.requests.clear()
    elsewhere.fail(Fault("status", status=403, path="download", method="GET"))
    assert b"".join(source.stream(FILE)) == elsewhere.read(repo, FILE)
    assert not elsewhere.faults
    assert [request for request in elsewhere.requests if "/resolve/" in request.path and request.status == 302]


def test_a_link_that_has_expired_when_it_is_first_used(elsewhere: LoopbackHub, repo: str) -> None:
    elsewhere.fail(Fault("status", status=403, path="download", method="GET"))
    assert HubSource(repo, None).read_start(FILE, 1000) == elsewhere.read(repo, FILE)[:1000]
    assert not elsewhere.faults
    elsewhere.fail(Fault("status", status=403, path="download", method="GET"))
    assert HubSource(repo, None).fetch(FILE).read_bytes() == elsewhere.read(repo, FILE)
    assert not elsewhere.faults


def test_storage_that_always_refuses(elsewhere: LoopbackHub, repo: str) -> None:
    elsewhere.fail(Fault("status", status=403, path="download", method="GET", times=99))
    with pytest.raises(DownloadError, match=rf"the link to {FILE} has expired \(status 403\)"):
        HubSource(repo, None).read_start(FILE, 1000)
    elsewhere._faults._waiting.clear()


@needs_signals
def test_an_interruption_is_not_kept_waiting_by_a_server(home_hub: LoopbackHub, repo: str) -> None:
    home_hub.fail(Fault("stall", method="GET", path=f"{repo}/resolve/.*{FILE}", after_bytes=10, seconds=60, times=99))
    download = CachingDownload(HubSource(repo, None), [FILE], lambda _: None, lambda _: None)
    download.start()
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for_each(lambda start: download.read(FILE, start, start + 1000), [0, 1000], workers=2)
    finally:
        download.close()
        interrupt.join()
    assert not download._thread.is_alive()
    home_hub._faults._waiting.clear()
    restart(home_hub)


def test_a_flipped_byte_is_fetched_again(home_hub: LoopbackHub, repo: str) -> None:
    home_hub.fail(Fault("flip", method="GET", path=f"{repo}/resolve/.*{FILE}", offset=700_000))
    heard: list[int] = []
    assert HubSource(repo, None).fetch(FILE, heard.append).read_bytes() == home_hub.read(repo, FILE)
    assert sum(heard) == SIZE and served(home_hub, repo) == 2 * SIZE


def test_a_server_that_keeps_flipping_is_refused(home_hub: LoopbackHub, repo: str) -> None:
    home_hub.fail(
        Fault("flip", method="GET", path=f"{repo}/resolve/.*{FILE}", offset=700_000, times=6)
    )  # in each of three pieces, twice
    source = HubSource(repo, None)
    with pytest.raises(IntegrityError, match=f"{FILE}.*sha256 [0-9a-f]{{64}}.*sha256 [0-9a-f]{{64}}"):
        source.fetch(FILE)
    assert source.cached(FILE) is None


def test_a_flipped_byte_of_a_small_file(home_hub: LoopbackHub, repo: str) -> None:
    home_hub.fail(Fault("flip", method="GET", path=f"{repo}/resolve/.*config.json", offset=3, times=3))
    source = HubSource(repo, None)
    with pytest.raises(IntegrityError, match=r"config\.json.*git blob [0-9a-f]{40}, not with git blob [0-9a-f]{40}"):
        source.fetch("config.json")
    assert source.cached("config.json") is None
    assert source.fetch("config.json").read_bytes() == home_hub.read(repo, "config.json")


def test_a_small_file_is_asked_for_once(home_hub: LoopbackHub, repo: str) -> None:
    path = HubSource(repo, None).fetch("config.json")
    assert [request.method for request in home_hub.requests if "config.json" in request.path] == ["GET"]
    assert path == Path(hf_hub_download(repo, "config.json"))  # the Hub's client finds it in its cache
    assert [request.method for request in home_hub.requests if "config.json" in request.path] == ["GET", "HEAD"]


def test_what_is_expected_comes_before_it_is_asked_for(home_hub: LoopbackHub, repo: str) -> None:
    home_hub.add_repo(repo, {f"{number}.json": str(number) for number in range(3)})
    source = HubSource(repo, None)
    source.expect(["0.json", "1.json", "absent.json"])
    source.expect(["0.json"])
    until = time.monotonic() + 10
    while not all(map(source.cached, ("0.json", "1.json"))) and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(request.path[-6:] for request in home_hub.requests if "/resolve/" in request.path) == [
        "0.json",
        "1.json",
    ]
    heard: list[int] = []
    assert [source.fetch(f"{number}.json", heard.append).read_text() for number in range(3)] == ["0", "1", "2"]
    assert sum(heard) == 3
    assert len([request for request in home_hub.requests if "/resolve/" in request.path]) == 3


def test_what_goes_wrong_with_an_expected_file_is_told_to_who_asks(home_hub: LoopbackHub, repo: str) -> None:
    home_hub.fail(Fault("status", method="GET", path=f"{repo}/resolve/.*config.json", status=403))
    source = HubSource(repo, None)
    source.expect(["config.json"])
    with pytest.raises(CheckpointError, match="not accessible with this token"):
        source.fetch("config.json")
    assert source.fetch("config.json").exists()


def test_a_damaged_cache_is_repaired(home_hub: LoopbackHub, repo: str) -> None:
    path = HubSource(repo, None).fetch(FILE)
    with path.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    assert HubSource(repo, None).fetch(FILE).read_bytes() == home_hub.read(repo, FILE)


def test_a_copy_of_a_blob_that_was_cut_is_made_anew(
    home_hub: LoopbackHub, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no links are allowed; the blob is whole."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)
    path = HubSource(repo, None).fetch(FILE)
    os.truncate(path, 1000)
    assert HubSource(repo, None).fetch(FILE).read_bytes() == home_hub.read(repo, FILE)


def test_a_killed_download_goes_on(home_hub: LoopbackHub, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later process finds what an earlier one had fetched."""
    monkeypatch.setattr(hub_client, "ATTEMPTS", 1)
    monkeypatch.setattr("hf_locstitch.checkpoints.read_ahead.CONNECTIONS", 1)  # pieces come in order
    third = f"{repo}/resolve/.*{FILE}"
    home_hub.fail(Fault("status", method="GET", path=third, skip=2, times=9))
    with pytest.raises(DownloadError, match="Run the same command again"):
        HubSource(repo, None).fetch(FILE)
    home_hub._faults._waiting.clear()
    before = served(home_hub, repo)
    assert before == 2 * SIZE // 3
    assert HubSource(repo, None).fetch(FILE).read_bytes() == home_hub.read(repo, FILE)
    assert served(home_hub, repo) == SIZE


def test_headers_only(home_hub: LoopbackHub, tmp_path: Path) -> None:
    """Opening a checkpoint reads headers by range, not weights."""
    shapes = {f"layers.{i}.w": (500, 300) for i in range(4)}
    folder = save(tmp_path / "m", random_state(0, shapes=shapes))
    repo = f"demo/{uuid4().hex}"
    home_hub.add_repo(repo, {file.name: file for file in folder.iterdir()})
    home_hub.requests.clear()
    checkpoint = open_checkpoint(parse_ref(repo))
    assert {name: checkpoint.info(name).shape for name in shapes} == shapes
    assert served(home_hub, repo) <= 100_000 < checkpoint.shards[0].size
    local = open_checkpoint(Ref(folder=folder))
    assert [t.name for t in local.shards[0].header.tensors] == [t.name for t in checkpoint.shards[0].header.tensors]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Fault("status", status=500, times=99), DownloadError, r"the request to .* failed"),
        (Fault("status", status=401), CheckpointError, "log in with"),
    ],
)
def test_a_lasting_fault(home_hub: LoopbackHub, repo: str, fault: Fault, error: type[Exception], words: str) -> None:
    from dataclasses import replace

    home_hub.fail(replace(fault, path=f"/api/models/{repo}"))
    with pytest.raises(error, match=words):
        HubSource(repo, None)
    home_hub._faults._waiting.clear()


def test_without_network_the_cache_serves(
    home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "m", finetune(random_state(0), 1))
    repo = f"demo/{uuid4().hex}"
    sha = home_hub.add_repo(repo, {file.name: file for file in folder.iterdir()})
    first = open_checkpoint(parse_ref(repo))
    first.source.fetch(FILE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    for revision in (None, sha):
        again = open_checkpoint(Ref(repo=repo, revision=revision))
        assert again.source.commit == sha and again.source.pinned == f"{repo}@{sha}"
        assert list(again.tensors) == list(first.tensors)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        open_checkpoint(parse_ref("demo/never-fetched"))


def test_a_damaged_blob_that_no_snapshot_links_to(home_hub: LoopbackHub, repo: str) -> None:
    """A commit that changed the card alone finds the weights of the one before: they are looked at, not believed."""
    path = HubSource(repo, None).fetch(FILE)
    home_hub.add_repo(repo, {"README.md": "another card"})
    with path.resolve().open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    again = HubSource(repo, None).fetch(FILE)
    assert again != path and again.read_bytes() == home_hub.read(repo, FILE)


class Answers:
    """Stands for responses of a server: bodies of a 206, one after another."""

    def __init__(self, *bodies: bytes) -> None:
        self._bodies = iter(bodies)
        self.status_code, self.history, self.url, self.headers = 206, (), "", {}

    @contextmanager
    def get(self, *_: object) -> Iterator[Answers]:
        yield self

    def iter_bytes(self) -> Iterator[bytes]:
        body = next(self._bodies)
        yield from (body[at : at + 300] for at in range(0, len(body), 300))

    def raise_for_status(self) -> Answers:
        return self


@pytest.mark.parametrize("bodies", [[b"", b"", b"x" * 1000], [b"x" * 10, *[b"x" * 99] * 10], [b"x" * 5000]])
def test_headers_from_servers_that_send_less_or_more(
    repo: str, monkeypatch: pytest.MonkeyPatch, bodies: list[bytes]
) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.0)
    source = HubSource(repo, None)
    monkeypatch.setattr(source._wire, "_get", Answers(*bodies).get)
    assert source.read_start(FILE, 1000) == b"x" * 1000


def test_more_than_was_asked_for_is_left(repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HubSource(repo, None)
    monkeypatch.setattr(source._wire, "_get", Answers(b"y" * 5000).get)
    assert b"".join(source._wire._range(FILE, 100, 1750)) == b"y" * 1650


@pytest.mark.parametrize("connections", [1, 2])
def test_more_repos_than_a_server_takes_connections(
    home_hub: LoopbackHub, connections: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that get nothing for a while do not give up as long as others get something."""
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.5)
    base = random_state(0, shapes={f"layers.{i}.w": (300, 600) for i in range(4)})
    repos = []
    for i in range(4):
        folder = save(tmp_path / f"m{i}", finetune(base, i) if i else base)
        repos.append(f"demo/{uuid4().hex[:8]}-{i}")
        home_hub.add_repo(repos[-1], {path.name: path for path in folder.iterdir()})
    plan = make_plan(make_recipe({"base": repos[0], "finetuned": repos[1:], "figures": False}))
    home_hub.link = Link(speed=3e6, latency=0.01, connections=connections)
    try:
        carry_out(plan, tmp_path / "out")
    finally:
        home_hub.link = Link()
    quick_merge(tmp_path / "m0", [tmp_path / f"m{i}" for i in (1, 2, 3)], out=tmp_path / "local")
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "local"))
