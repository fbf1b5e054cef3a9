"""Finetunes that are given twice, or are the base, or another base's: said by the plan, and where it could not be known
then, by the merge."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from helpers import vocabularies
from helpers.fp8 import fp8_config, quantized
from helpers.models import State, finetune, load, random_state, save
from helpers.runs import quick_localize, quick_merge, quick_stitch
from helpers.streaming import empty_cache, served
from safetensors.torch import save_file

from hf_locstitch import plan_merge
from hf_locstitch.checkpoints.sample import sample_pieces
from hf_locstitch.cli.main import main
from hf_locstitch.errors import NonFiniteError, StrictError, WorkError
from hf_locstitch.plan.describe import format_plan, plan_json
from hf_locstitch.plan.plans import ModelPlan
from loopback_hub import LoopbackHub

SHAPES = {"embed.w": (30, 40)} | {f"model.layers.{i}.w": (60, 40) for i in range(3)}


@pytest.fixture
def states() -> dict[str, State]:
    base = random_state(0, torch.bfloat16, SHAPES)
    return {
        "base": base,
        "a": finetune(base, 1),
        "b": finetune(base, 2),
        "stranger": random_state(5, torch.bfloat16, SHAPES),
    }


@pytest.fixture
def folders(states: dict[str, State], tmp_path: Path) -> dict[str, str]:
    return {name: str(save(tmp_path / name, state)) for name, state in states.items()}


def warnings_of(base: str, *finetuned: str, **fields: Any) -> list[str]:
    entries = [{"ref": ref, "name": f"ft{number}"} for number, ref in enumerate(finetuned)]
    return list(plan_merge({"base": base, "finetuned": entries, **fields}).warnings)


def test_a_finetune_of_nothing_but_nan(states: dict[str, State], folders: dict[str, str], tmp_path: Path) -> None:
    """Not one that is the base."""
    broken = save(tmp_path / "broken", {name: torch.full_like(value, torch.nan) for name, value in states["a"].items()})
    request = {"base": folders["base"], "finetuned": [str(broken)]}
    (warning,) = plan_merge(request).warnings
    assert warning.startswith("broken has NaN or infinity where a sample of its weights was read")
    assert "no weight of a sample is a finite number" in format_plan(plan_merge(request))
    with pytest.raises(NonFiniteError, match=r"model\.layers\.\d\.w in .* holds NaN"):
        quick_merge(folders["base"], broken, out=tmp_path / "out")


def test_methods_of_models_may_have_the_base_among_them(folders: dict[str, str]) -> None:
    assert warnings_of(folders["base"], folders["base"], folders["a"], method="slerp") == []
    (twice,) = warnings_of(folders["base"], folders["base"], folders["a"], folders["a"], method="average")
    assert "ft1 and ft2 are the same weights" in twice


def test_the_same_folder_twice_and_the_base_itself(folders: dict[str, str], tmp_path: Path) -> None:
    twice, zero = warnings_of(folders["base"], folders["a"], folders["b"], folders["a"], folders["base"])
    assert "ft0 and ft2 are the same weights" in zero and "ft3 has the very weights of the base" in twice
    shutil.copytree(folders["base"], tmp_path / "copy")
    (warning,) = warnings_of(folders["base"], str(tmp_path / "copy"), folders["a"])
    assert warning.startswith("ft0 does not differ from the base in any weight of a sample")


@pytest.mark.parametrize("name", ["model.layers.20.w", "model.layers.20.norm"])
def test_a_change_that_a_small_sample_misses(tmp_path: Path, name: str) -> None:
    """Of 80 tensors one has changed."""
    shapes = {f"model.layers.{i}.w": (4, 4) for i in range(40)} | {f"model.layers.{i}.norm": (4,) for i in range(40)}
    base = random_state(0, torch.bfloat16, shapes)
    tuned = {key: value.clone() for key, value in base.items()}
    tuned[name] += 1
    refs = [str(save(tmp_path / key, state)) for key, state in (("few", base), ("tuned", tuned))]
    assert warnings_of(*refs) == []


def test_another_base(folders: dict[str, str]) -> None:
    (warning,) = warnings_of(folders["base"], folders["a"], folders["stranger"])
    assert warning.startswith("ft1 looks as if it was not finetuned from this base: ‖τ‖ is 1.4 of ‖θ‖")


def test_what_the_plan_shows(folders: dict[str, str]) -> None:
    plan = plan_merge({"base": folders["base"], "finetuned": [folders["a"]]})
    assert "lineage    a  ‖τ‖ is 0.1 of ‖θ‖, " in format_plan(plan)
    assert json.loads(json.dumps(plan_json(plan)))["lineage"]["a"]["sampled"] == 3 * 60 * 40


def on_the_hub(hub: LoopbackHub, folders: dict[str, str]) -> dict[str, str]:
    hub_id, repos = uuid4().hex[:8], {}
    for name, folder in folders.items():
        repos[name] = f"demo/{hub_id}-{name}"
        hub.add_repo(repos[name], {path.name: path for path in Path(folder).iterdir()})
    return repos


def test_hashes_of_the_hub(folders: dict[str, str], home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path) -> None:
    """Other repos with the same files are known without reading a byte of them."""
    copies = {"copy": str(shutil.copytree(folders["a"], tmp_path / "copy")), **folders}
    repos = on_the_hub(home_hub, {**copies, "fork": folders["base"]})
    same, zero = sorted(warnings_of(repos["base"], repos["a"], repos["copy"], repos["fork"]))
    assert "ft0 and ft1 are the same weights" in same and "ft2 has the very weights of the base" in zero


def test_a_sample_of_large_models_only(
    folders: dict[str, str], home_hub: LoopbackHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the Hub a sample is fetched where it is a small part; what is small is looked at when it is here."""
    repos = on_the_hub(home_hub, folders)
    asked = repos["base"], repos["a"], repos["stranger"]
    assert warnings_of(*asked) == []
    with monkeypatch.context() as patched:
        patched.setattr("hf_locstitch.checkpoints.sample.SHARE", 8)
        patched.setattr("hf_locstitch.plan.lineage.sample_pieces", partial(sample_pieces, elements=300))
        empty_cache()
        patched.setattr("hf_locstitch.checkpoints.checkpoint.FIRST_READ", 8)
        home_hub.requests.clear()
        (warning,) = warnings_of(*asked)
        assert "ft1 looks as if" in warning
        assert served(home_hub, repos["stranger"])["model.safetensors"] < 1500  # its header, and 600 bytes of weights
    empty_cache()
    done = quick_merge(asked[0], asked[1:], names=["ft0", "ft1"], out=tmp_path / "out")
    assert [warning for warning in done.manifest.warnings if "ft1 looks as if" in warning]
    assert "looks as if it was not finetuned" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(StrictError, match="ft1 looks as if"):  # now that it is here
        quick_merge(asked[0], asked[1:], names=["ft0", "ft1"], out=tmp_path / "strict", strict=True)
    empty_cache()
    with pytest.raises(WorkError, match="strict makes errors of warnings: ft1 looks as if"):
        quick_merge(asked[0], asked[1:], names=["ft0", "ft1"], out=tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
    assert quick_merge(asked[0], asked[1:], names=["ft0", "ft1"], out=tmp_path / "strict").out is not None


def test_strict(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["merge", "--base", folders["base"], "--ft", folders["a"], folders["a"], folders["stranger"], "--names"]
    assert main([*command, "x", "y", "z", "--out", str(out), "--strict"]) == 2
    said = capsys.readouterr().err
    assert "there are 2:\n  - x and y are the same weights" in said and "\n  - z looks as if" in said
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"base": folders["base"], "finetuned": [folders["stranger"]], "strict": True}))
    with pytest.raises(StrictError, match="there is 1"):
        plan_merge(recipe)
    with pytest.raises(StrictError):
        quick_localize(folders["base"], folders["stranger"], out=out, strict=True)
    done = quick_merge(folders["base"], [folders["a"], folders["b"]], out=out, strict=True)
    assert done.manifest.warnings == [] and "strict" not in (out / "locstitch.yaml").read_text()


def test_strict_stitch(folders: dict[str, str], tmp_path: Path) -> None:
    for name, density in (("a1", 0.1), ("a2", 0.2)):
        quick_localize(folders["base"], folders["a"], name=name, out=tmp_path / name, localizer={"density": density})
    localized = [tmp_path / "a1", tmp_path / "a2"]
    with pytest.raises(StrictError, match="a1 and a2 are the same weights"):
        quick_stitch(folders["base"], localized, out=tmp_path / "out", strict=True)
    assert len(quick_stitch(folders["base"], localized, out=tmp_path / "out").manifest.warnings) == 1


def test_one_task_vector_much_longer_than_the_others(tmp_path: Path) -> None:
    base = random_state(0)
    steps = {"a": 0.01, "b": 0.02, "long": 0.11}
    refs = [
        str(save(tmp_path / name, finetune(base, number, step))) for number, (name, step) in enumerate(steps.items())
    ]
    start = str(save(tmp_path / "base", base))
    (said,) = warnings_of(start, *refs)
    assert said.startswith("the task vector of ft2 is 7 times as long as those of the others: it outvotes them")
    assert not warnings_of(start, *refs[:2])


@pytest.mark.parametrize("asked", [{"method": "average"}, {"method": "ties"}, {"embeddings": "localize"}], ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_rows_that_are_matched_by_tokens(tmp_path: Path, asked: dict[str, str], fp8: bool) -> None:
    """They lie elsewhere in each file: what is said is what all other tensors tell."""
    given = vocabularies.family(tmp_path, tied=False)
    if fp8:
        config = json.loads((given["base"] / "config.json").read_text())
        save_file(quantized(load(given["base"])), given["base"] / "model.safetensors")
        (given["base"] / "config.json").write_text(fp8_config(**config))
    request = {"base": str(given["base"]), "finetuned": [str(given["math"]), str(given["chat"])]}
    plan = plan_merge({**request, **asked})
    assert isinstance(plan, ModelPlan) and plan.aligned is not None
    options = {key: value for key, value in asked.items() if key == "method"}
    plain = plan_merge({**request, **options, "embeddings": "base"})
    assert plan.lineage.keys() == plain.lineage.keys() == {"math", "chat"}
    assert plan.lineage == plain.lineage
    assert not [one for one in plan.warnings if "looks as if" in one or "not compared" in one]


def test_what_cannot_be_compared_ends_no_merge(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_locstitch.plan.lineage.lineage", lambda *_: 1 / 0)
    (warning,) = warnings_of(folders["base"], folders["a"])
    assert warning.startswith("the finetunes were not compared with the base and one another (ZeroDivisionError")
