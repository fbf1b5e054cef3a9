"""The rivals against plain transcriptions of their papers, in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.models import SHAPES, State, finetune, load, random_state, same_bits
from helpers.reference import reference_masks
from helpers.runs import merge_folders, merged, quick_merge

from hf_locstitch.errors import NonFiniteError, RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.stitch.methods import METHODS

NAMES = list(SHAPES)
WITHOUT_DATA = [name for name in METHODS.names() if not METHODS.find(name).needs_data]


def models(dtype: torch.dtype = torch.float32, count: int = 3) -> tuple[State, list[State]]:
    base = random_state(0, dtype)
    return base, [finetune(base, seed) for seed in range(count)]


def close(one: State, other: State) -> bool:
    """Equal but for the last bit: the transcriptions round in another order."""
    return one.keys() == other.keys() and all(
        torch.allclose(
            one[n].float(), other[n].float(), rtol=2e-7 if one[n].dtype == torch.float32 else 8e-3, atol=1e-7
        )
        for n in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average(tmp_path: Path, dtype: torch.dtype) -> None:
    base, finetuned = models(dtype)
    expected = {n: torch.stack([f[n].double() for f in finetuned]).mean(0).to(dtype) for n in NAMES}
    assert same_bits(load(merged(tmp_path, base, finetuned, method="average")), expected)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_task_arithmetic(tmp_path: Path, scale: float) -> None:
    base, finetuned = models()
    expected = {n: base[n] + scale * sum(f[n] - base[n] for f in finetuned) for n in NAMES}
    assert close(load(merged(tmp_path, base, finetuned, method="task-arithmetic", scale=scale)), expected)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_ties(tmp_path: Path, scope: str, scale: float) -> None:
    base, finetuned = models()
    masks = [reference_masks(base, f, NAMES, "0.2", scope) for f in finetuned]
    expected = {}
    for name in NAMES:
        trimmed = torch.stack([(f[name] - base[name]) * m[name] for f, m in zip(finetuned, masks, strict=True)])
        elected = trimmed.sum(0).sign()
        agreeing = (trimmed.sign() == elected) & (elected != 0)
        mean = (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
        expected[name] = base[name] + scale * mean
    out = merged(tmp_path, base, finetuned, method="ties", scale=scale, localizer={"scope": scope})
    assert close(load(out), expected)
    manifest = json.loads((out / "locstitch.json").read_text())
    assert manifest["localizer"] == {"method": "magnitude", "density": 0.2, "scope": scope}


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_order_and_chunks_do_not_matter(tmp_path: Path, method: str) -> None:
    kind = METHODS.find(method)
    base, finetuned = models(torch.bfloat16, count=kind.most or 3)
    one = load(merged(tmp_path / "a", base, finetuned, method=method))
    order = range(len(finetuned)) if kind.ordered else (*range(1, len(finetuned)), 0)
    entries = [{"ref": str(tmp_path / "a" / f"ft{i}"), "name": f"ft{i}"} for i in order]
    assert same_bits(load(merge_folders(tmp_path / "a", entries, Settings(11, 3), method=method)), one)


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_dense_methods_leave_no_masks(tmp_path: Path, method: str) -> None:
    base, finetuned = models()
    out = merged(tmp_path, base, finetuned, method=method)
    assert not (out / "masks").exists()
    manifest = json.loads((out / "locstitch.json").read_text())
    assert manifest["masks"] == {} and manifest["localizer"] is None
    card = (out / "README.md").read_text()
    assert METHODS.find(method).paper in card and "load_mask" not in card


def test_the_range_can_be_narrowed(tmp_path: Path) -> None:
    base, finetuned = models()
    result = load(merged(tmp_path, base, finetuned, method="average", include=["model.layers.1.*"]))
    for name in NAMES:
        assert torch.equal(result[name], base[name]) == ("layers.1." not in name)


@pytest.mark.parametrize("where", ["base", "ft1"])
def test_non_finite(tmp_path: Path, where: str) -> None:
    base, finetuned = models()
    (base if where == "base" else finetuned[1])["lm_head.weight"][3, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"lm_head.weight in .*{where}/model.safetensors"):
        merged(tmp_path, base, finetuned, method="task-arithmetic")
    assert not list(tmp_path.glob("out*"))


def test_what_suits_no_method() -> None:
    fields = {"base": "a/b", "finetuned": ["c/d"]}
    with pytest.raises(RecipeError, match="takes no localizer"):
        make_recipe({**fields, "method": "average", "localizer": {"density": 0.1}})
    with pytest.raises(RecipeError, match="did you mean 'task-arithmetic'"):
        make_recipe({**fields, "method": "task_arithmetic"})
    recipe = make_recipe({**fields, "method": "ties", "localizer": {"scope": "tensor"}})
    assert recipe.localizer is not None and (recipe.localizer.density, recipe.localizer.scope) == (0.2, "tensor")


def test_every_method_names_its_paper() -> None:
    for name in METHODS.names():
        method = METHODS.find(name)
        assert method.title and method.paper.startswith("https://arxiv.org/abs/")


@pytest.mark.parametrize("method", ["average", "ties"])
def test_any_method_from_python(tmp_path: Path, method: str) -> None:
    base, finetuned = models()
    expected = load(merged(tmp_path, base, finetuned, method=method))
    folders = [tmp_path / f"ft{i}" for i in range(len(finetuned))]
    quick_merge(tmp_path / "base", folders, out=tmp_path / "python", method=method)
    assert same_bits(load(tmp_path / "python"), expected)
