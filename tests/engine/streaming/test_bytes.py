"""Inputs that are still on their way: the same bytes out, every byte served once, little of it on the disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.models import State, save, save_sharded
from helpers.runs import carry_out, files_of
from helpers.streaming import CACHING, PASSING, SIZE, merged, served, sizes
from huggingface_hub import constants

from hf_locstitch.checkpoints.download import StreamingDownload
from hf_locstitch.checkpoints.hub import HubSource
from hf_locstitch.engine.execute import execute
from hf_locstitch.plan.cost import estimate, files_here
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings
from loopback_hub import LoopbackHub


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


@pytest.mark.parametrize(
    ("method", "density"),
    [("average", None), ("model-stock", None), ("ties", 0.02), ("ties", 0.5)],
)
def test_other_methods_and_densities(
    repos: list[str], home_hub: LoopbackHub, tmp_path: Path, method: str, density: float | None
) -> None:
    fields = {"method": method} | ({} if density is None else {"localizer": {"density": density}})
    passing = merged(repos, tmp_path / "a", PASSING, **fields)
    assert all(served(home_hub, repo) == sizes(home_hub, repo) for repo in repos[1:])
    if density is None:
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
            "figures": False,
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
    again = make_recipe({**local, "shard_size": SIZE // 6, "localizer": {"density": 0.02}, "figures": False})
    carry_out(make_plan(again, CACHING), tmp_path / "local")
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert home_hub.read(target, path.name) == path.read_bytes()


def test_a_branch_that_moves_meanwhile(
    repos: list[str], expected: dict[str, str], home_hub: LoopbackHub, states: list[State], tmp_path: Path
) -> None:
    """The commit that was planned is the one that is read, though the branch moves between two shards."""
    entries = [{"ref": ref, "name": ref[-3:]} for ref in repos[1:]]
    plan = make_plan(make_recipe({"base": repos[0], "finetuned": entries, "figures": False}), PASSING)
    other = save_sharded(tmp_path / "other", states[2], lambda names: [names[:4], names[4:]])
    home_hub.add_repo(repos[0], {path.name: path for path in other.iterdir()})
    carry_out(plan, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


def test_a_window_is_kept(home_hub: LoopbackHub, repos: list[str], tmp_path: Path) -> None:
    """Unless a reader waits for more."""
    source = HubSource(repos[1], None)
    file, size = next(iter(sizes(home_hub, repos[1]).items()))
    download = StreamingDownload(source, {file: [(0, size)]}, {}, tmp_path, 300_000, lambda _: None, lambda _: None)
    download.start()
    try:
        time.sleep(0.5)
        assert 300_000 <= download._arrived[file] < 600_000
        assert bytes(download.read(file, size - 10, size)) == home_hub.read(repos[1], file)[-10:]
        download.verify()
    finally:
        download.close()


def test_no_byte_of_the_base_comes_twice(
    home_hub: LoopbackHub, hub_cache: Path, states: list[State], tmp_path: Path
) -> None:
    """Into a folder, the base waits on the disk for its second pass, and goes as the output takes its place."""
    repos = []
    for i, state in enumerate(states):
        folder = save_sharded(tmp_path / "in" / f"m{i}", state, lambda names: [names[:3], names[3:5], names[5:]])
        repos.append(f"demo/{uuid4().hex[:8]}-{i}00")
        home_hub.add_repo(repos[-1], {path.name: path for path in folder.iterdir()})
    work = tmp_path / "work"
    work.mkdir()
    fields = {"base": repos[0], "finetuned": repos[1:], "localizer": {"density": 0.02}, "figures": False}
    home_hub.requests.clear()
    plan = make_plan(make_recipe({**fields, "out": str(work / "out")}), PASSING)
    with watched(work) as seen:
        execute(plan, Progress(False))
    for repo in repos:
        assert served(home_hub, repo) == sizes(home_hub, repo)
    cost = estimate(plan, files_here(plan))
    print(f"on the disk at most {max(seen):,} bytes, planned {cost.disk:,}, one model {SIZE:,}")
    assert cost.download == sum(sum(sizes(home_hub, repo).values()) for repo in repos)
    assert max(seen) <= cost.disk + 100_000 and cost.disk < 3 * SIZE
    merged(repos, tmp_path / "cached", CACHING, localizer={"density": 0.02})
    for path in (tmp_path / "cached").glob("*.safetensors"):
        assert (work / "out" / path.name).read_bytes() == path.read_bytes()
