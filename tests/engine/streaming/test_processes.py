"""Two processes that keep nothing: each reads whole files of its own, and together they write the bytes of one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.launch import launch
from helpers.models import State, save_sharded
from helpers.runs import files_of
from helpers.streaming import CACHING, PASSING, merged, sizes

from hf_locstitch.checkpoints.byte_ranges import files_of as files_of_tensors
from hf_locstitch.checkpoints.checkpoint import FIRST_READ
from hf_locstitch.engine.work_dir import WorkDir
from hf_locstitch.plan.division import divided, divided_by_file, rounds
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from loopback_hub import Fault, LoopbackHub


@pytest.fixture
def alike(home_hub: LoopbackHub, hub_cache: Path, states: list[State], tmp_path: Path) -> list[str]:
    """Three models in three files each, which hold the same tensors."""
    repos = []
    for i, state in enumerate(states):
        folder = save_sharded(tmp_path / "in" / f"m{i}", state, lambda names: [names[:3], names[3:5], names[5:]])
        repos.append(f"demo/{uuid4().hex[:8]}-{i}00")
        home_hub.add_repo(repos[-1], {path.name: path for path in folder.iterdir()})
    return repos


def fetched(hub: LoopbackHub, repo: str) -> dict[str, list[tuple[int, int]]]:
    """The ranges sent of each weight file, in order, without the headers, which each process reads to plan."""
    found: dict[str, list[tuple[int, int]]] = {}
    for request in hub.requests:
        file = re.fullmatch(rf"/{repo}/resolve/[^/]*/(.*safetensors)(\?.*)?", request.path)
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
        if file and span and request.method == "GET" and int(span[1]) > 0:
            found.setdefault(file[1], []).append((int(span[1]), int(span[2]) + 1))
    return {file: sorted(ranges) for file, ranges in found.items()}


def test_a_damaged_file_and_the_same_command_again(alike: list[str], home_hub: LoopbackHub, tmp_path: Path) -> None:
    """The damage is in a file that the second process reads. Afterwards no byte comes twice, and what the first command
    verified of the finetunes does not come at all."""
    entries = [{"ref": ref, "name": ref[-3:]} for ref in alike[1:]]
    recipe = {"base": alike[0], "finetuned": entries, "localizer": {"density": 0.1}, "figures": False}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    damaged = sorted(sizes(home_hub, alike[2]))[-1]
    home_hub.fail(Fault("flip", method="GET", path=f"{alike[2]}/resolve/.*{damaged}", offset=400_000))
    done = launch(2, tmp_path, "recipe.yaml", "--no-cache", "--out", "out")
    assert done.returncode != 0 and not home_hub.faults and not (tmp_path / "out").exists()
    assert done.stderr.count(f"error: {damaged} of {alike[2]}") == 1, done.stderr[-3000:]
    (work,) = tmp_path.glob(".out.*.partial")
    verified = WorkDir(work).verified(2)
    assert not WorkDir(work).verified(1) and (alike[2][-3:], damaged) not in verified

    home_hub.requests.clear()
    done = launch(2, tmp_path, "recipe.yaml", "--no-cache", "--out", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    for name, repo in {"base": alike[0], **{entry["name"]: entry["ref"] for entry in entries}}.items():
        for file, size in sizes(home_hub, repo).items():
            spared = name != "base" and (name, file) in verified
            assert fetched(home_hub, repo).get(file, []) == ([] if spared else [(FIRST_READ, size)]), (name, file)
    assert not list(tmp_path.glob(".out*"))
    assert files_of(tmp_path / "out") == merged(alike, tmp_path / "one", CACHING, localizer={"density": 0.1})


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
