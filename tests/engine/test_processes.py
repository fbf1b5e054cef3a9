"""Two and three processes write the bytes of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from uuid import uuid4

import pytest
import torch
from helpers.launch import launch, torchrun
from helpers.models import finetune, random_state, save, save_sharded
from helpers.ranks import in_ranks
from helpers.runs import files_of

from hf_locstitch.checkpoints.hashes import InputHashes
from hf_locstitch.cli.main import main
from hf_locstitch.engine import work_dir
from hf_locstitch.engine.execute import make
from hf_locstitch.engine.inputs import Inputs
from hf_locstitch.errors import RequestError
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings
from loopback_hub import LoopbackHub

SHAPES = {f"layers.{i}.w": (40, 30 + i) for i in range(9)} | {"embed.w": (50, 30), "layers.9.empty": (0, 3)}


@pytest.fixture
def refs(tmp_path: Path) -> list[object]:
    base = random_state(0, torch.bfloat16, SHAPES)
    save_sharded(tmp_path / "base", base, lambda names: [names[:4], names[4:]])
    for i in range(2):
        save(tmp_path / f"ft{i}", finetune(base, i, 1e-2))
    return ["--base", "./base", "--ft", "./ft0", "./ft1"]


@pytest.mark.parametrize(
    ("start", "count", "options"),
    [(launch, 3, ["--density", "0.1"]), (torchrun, 2, ["--method", "average"])],
    ids=["locstitch", "average"],
)
def test_bytes_do_not_depend_on_the_number_of_processes(
    start: Callable[..., CompletedProcess[str]],
    count: int,
    options: list[str],
    tmp_path: Path,
    refs: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *map(str, refs), "--out", "out1", *options, "--quiet"]) == 0
    done = start(count, tmp_path, *refs, "--out", "out", *options, figures=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "out1")
    manifests = [json.loads((tmp_path / out / "locstitch.json").read_text()) for out in ("out1", "out")]
    for manifest in manifests:
        del manifest["seconds"]
    assert all(manifest == manifests[0] for manifest in manifests)
    assert not list(tmp_path.glob(".out*"))


def test_localizing_and_stitching_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most weights unchanged, so that the mask is smaller than asked for, in one tensor alone."""
    monkeypatch.chdir(tmp_path)

    def run(count: int, command: str, *args: str) -> None:
        if count == 1:
            assert main([command, *args, "--quiet"]) == 0
            return
        done = launch(count, tmp_path, *args, command=command, figures=True)
        assert done.returncode == 0, done.stderr[-3000:]

    base = random_state(0, torch.bfloat16, SHAPES)
    save_sharded(tmp_path / "base", base, lambda names: [names[:4], names[4:]])
    few = {name: value.clone() for name, value in base.items()}
    few["layers.3.w"] += 1
    save(tmp_path / "few", few)
    for count in (1, 2):
        asked = "--base", "./base", "--ft", "./few", "--density", "0.4", "--out", f"loc{count}"
        run(count, "localize", *asked)
        run(count, "stitch", "--base", "./base", "--localized", "./loc1", "--out", f"out{count}")
    assert files_of(tmp_path / "loc1") == files_of(tmp_path / "loc2")
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out2")
    assert (tmp_path / "out1" / "model-00001-of-00002.safetensors").read_bytes() != (
        tmp_path / "base" / "model-00001-of-00002.safetensors"
    ).read_bytes()


def test_an_error_in_one_process_ends_all(tmp_path: Path, refs: list[object]) -> None:
    base = random_state(0, torch.bfloat16, SHAPES)
    broken = finetune(base, 3)
    broken["layers.8.w"][0, 0] = float("nan")
    save(tmp_path / "broken", broken)
    done = launch(2, tmp_path, "--base", "./base", "--ft", "./broken", "--out", "out")
    assert done.returncode != 0
    assert done.stderr.count("layers.8.w in broken/model.safetensors holds NaN") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_nodes_that_share_no_folder(tmp_path: Path, refs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told before the work, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work_dir, "SEEN_WITHIN", 0.3)
    recipe = make_recipe({"base": refs[1], "finetuned": refs[3:]})
    nodes = [tmp_path / f"node{rank}" for rank in range(2)]
    for node in nodes:
        node.mkdir()
    errors = in_ranks(
        2, lambda ranks: make(make_plan(recipe, Settings()), nodes[ranks.rank] / "out", Progress(False), ranks)
    )
    for error in errors:
        assert isinstance(error, RequestError) and "does not see" in str(error)
        assert "folder that they share" in str(error)
    assert not list(tmp_path.glob("node*/*out*"))


def test_processes_of_a_machine_share_the_download_out(
    tmp_path: Path, refs: list[object], home_hub: LoopbackHub, hub_cache: Path
) -> None:
    """Each fetches other files, and together they have all."""
    repos = []
    for name in ("base", "ft0", "ft1"):
        repos.append(f"demo/{uuid4().hex[:8]}-{name}")
        home_hub.add_repo(repos[-1], {path.name: path for path in (tmp_path / name).iterdir()})
    plan = make_plan(make_recipe({"base": repos[0], "finetuned": repos[1:]}), Settings())
    files = {(name, file) for name, listed in plan.needed.items() for file in listed}
    here: set[tuple[str, str]] = set()
    for rank in range(2):
        noted: list[tuple[str, str]] = []
        with (
            InputHashes(plan.inputs) as hashes,
            Inputs(plan, Progress(False), tmp_path, noted.extend, hashes, Processes(), streamed=False) as inputs,
        ):
            inputs.fetch_share(rank, 2)
        now = {(name, file) for name, file in files if plan.inputs[name].source.cached(file)}
        assert set(noted) == now - here and set(noted)
        here = now
    assert here == files
