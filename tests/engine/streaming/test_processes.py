"""Two processes that keep nothing: each reads whole files of its own, and together they write the bytes of one."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from helpers.launch import launch
from helpers.models import State, save_sharded
from helpers.ranks import in_ranks
from helpers.runs import files_of
from helpers.streaming import CACHING, PASSING, merged, sizes

from hf_locstitch.artifacts.manifest import Manifest
from hf_locstitch.checkpoints.byte_ranges import files_of as files_of_tensors
from hf_locstitch.checkpoints.checkpoint import FIRST_READ
from hf_locstitch.engine.execute import make
from hf_locstitch.engine.work_dir import WorkDir
from hf_locstitch.errors import IntegrityError, RequestError
from hf_locstitch.plan.division import divided, divided_by_file, rounds
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.plans import MergePlan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.progress import Progress
from loopback_hub import Fault, LoopbackHub

NAMES = ["base", "100", "200"]


@pytest.fixture
def alike(home_hub: LoopbackHub, hub_cache: Path, states: list[State], tmp_path: Path) -> list[str]:
    """Three models in three files each, which hold the same tensors."""
    repos = []
    for i, state in enumerate(states):
        folder = save_sharded(tmp_path / "in" / f"m{i}", state, lambda names: [names[:3], names[3:5], names[5:]])
        repos.append(f"demo/{uuid4().hex[:8]}-{i}00")
        home_hub.add_repo(repos[-1], {path.name: path for path in folder.iterdir()})
    return repos


def fields(repos: Sequence[str]) -> dict[str, Any]:
    """Of a recipe."""
    entries = [{"ref": ref, "name": name} for ref, name in zip(repos[1:], NAMES[1:], strict=True)]
    return {"base": repos[0], "finetuned": entries, "localizer": {"density": 0.1}, "figures": False}


def plan_of(fields: dict[str, Any]) -> MergePlan:
    """As each process makes it, of sources of its own."""
    return make_plan(make_recipe(fields), PASSING)


def fetched(hub: LoopbackHub, repo: str) -> dict[str, list[tuple[int, int]]]:
    """The ranges sent of each weight file, in order, without the headers, which each process reads to plan."""
    found: dict[str, list[tuple[int, int]]] = {}
    for request in hub.requests:
        file = re.fullmatch(rf"/{repo}/resolve/[^/]*/(.*safetensors)(\?.*)?", request.path)
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
        if file and span and request.method == "GET" and int(span[1]) > 0:
            found.setdefault(file[1], []).append((int(span[1]), int(span[2]) + 1))
    return {file: sorted(ranges) for file, ranges in found.items()}


def no_byte_twice(hub: LoopbackHub, repos: Sequence[str], spared: Collection[tuple[str, str]] = ()) -> None:
    """Files (repo, file) that may be `spared` come once or not at all."""
    for repo in repos:
        for file, size in sizes(hub, repo).items():
            due = [(FIRST_READ, size)]
            found = fetched(hub, repo).get(file, [])
            assert found == due or ((repo, file) in spared and not found), (repo, file)


def test_a_damaged_file_and_the_same_command_again(alike: list[str], home_hub: LoopbackHub, tmp_path: Path) -> None:
    """The damage is in a file that the second process reads. Afterwards, in two processes under torchrun, no byte comes
    twice; what was verified of the finetunes before, and used by both, does not come at all."""
    recipe = fields(alike)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    damaged = sorted(sizes(home_hub, alike[2]))[-1]
    home_hub.fail(Fault("flip", method="GET", path=f"{alike[2]}/resolve/.*{damaged}", offset=400_000))
    for error in in_ranks(2, lambda ranks: make(plan_of(recipe), tmp_path / "out", Progress(False), ranks)):
        assert isinstance(error, IntegrityError) and f"{damaged} of {alike[2]}" in str(error)
    assert not home_hub.faults and not (tmp_path / "out").exists()
    (work,) = tmp_path.glob(".out.*.partial")
    verified = {(dict(zip(NAMES, alike, strict=True))[name], file) for name, file in WorkDir(work).verified(2)}
    assert not WorkDir(work).verified(1) and (alike[2], damaged) not in verified

    home_hub.requests.clear()
    done = launch(2, tmp_path, "recipe.yaml", "--no-cache", "--out", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    no_byte_twice(home_hub, alike, {(repo, file) for repo, file in verified if repo != alike[0]})
    assert not list(tmp_path.glob(".out*"))
    assert files_of(tmp_path / "out") == merged(alike, tmp_path / "one", CACHING, localizer={"density": 0.1})


@pytest.mark.parametrize(
    "asked",
    [{"localizer": {"density": 0.02}}, {"localizer": {"density": 0.3, "scope": "tensor"}}, {"method": "average"}],
    ids=str,
)
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_them_writes_the_bytes_of_one(
    alike: list[str], home_hub: LoopbackHub, tmp_path: Path, count: int, asked: dict[str, Any]
) -> None:
    recipe = {**fields(alike), **asked, "out": str(tmp_path / "out")}
    if "method" in asked:
        del recipe["localizer"]
    home_hub.requests.clear()
    for record in in_ranks(count, lambda ranks: make(plan_of(recipe), tmp_path / "out", Progress(False), ranks)):
        assert isinstance(record, Manifest), record
    no_byte_twice(home_hub, alike)
    assert files_of(tmp_path / "out") == merged(alike, tmp_path / "one", CACHING, **asked)


def test_a_reported_fault_of_a_model_is_one_of_whole_files(
    alike: list[str], home_hub: LoopbackHub, states: list[State], tmp_path: Path
) -> None:
    """NaN that one process finds is told by all, and nothing is left."""
    broken = {name: value.clone() for name, value in states[1].items()}
    broken["layers.5.w"][0, 0] = float("nan")
    folder = save_sharded(tmp_path / "broken", broken, lambda names: [names[:3], names[3:5], names[5:]])
    home_hub.add_repo(alike[1], {path.name: path for path in folder.iterdir()})
    for error in in_ranks(2, lambda ranks: make(plan_of(fields(alike)), tmp_path / "out", Progress(False), ranks)):
        assert isinstance(error, RequestError) and "layers.5.w" in str(error), error
    assert not list(tmp_path.glob(".out*"))


def test_files_are_shared_out_whole(alike: list[str], repos: list[str]) -> None:
    """Where those of all models hold the same tensors; where they overlap, one process reads them all."""
    plan = make_plan(make_recipe({"base": alike[0], "finetuned": alike[1:]}), PASSING)
    owned = divided_by_file(plan, 2)
    files = [{file for name in own for file in files_of_tensors(plan.base, [name])} for own in owned]
    assert files[0].isdisjoint(files[1]) and all(files)
    assert [[shard.file[6:11] for shard in together] for together in rounds(plan.shards, owned)] == [
        ["00001", "00002"],
        ["00003"],
    ]
    names = {tensor.name for shard in plan.shards for tensor in shard.tensors}
    assert owned[0] | owned[1] == names and not owned[0] & owned[1]

    entries = [{"ref": ref, "name": ref[-3:]} for ref in repos[1:]]
    overlapping = make_plan(make_recipe({"base": repos[0], "finetuned": entries}), PASSING)
    assert sorted(map(len, divided_by_file(overlapping, 3))) == [0, 0, len(names)]


def test_processes_that_keep_no_files_share_each_shard_out(alike: list[str]) -> None:
    plan = make_plan(make_recipe({"base": alike[0], "finetuned": alike[1:]}), CACHING)
    owned = divided(plan.shards, 2)
    assert all(any(tensor.name in own for tensor in shard.tensors) for shard in plan.shards for own in owned)
    assert rounds(plan.shards, owned) == [[shard] for shard in plan.shards]
