"""Files of repos that the Hub keeps in Xet come through the real hf_xet, or over HTTP where it cannot serve."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import hf_xet
import pytest
from helpers.models import finetune, random_state, save_sharded
from helpers.streaming import CACHING, PASSING, SHAPES, empty_cache, merged, restart
from helpers.systems import needs_early_reading
from huggingface_hub import constants

from hf_locstitch.checkpoints import hub_client, xet
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.xet import settings
from hf_locstitch.errors import IntegrityError
from hf_locstitch.runtime.settings import Settings
from loopback_hub import Fault, LoopbackHub

FILE = "model.safetensors"
SIZE = 3_000_000
XORB, PLAN, TOKEN = "/_lfs/xorb/", "/reconstructions/", "/xet-read-token/"


@pytest.fixture
def xet_hub(home_hub: LoopbackHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The Hub of this process with Xet, and hf_xet allowed; it gives up after a second."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(xet, "FAILURES", xet.Failures())
    xet._session.cache_clear()
    home_hub.xet = True
    yield home_hub
    home_hub.xet = False
    home_hub._faults._waiting.clear()
    restart(home_hub)
    xet._session.cache_clear()


@pytest.fixture
def repo(xet_hub: LoopbackHub) -> str:
    name = f"demo/{uuid4().hex}"
    xet_hub.add_repo(name, {FILE: os.urandom(SIZE), "config.json": '{"model_type": "toy"}'})
    xet_hub.requests.clear()
    return name


@pytest.fixture
def models(xet_hub: LoopbackHub, tmp_path: Path) -> list[str]:
    """A base and two finetunes in two shards each."""
    names = [f"demo/{uuid4().hex[:8]}-{end}" for end in ("base", "ft1", "ft2")]
    base = random_state(0, shapes=SHAPES)
    for name, state in zip(names, (base, finetune(base, 1), finetune(base, 2)), strict=True):
        folder = tmp_path / name
        save_sharded(folder, state, lambda names: [names[:4], names[4:]])
        xet_hub.add_repo(name, {path.name: path for path in folder.iterdir()})
    return names


def sent(hub: LoopbackHub, what: str) -> int:
    """Bytes of answers to requests with this in their path."""
    return sum(one.sent for one in hub.requests if what in one.path and one.status in (0, 200, 206))


def over_http(hub: LoopbackHub) -> int:
    return sum(one.sent for one in hub.requests if "/resolve/" in one.path and ".safetensors" in one.path)


def test_a_file_comes_through_hf_xet(xet_hub: LoopbackHub, repo: str) -> None:
    path = HubSource(repo, None).fetch(FILE)
    assert path.read_bytes() == xet_hub.read(repo, FILE)
    assert over_http(xet_hub) == 0
    # Chunks at the borders of pieces come twice.
    assert SIZE < sent(xet_hub, XORB) < 1.1 * SIZE
    assert sum(TOKEN in one.path for one in xet_hub.requests) == 1
    assert sum("/tree/" in one.path for one in xet_hub.requests) == 1


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["cached", "no-cache"])
def test_a_merge_has_the_bytes_of_a_plain_one(
    xet_hub: LoopbackHub, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Settings
) -> None:
    found = merged(models, tmp_path / "through-xet", how)
    weights = sum(
        size for name in models for file, size in xet_hub.files(name).items() if file.endswith(".safetensors")
    )
    assert not any("/tree/" in one.path for one in xet_hub.requests)  # the answers to requests for headers tell enough
    assert sent(xet_hub, XORB) > 0.8 * weights and over_http(xet_hub) < 0.2 * weights  # headers, with what follows them
    empty_cache()
    xet_hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert merged(models, tmp_path / "plain", how) == found
    assert sent(xet_hub, "/_cas/") == sent(xet_hub, XORB) == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault("stall", XORB, after_bytes=400_000, times=99),
        Fault("stall", PLAN, after_bytes=10, times=99),
        Fault("stall", TOKEN, after_bytes=10, times=99),
        Fault("status", XORB, status=500, times=99),
        Fault("status", PLAN, status=403, times=99),
        Fault("status", TOKEN, status=401, times=99),
        Fault("status", "/tree/", status=404, times=99),
        Fault("cut", XORB, after_bytes=400_000, times=99),
        Fault("flip", XORB, offset=1, times=99),  # in the length of a chunk
    ],
    ids=lambda fault: f"{fault.kind} {fault.path.strip('/')}",
)
def test_http_takes_over(xet_hub: LoopbackHub, repo: str, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    xet_hub.fail(fault)
    with caplog.at_level(logging.WARNING, "hf_locstitch"):
        path = HubSource(repo, None).fetch(FILE)
    assert path.read_bytes() == xet_hub.read(repo, FILE)
    [said] = [record.message for record in caplog.records]
    assert repo in said and "going on over HTTP" in said
    restart(xet_hub)
    asked = sent(xet_hub, XORB)
    other = f"demo/{uuid4().hex}"
    xet_hub.add_repo(other, {FILE: os.urandom(SIZE)})
    HubSource(other, None).fetch(FILE)
    assert sent(xet_hub, XORB) == asked  # hf_xet is not tried again


def test_a_corrupted_xorb_is_found(xet_hub: LoopbackHub, repo: str) -> None:
    """hf_xet passes a flipped byte on."""
    xet_hub.fail(Fault("flip", XORB, offset=100_000))
    assert HubSource(repo, None).fetch(FILE).read_bytes() == xet_hub.read(repo, FILE)
    assert over_http(xet_hub) == SIZE  # the second time


@needs_early_reading
def test_a_corrupted_xorb_in_a_merge(xet_hub: LoopbackHub, models: list[str], tmp_path: Path) -> None:
    xet_hub.fail(Fault("flip", f"{XORB}.*{models[1]}", offset=400_000))
    with pytest.raises(IntegrityError, match="HF_HUB_DISABLE_XET=1"):
        merged(models, tmp_path / "out", CACHING)
    assert not (tmp_path / "out").exists()


FETCH = """
import os, sys
from hf_locstitch.checkpoints.hub import HubSource
last = int(sys.argv[2])
source = HubSource(sys.argv[1], None)
print(source.fetch("model.safetensors", arrived=lambda _, arrived: os._exit(9) if arrived > last else None))
"""


def fetched_elsewhere(hub: LoopbackHub, home: Path, repo: str, last: int = SIZE, **variables: str) -> Path | None:
    """The file as another process fetches it, which dies once more than `last` bytes are there."""
    environment = {**os.environ, **hub.environment(home), **variables}
    command = [sys.executable, "-c", FETCH, repo, str(last)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 9), done.stderr
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def test_a_killed_download_goes_on(xet_hub: LoopbackHub, repo: str, tmp_path: Path) -> None:
    assert fetched_elsewhere(xet_hub, tmp_path, repo, 1_000_000) is None
    xet_hub.requests.clear()
    path = fetched_elsewhere(xet_hub, tmp_path, repo)
    assert path is not None and path.read_bytes() == xet_hub.read(repo, FILE)
    assert 0 < sent(xet_hub, XORB) < SIZE - 800_000 and over_http(xet_hub) == 0


@pytest.mark.parametrize(("disabled", "through_xet"), [("0", True), ("1", False)])
def test_hf_hub_disable_xet(xet_hub: LoopbackHub, repo: str, tmp_path: Path, disabled: str, through_xet: bool) -> None:
    path = fetched_elsewhere(xet_hub, tmp_path, repo, HF_HUB_DISABLE_XET=disabled)
    assert path is not None and path.read_bytes() == xet_hub.read(repo, FILE)
    assert (sent(xet_hub, XORB) > SIZE) == (over_http(xet_hub) == 0) == through_xet


def test_files_outside_xet(xet_hub: LoopbackHub, repo: str, caplog: pytest.LogCaptureFixture) -> None:
    xet_hub.xet = False
    assert HubSource(repo, None).fetch(FILE).read_bytes() == xet_hub.read(repo, FILE)
    assert over_http(xet_hub) == SIZE and sent(xet_hub, "/_cas/") == 0 and not caplog.records


def test_without_hf_xet(xet_hub: LoopbackHub, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xet, "find_spec", lambda name: None)
    HubSource(repo, None).fetch(FILE)
    assert over_http(xet_hub) == SIZE and sent(xet_hub, "/_cas/") == 0
    assert not any("/tree/" in one.path for one in xet_hub.requests)


def test_a_folder_that_cannot_be_written_to(xet_hub: LoopbackHub, repo: str, tmp_path: Path) -> None:
    """hf_xet keeps things there, fails without, and tells standard output of it."""
    (tmp_path / "file").touch()
    path = fetched_elsewhere(xet_hub, tmp_path, repo, HF_XET_CACHE=str(tmp_path / "file" / "xet"))
    assert path is not None and path.read_bytes() == xet_hub.read(repo, FILE)
    assert over_http(xet_hub) == 0 < sent(xet_hub, XORB)


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 7)
    own = dict(hf_xet.XetConfig().items())  # pyright: ignore[reportAttributeAccessIssue]
    assert settings().keys() <= own.keys()
    assert settings()["client.read_timeout"].total_seconds() == 7
    for buffer in ("download_buffer_size", "download_buffer_limit", "download_buffer_perfile_size"):
        assert settings()[f"reconstruction.{buffer}"] < own[f"reconstruction.{buffer}"] / 10
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "99s")
    assert "client.read_timeout" not in settings()
    monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", True)
    assert not any(name.startswith("reconstruction.") for name in settings())
    assert "client.retry_max_attempts" in settings()


def test_the_token_stays_at_the_hub(xet_hub: LoopbackHub, repo: str) -> None:
    HubSource(repo, None).fetch(FILE)
    xorbs = [one for one in xet_hub.requests if XORB in one.path]
    assert xorbs and not any(one.user for one in xorbs)


def test_headers_are_read_without_hf_xet(xet_hub: LoopbackHub, models: list[str]) -> None:
    xet_hub.requests.clear()
    open_checkpoint(parse_ref(models[0]))
    assert not any("/tree/" in one.path or "/_cas/" in one.path for one in xet_hub.requests)


@pytest.mark.parametrize("writable", [True, False])
def test_a_merge_is_pushed_through_hf_xet(
    xet_hub: LoopbackHub, models: list[str], tmp_path: Path, writable: bool
) -> None:
    """Also where the folder that hf_xet needs cannot be written to."""
    (tmp_path / "file").touch()
    target, out = f"demo/{uuid4().hex[:8]}-merged", tmp_path / "out"
    merge = [sys.executable, "-m", "hf_locstitch", "merge", "--base", models[0], "--ft", *models[1:], "--no-figures"]
    environment = {**os.environ, **xet_hub.environment(tmp_path / "home")}
    if not writable:
        environment["HF_XET_CACHE"] = str(tmp_path / "file" / "xet")
    command = [*merge, "--out", str(out), "--push-to", target, "--quiet", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == xet_hub.head(target)
    weights = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.safetensors")}
    assert weights and {file: xet_hub.read(target, file) for file in weights} == weights
    received = [(one.path, one.received) for one in xet_hub.requests if one.method in ("POST", "PUT")]
    through_xet = sum(nbytes for path, nbytes in received if path.startswith("/_cas/v1/xorbs/"))
    assert through_xet > 0.5 * sum(map(len, weights.values()))
    assert not any(path.startswith("/_lfs/") for path, _ in received)
