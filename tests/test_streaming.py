"""Inputs that are still on their way: the same bytes out, every byte served once, little of it on the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from huggingface_hub import constants
from models import State, finetune, random_state, save, save_sharded
from test_run import carry_out, files_of

from hf_locstitch.checkpoints import hub_client
from hf_locstitch.checkpoints.byte_ranges import byte_ranges, most_held
from hf_locstitch.checkpoints.checkpoint import open_checkpoint
from hf_locstitch.checkpoints.download import PassingFeed
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.checkpoints.ref import Ref
from hf_locstitch.engine.execute import execute
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.errors import DownloadError, IntegrityError, RecipeError, WorkError
from hf_locstitch.localize.scan import Scan
from hf_locstitch.plan.cost import estimate, files_here
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings
from loopback_hub import Fault, LoopbackHub

SHAPES = {"embed.w": (200, 300)} | {f"layers.{i}.w": (300, 400) for i in range(6)} | {"head.w": (200, 300)}
SIZE = 2 * sum(a * b for a, b in SHAPES.values())
PASSING = Settings(chunk=8192, workers=2, cache=False, window=100_000)
CACHING = Settings(chunk=8192, workers=2)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.01)
    for module in ("hf_locstitch.localize.selection", "hf_locstitch.plan.cost"):
        monkeypatch.setattr(f"{module}.COMPACT_SLACK", 0)
    for module in ("hf_locstitch.localize.scan", "hf_locstitch.plan.cost"):
        monkeypatch.setattr(f"{module}.BATCH", 1)


@pytest.fixture(scope="module")
def states() -> list[State]:
    base = random_state(0, torch.bfloat16, SHAPES)
    return [base, *(finetune(base, seed, 1e-2) for seed in (1, 2))]


@pytest.fixture
def repos(home_hub: LoopbackHub, hub_cache: Path, states: Sequence[State], tmp_path: Path) -> list[str]:
    """The base in two files, a finetune in one, a finetune in three whose tensors are in another order."""
    thirds = lambda names: [list(reversed(names[::3])), names[1::3], names[2::3]]  # noqa: E731
    folders = [
        save_sharded(tmp_path / "in" / "base", states[0], lambda names: [names[:4], names[4:]]),
        save(tmp_path / "in" / "ft1", states[1]),
        save_sharded(tmp_path / "in" / "ft2", states[2], thirds),
    ]
    run_id, names = uuid4().hex[:8], []
    for folder in folders:
        names.append(f"demo/{run_id}-{folder.name}")
        home_hub.add_repo(names[-1], {path.name: path for path in folder.iterdir()})
    home_hub.requests.clear()
    return names


def merged(repos: Sequence[str], out: Path, how: Settings, **fields: object) -> dict[str, str]:
    """The files of a merge, in which only the manifest tells the time."""
    entries = [{"ref": ref, "name": ref[-3:]} for ref in repos[1:]]
    recipe = make_recipe({"base": repos[0], "finetuned": entries, **fields})
    carry_out(make_plan(recipe, how), out)
    return files_of(out)


def served(hub: LoopbackHub, repo: str) -> dict[str, int]:
    """Bytes of each weight file that went over the wire."""
    found: dict[str, int] = {}
    for request in list(hub.requests):
        path = request.path.split("?")[0]
        if request.method == "GET" and f"/{repo}/resolve/" in path and path.endswith(".safetensors"):
            file = path.rsplit("/", 1)[1]
            found[file] = found.get(file, 0) + request.sent
    return found


def sizes(hub: LoopbackHub, repo: str) -> dict[str, int]:
    return {file: len(hub.read(repo, file)) for file in hub.files(repo) if file.endswith(".safetensors")}


@pytest.fixture
def expected(repos: list[str], home_hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """From a cache that holds everything already."""
    for repo in repos:
        source = HubSource(repo, None)
        for file in source.files:
            source.fetch(file)
    files = merged(repos, tmp_path / "expected", CACHING)
    empty_cache()
    home_hub.requests.clear()
    return files


def empty_cache() -> None:
    shutil.rmtree(constants.HF_HUB_CACHE)


@pytest.mark.parametrize("how", [CACHING, PASSING], ids=["caching", "passing"])
def test_the_same_bytes_and_none_twice(
    repos: list[str], expected: dict[str, str], home_hub: LoopbackHub, tmp_path: Path, how: Settings
) -> None:
    assert merged(repos, tmp_path / "out", how) == expected
    base, *finetuned = (served(home_hub, repo) for repo in repos)
    for repo, counts in zip(repos[1:], finetuned, strict=True):
        assert counts == sizes(home_hub, repo)
    times = 1 if how.cache else 2
    assert all(base[file] <= times * size for file, size in sizes(home_hub, repos[0]).items())
    home_hub.requests.clear()
    merged(repos, tmp_path / "again", how)
    assert bool(served(home_hub, repos[1])) == (not how.cache)


@pytest.mark.parametrize("method", ["average", "ties"])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_other_methods_and_densities(
    repos: list[str], home_hub: LoopbackHub, tmp_path: Path, method: str, density: float
) -> None:
    fields = {"method": method} | ({} if method == "average" else {"localizer": {"density": density}})
    passing = merged(repos, tmp_path / "a", PASSING, **fields)
    assert all(served(home_hub, repo) == sizes(home_hub, repo) for repo in repos[1:])
    if method == "average":
        assert served(home_hub, repos[0]) == sizes(home_hub, repos[0])
    assert (
        merged(repos, tmp_path / "b", CACHING, **fields) == passing == merged(repos, tmp_path / "c", CACHING, **fields)
    )


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_rest_from_a_finetune(repos: list[str], home_hub: LoopbackHub, tmp_path: Path, scope: str) -> None:
    fields = {"rest_from": "ft2", "localizer": {"density": 0.1, "scope": scope}}
    passing = merged(repos, tmp_path / "a", PASSING, **fields)
    assert served(home_hub, repos[2]) == sizes(home_hub, repos[2])
    assert passing == merged(repos, tmp_path / "b", CACHING, **fields)


def on_disk(folder: Path) -> int:
    """Bytes on the disk under `folder`, nameless files of this process included."""
    blocks: dict[int, int] = {}
    named = [Path(parent) / file for parent, _, files in os.walk(folder) for file in files]
    for path in [*named, *Path("/proc/self/fd").iterdir()]:
        try:
            nameless = path.parent.name == "fd" and os.readlink(path).startswith(str(folder))
            if path.is_relative_to(folder) or (nameless and os.readlink(path).endswith("(deleted)")):
                blocks[path.stat().st_ino] = path.stat().st_blocks
        except OSError:
            continue  # gone meanwhile
    return 512 * sum(blocks.values())


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """What was on the disk, looked at over and over."""
    seen, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append(on_disk(folder))
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at nameless files through /proc")
def test_the_disk_never_holds_more_than_planned(
    home_hub: LoopbackHub, hub_cache: Path, states: list[State], tmp_path: Path
) -> None:
    """Pushed only, with outputs in small shards: neither an input nor the output is ever on the disk whole."""
    repos = []
    for i, state in enumerate(states):
        folder = save(tmp_path / "in" / f"m{i}", state)
        repos.append(f"demo/{uuid4().hex[:8]}-m{i}")
        home_hub.add_repo(repos[-1], {path.name: path for path in folder.iterdir()})
    target = f"demo/{uuid4().hex[:8]}"
    recipe = make_recipe(
        {
            "base": repos[0],
            "finetuned": repos[1:],
            "push_to": target,
            "shard_size": SIZE // 6,
            "localizer": {"density": 0.02},
        }
    )
    plan = make_plan(recipe, PASSING)
    with watched(Path(constants.HF_HOME) / "hf-locstitch") as seen:
        execute(plan, Progress(False))
    planned = estimate(plan, files_here(plan)).disk
    print(f"on the disk at most {max(seen):,} bytes, planned {planned:,}, one model {SIZE:,}")
    assert 0 < max(seen) <= planned + 100_000  # headers, side files and folders are not planned
    assert max(seen) < 1.5 * SIZE and planned < SIZE * len(repos)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    local = {"base": str(tmp_path / "in" / "m0"), "finetuned": [str(tmp_path / "in" / f"m{i}") for i in (1, 2)]}
    again = make_recipe({**local, "shard_size": SIZE // 6, "localizer": {"density": 0.02}})
    carry_out(make_plan(again, CACHING), tmp_path / "local")
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert home_hub.read(target, path.name) == path.read_bytes()


class Killed(BaseException):
    """Stands for a kill: nothing catches it, nothing is cleaned up for it."""


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
    """Its file is found wrong at its end, when much of it has been used: none of that is used again."""
    file = next(file for file, size in sizes(home_hub, repos[victim]).items() if size > place)
    home_hub.fail(Fault("flip", method="GET", path=f"{repos[victim]}/resolve/.*{file}", offset=place))
    with pytest.raises(IntegrityError, match=f"{file} of {repos[victim]}"):
        merged(repos, tmp_path / "out", how)
    assert not home_hub.faults and not (tmp_path / "out").exists()
    assert merged(repos, tmp_path / "out", how) == expected


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
        Fault("cut", after_bytes=600_001, times=2),
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
    with pytest.raises(DownloadError, match=r"is no more.*same command again"):
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


def test_a_branch_that_moves_meanwhile(
    repos: list[str], expected: dict[str, str], home_hub: LoopbackHub, states: list[State], tmp_path: Path
) -> None:
    """The commit that was planned is the one that is read, though the branch moves between two shards."""
    plan = make_plan(
        make_recipe({"base": repos[0], "finetuned": [{"ref": r, "name": r[-3:]} for r in repos[1:]]}), PASSING
    )
    other = save_sharded(tmp_path / "other", states[2], lambda names: [names[:4], names[4:]])
    home_hub.add_repo(repos[0], {path.name: path for path in other.iterdir()})
    carry_out(plan, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


def test_a_shard_that_waits_for_its_turn(states: list[State], tmp_path: Path) -> None:
    folder = save(tmp_path / "m", states[0])
    checkpoint = open_checkpoint(Ref(folder=folder))
    whole = [(name, 0, info.numel) for name, (_, info) in checkpoint.tensors.items()]
    assert most_held(checkpoint, whole) == max(2 * count for _, _, count in whole)
    assert most_held(checkpoint, whole[::-1]) == SIZE
    assert most_held(checkpoint, [whole[2], whole[1], whole[4]]) == 2 * (whole[1][2] + whole[2][2])
    assert byte_ranges(checkpoint, whole)[checkpoint.shards[0].file] == [
        (checkpoint.shards[0].size - SIZE, checkpoint.shards[0].size)
    ]


def test_a_window_is_kept(home_hub: LoopbackHub, repos: list[str], tmp_path: Path) -> None:
    """Unless a reader waits for more."""
    source = HubSource(repos[1], None)
    file, size = next(iter(sizes(home_hub, repos[1]).items()))
    feed = PassingFeed(source, {file: [(0, size)]}, {}, tmp_path, 300_000, lambda _: None, lambda _: None)
    feed.start()
    try:
        time.sleep(0.5)
        assert 300_000 <= feed._arrived[file] < 600_000
        assert bytes(feed.read(file, size - 10, size)) == home_hub.read(repos[1], file)[-10:]
        feed.verify()
    finally:
        feed.close()


def test_no_cache_takes_one_process(repos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_locstitch.engine.execute.find_processes", lambda: Processes(0, 2))
    recipe = make_recipe({"base": repos[0], "finetuned": repos[1:], "out": str(tmp_path / "out")})
    with pytest.raises(RecipeError, match="--no-cache works in one process"):
        execute(make_plan(recipe, PASSING), Progress(False))
