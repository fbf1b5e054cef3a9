"""Streams that are cut, damaged, refused or have no place to go to: the same command again ends in the same bytes."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.runs import Killed
from helpers.streaming import CACHING, PASSING, empty_cache, merged, restart, sizes
from huggingface_hub import constants

from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.errors import DownloadError, IntegrityError, WorkError
from hf_locstitch.localize.scan import Scan
from hf_locstitch.runtime.positioned_io import OPEN_FILES_MOVE
from hf_locstitch.runtime.settings import Settings
from loopback_hub import Fault, LoopbackHub


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["caching", "passing"])
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (Scan, "_offer", 0),
        (Scan, "_offer", 30),
        (Scan, "_offer", 80),
        (ShardWriter, "_merge", 5),
        (ShardWriter, "_merge", 60),
    ],
)
def test_a_cut_stream_goes_on(
    repos: list[str],
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: Settings,
    owner: type,
    name: str,
    calls: int,
) -> None:
    original, count = getattr(owner, name), iter(range(calls))

    def method(*args: object) -> object:
        if next(count, None) is None:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, method)
        with pytest.raises(Killed):
            merged(repos, tmp_path / "out", how)
    assert not (tmp_path / "out").exists()
    assert merged(repos, tmp_path / "out", how) == expected


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["caching", "passing"])
@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("place", [200_000, 400_000])
def test_a_flipped_byte_is_never_merged(
    repos: list[str],
    expected: dict[str, str],
    home_hub: LoopbackHub,
    tmp_path: Path,
    how: Settings,
    victim: int,
    place: int,
) -> None:
    """Its file is found wrong at its end, when much of it has been used: none of that is used again. Where none of a
    file is used before its end, as on Windows, it is fetched once more by itself."""
    file = next(file for file, size in sizes(home_hub, repos[victim]).items() if size > place)
    home_hub.fail(Fault("flip", method="GET", path=f"{repos[victim]}/resolve/.*{file}", offset=place))
    if how is PASSING or OPEN_FILES_MOVE:
        with pytest.raises(IntegrityError, match=f"{file} of {repos[victim]}"):
            merged(repos, tmp_path / "out", how)
        assert not home_hub.faults and not (tmp_path / "out").exists()
    assert merged(repos, tmp_path / "out", how) == expected
    assert not home_hub.faults


def test_damage_that_another_process_mends_unseen(
    repos: list[str], expected: dict[str, str], home_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after it used a flipped byte; meanwhile somebody else fetched the file again, whole and right."""
    home_hub.fail(Fault("flip", method="GET", path=f"{repos[1]}/resolve/.*safetensors", offset=300_000))
    original, count = Scan._offer, iter(range(40))

    def offer(*args: object) -> None:
        if next(count, None) is None:
            raise Killed
        original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Scan, "_offer", offer)
        with pytest.raises(Killed):
            merged(repos, tmp_path / "out", CACHING)
    assert not home_hub.faults
    empty_cache()
    for repo in repos:
        source = HubSource(repo, None)
        for file in source.files:
            source.fetch(file)
    assert merged(repos, tmp_path / "out", CACHING) == expected


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["caching", "passing"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", after_bytes=500_000, times=2),
        Fault("cut", after_bytes=300_001, times=2),
        Fault("status", status=503, times=2),
        Fault("status", status=429, retry_after=1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_faults_on_the_wire(
    repos: list[str], expected: dict[str, str], home_hub: LoopbackHub, tmp_path: Path, how: Settings, fault: Fault
) -> None:
    from dataclasses import replace

    skip = 1 if fault.kind == "status" else 0  # the header's request
    home_hub.fail(replace(fault, method="GET", path=f"{repos[1]}/resolve/.*safetensors", skip=skip))
    assert merged(repos, tmp_path / "out", how) == expected
    assert not home_hub.faults


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["caching", "passing"])
def test_a_token_that_expires(
    repos: list[str], expected: dict[str, str], home_hub: LoopbackHub, tmp_path: Path, how: Settings
) -> None:
    home_hub.fail(Fault("cut", method="GET", path=f"{repos[1]}/resolve/.*safetensors", after_bytes=500_000))
    home_hub.fail(Fault("status", method="GET", path=f"{repos[1]}/resolve/.*safetensors", skip=2, status=401))
    with pytest.raises(DownloadError, match=r"no longer is.*same command again"):
        merged(repos, tmp_path / "out", how)
    assert not home_hub.faults and not (tmp_path / "out").exists()
    assert merged(repos, tmp_path / "out", how) == expected


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["caching", "passing"])
def test_a_stalled_connection(
    repos: list[str],
    expected: dict[str, str],
    home_hub: LoopbackHub,
    tmp_path: Path,
    how: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    stall = Fault("stall", method="GET", path=f"{repos[1]}/resolve/.*safetensors", after_bytes=500_000, seconds=20)
    home_hub.fail(stall)
    began = time.monotonic()
    assert merged(repos, tmp_path / "out", how) == expected
    assert not home_hub.faults and time.monotonic() - began < 15
    restart(home_hub)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts, or resizes, a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int) -> Path:
        option = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        return folder

    yield resize
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["caching", "passing"])
@pytest.mark.parametrize("size", [100_000, 700_000, 1_300_000, 2_000_000, 2_600_000])
def test_a_full_disk(
    repos: list[str], expected: dict[str, str], small_disk: Callable[[int], Path], how: Settings, size: int
) -> None:
    folder = small_disk(size)
    with pytest.raises(WorkError, match=r"is full.*same command again"):
        merged(repos, folder / "out", how)
    assert not (folder / "out").exists()
    small_disk(20_000_000)
    assert merged(repos, folder / "out", how) == expected
