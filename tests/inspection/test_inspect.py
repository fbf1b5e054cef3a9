"""`inspect`: what it says of a merge, and what it finds odd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from helpers.models import State, finetune, save
from helpers.runs import quick_merge

from hf_locstitch import Magnitude, inspect, load_mask, merge_from_hub
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, IntegrityError, OutputError
from loopback_hub import LoopbackHub

Make = Callable[..., Path]


@pytest.fixture
def make(base: State, tmp_path: Path) -> Make:
    """A merge of these finetunes, in a folder."""

    def make(states: Mapping[str, State], density: float = 0.3, figures: bool = False) -> Path:
        folders = [save(tmp_path / name, state) for name, state in states.items()]
        merge_from_hub(
            tmp_path / "base", folders, out=tmp_path / "out", localizer=Magnitude(density=density), figures=figures
        )
        return tmp_path / "out"

    return make


def test_what_it_says(make: Make, base: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = make({"maths": finetune(base, 1), "code": finetune(base, 2)}, figures=True)
    assert main(["inspect", str(out), "--json", "--figures", str(tmp_path / "drawn")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["k"] == 46 and found["N"] == 156 and [mask["name"] for mask in found["masks"]] == ["maths", "code"]
    mask = load_mask(out, "maths")
    ones = {tensor: int(kept.sum()) for tensor, kept in mask.items()}
    densest, share = found["masks"][0]["densest"][0]
    assert ones[densest] == max(ones.values()) and share == pytest.approx(max(ones.values()) / 46)
    assert found["layers"]["maths"]["0"] == pytest.approx(sum(n for t, n in ones.items() if ".layers.0." in t) / 46)
    assert sum(found["kinds"]["code"].values()) == pytest.approx(1)
    assert found["masks"][0]["norm"] == pytest.approx(
        sum(float(((finetune(base, 1)[t] - base[t]) ** 2).sum()) for t in mask) ** 0.5, rel=1e-4
    )
    assert found["signs"] == [] and {Path(figure).name for figure in found["figures"]} == {
        "overlap.png", "places.png", "layers.png", "task-vectors.png", "masks.html",
    }  # fmt: skip
    assert all(Path(figure).stat().st_size for figure in found["figures"])

    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "maths: 46 ones, density 29.49 % (requested 30 %)" in said and "no anomalies" in said


def test_a_merge_on_the_hub_takes_its_small_files_alone(
    home_hub: LoopbackHub, hub_cache: Path, make: Make, base: State
) -> None:
    out = make({"maths": finetune(base, 1)})
    repo = f"demo/{uuid4().hex[:12]}"
    home_hub.add_repo(repo, {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()})
    home_hub.requests.clear()
    found = inspect(repo)
    assert found.masks[0].ones == 46 and found.masks[0].norm is None  # nothing was noted, nothing is fetched
    assert not any("model.safetensors" in request.path for request in home_hub.requests)


def test_inputs_are_sampled_when_asked_for(make: Make, base: State, tmp_path: Path) -> None:
    out = make({"maths": finetune(base, 1), "code": finetune(base, 2, step=0.2)})
    found = inspect(out, base=tmp_path / "base", finetuned=[tmp_path / "maths", tmp_path / "code"])
    one, other = found.masks
    assert one.norm is not None and other.norm is not None and other.norm == pytest.approx(2 * one.norm, rel=0.2)
    with pytest.raises(CheckpointError, match="--base REF"):
        inspect(out, inputs=True)  # they are not in the working directory


def signs(out: Path, tmp_path: Path, *names: str) -> str:
    return "\n".join(inspect(out, base=tmp_path / "base", finetuned=[tmp_path / name for name in names]).signs)


def test_odd_signs(make: Make, base: State, tmp_path: Path) -> None:
    """One that moves in one small tensor alone, and far; one that hardly moves; a copy of that one."""
    far = {**base, "model.layers.1.norm.weight": base["model.layers.1.norm.weight"] + 40}
    near = finetune(base, 1, step=0.01)
    out = make({"far": far, "near": near, "twin": near}, density=0.03)
    said = signs(out, tmp_path, "far", "near", "twin")
    assert "100 % of the ones in the mask of far lie in model.layers.1.norm.weight, which has only 3.8 % of" in said
    assert "the masks of near and twin are nearly identical (Jaccard 1.000)" in said
    assert "the task vector of far has norm 98" in said and "it may have been finetuned from another model" in said
    assert "the mask of near" not in said and "near is" not in said


def test_masks_that_are_smaller_than_asked(make: Make, base: State, tmp_path: Path) -> None:
    few = {name: value.clone() for name, value in base.items()}
    few["model.layers.0.self_attn.q_proj.weight"][:2] += torch.full((2, 6), 0.5)
    said = signs(make({"few": few}, density=0.5), tmp_path, "few")
    assert "few changed 7.7 % of the weights, less than the 50 % requested: its mask keeps only those" in said


def test_ties(make: Make, base: State, tmp_path: Path) -> None:
    """All weights move by one half, exactly."""
    even = {name: torch.ones_like(value) for name, value in base.items()}
    save_over(tmp_path / "base", even)
    step = {name: value + 0.5 for name, value in even.items()}
    said = signs(make({"step": step}, density=0.1), tmp_path, "step")
    assert "100 % of the weights of step changed by exactly 0.5, the smallest change that its mask of 9.6 %" in said


def save_over(folder: Path, state: State) -> None:
    shutil.rmtree(folder)
    save(folder, state)


def test_a_dense_merge_has_no_masks(base: State, tmp_path: Path) -> None:
    save(tmp_path / "ft", finetune(base, 1))
    quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "out", method="average", localizer=None)  # type: ignore[arg-type]
    found = inspect(tmp_path / "out", figures=tmp_path / "figures")
    assert found.masks == () and found.figures == () and "masks      none" in found.describe()


def test_what_is_no_merge(base: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was not made by hf-locstitch"):
        inspect(tmp_path / "base")


def test_figures_where_no_folder_can_be(make: Make, base: State, tmp_path: Path) -> None:
    out = make({"maths": finetune(base, 1)})
    with pytest.raises(OutputError, match=r"README\.md is no folder that can be written to"):
        inspect(out, figures=out / "README.md")


def test_json_is_harmless_on_a_terminal(
    make: Make, base: State, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = make({"maths": finetune(base, 1)})
    record = json.loads((out / "locstitch.json").read_text())
    record["warnings"] = ["\x9b31m\u202e\x7f"]
    (out / "locstitch.json").write_text(json.dumps(record))
    assert main(["inspect", str(out), "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable() and json.loads(shown)["warnings"] == record["warnings"]


def test_damaged_and_missing_masks(make: Make, base: State) -> None:
    out = make({"maths": finetune(base, 1)})
    mask = out / "masks" / "maths.safetensors"
    content = mask.read_bytes()
    mask.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    with pytest.raises(IntegrityError, match="is damaged"):
        inspect(out)
    mask.unlink()
    with pytest.raises(CheckpointError, match="lacks masks/maths"):
        inspect(out)
