"""DARE: which entries it keeps, however tensors are cut and work is shared out, and what it makes of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import yaml
from helpers.models import State, finetune, load, random_state, same_bits, save
from helpers.ranks import merge_in_ranks
from helpers.rivals import elect
from helpers.runs import files_of, merged
from hypothesis import given
from hypothesis import strategies as st

from hf_locstitch.cli.main import main
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.stitch.method import Place
from hf_locstitch.stitch.methods.dare import Dare

LARGE = {f"layers.{i}.w": (100, 200) for i in range(10)}


def models(shapes: dict[str, tuple[int, ...]] | None = None) -> tuple[State, list[State]]:
    base = random_state(0, shapes=shapes) if shapes else random_state(0)
    return base, [finetune(base, seed) for seed in range(3)]


def reference(base: State, finetuned: list[State], density: float, seed: int, scale: float = 1.0) -> State:
    """base + scale · Σ kept · τ / density; one draw over a whole tensor tells what is kept of it."""
    result = {}
    for name, start in base.items():
        total = torch.zeros(start.shape, dtype=torch.float64)
        for number, state in enumerate(finetuned):
            bits = np.random.PCG64([seed, number, crc32(name.encode())])
            kept = torch.from_numpy(np.random.Generator(bits).random(start.numel()) < density).view(start.shape)
            total += torch.where(kept, state[name].double() - start.double(), 0.0)
        result[name] = (start.double() + scale * total / density).to(start.dtype)
    return result


@pytest.mark.parametrize(("density", "seed", "scale"), [(0.3, 0, 1.0), (0.9, 7, 0.5)])
def test_equals_the_reference(tmp_path: Path, density: float, seed: int, scale: float) -> None:
    base, finetuned = models()
    method = {"name": "dare", "density": density, "seed": seed}
    found = load(merged(tmp_path, base, finetuned, method=method, scale=scale))
    due = reference(base, finetuned, density, seed, scale)
    assert found.keys() == due.keys()
    for name, values in due.items():
        torch.testing.assert_close(found[name], values, rtol=2e-7, atol=1e-7)


@given(st.integers(0, 300), st.lists(st.integers(0, 300), max_size=4), st.integers(0, 5), st.integers(0, 3))
def test_what_is_kept_does_not_depend_on_where_a_tensor_is_cut(
    count: int, cuts: list[int], seed: int, model: int
) -> None:
    dare = Dare(density=0.4, seed=seed)
    whole = dare.kept(Place("layers.0.w", 0), model, count)
    ends = sorted({0, count, *(min(cut, count) for cut in cuts)})
    parts = [dare.kept(Place("layers.0.w", first), model, last - first) for first, last in pairwise(ends)]
    assert np.concatenate([*parts, np.zeros(0, dtype=bool)]).tolist() == whole.tolist()


def test_what_is_kept_depends_on_seed_model_and_tensor() -> None:
    """About half of two independent draws at density 0.5 agree."""
    one = Dare(density=0.5).kept(Place("layers.0.w", 0), 0, 10_000)
    others = [
        Dare(density=0.5, seed=1).kept(Place("layers.0.w", 0), 0, 10_000),
        Dare(density=0.5).kept(Place("layers.0.w", 0), 1, 10_000),
        Dare(density=0.5).kept(Place("layers.1.w", 0), 0, 10_000),
    ]
    assert [float((one == other).mean()) for other in others] == pytest.approx([0.5] * 3, abs=0.02)
    assert np.array_equal(one, Dare(density=0.5).kept(Place("layers.0.w", 0), 0, 10_000))


@pytest.mark.parametrize("settings", [Settings(chunk=1, workers=1), Settings(chunk=7, workers=3), Settings(chunk=1000)])
def test_chunks_change_no_byte(tmp_path: Path, settings: Settings) -> None:
    base, finetuned = models()
    method = {"name": "dare", "density": 0.3, "seed": 5}
    expected = merged(tmp_path / "a", base, finetuned, method=method)
    assert files_of(merged(tmp_path / "b", base, finetuned, settings, method=method)) == files_of(expected)


def test_processes_change_no_byte(tmp_path: Path) -> None:
    base, finetuned = models(LARGE)
    folders = [str(save(tmp_path / f"ft{number}", state)) for number, state in enumerate(finetuned)]
    method = {"name": "dare", "density": 0.3}
    fields = {"base": str(save(tmp_path / "base", base)), "finetuned": folders, "method": method}
    for count in (1, 2):
        merge_in_ranks(count, tmp_path / f"out{count}", fields)
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out2")


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_mean_is_that_of_task_arithmetic(tmp_path: Path, density: float) -> None:
    """Rescaling makes up for what is dropped: 200,000 entries of 1 add up to themselves, to within four deviations."""
    base = {name: torch.zeros(shape) for name, shape in LARGE.items()}
    ones = {name: torch.ones(shape) for name, shape in LARGE.items()}
    result = load(merged(tmp_path, base, [ones], method={"name": "dare", "density": density}))
    values = torch.cat([tensor.flatten() for tensor in result.values()])
    assert {round(value, 4) for value in values.unique().tolist()} == {0.0, 1 / density}
    deviation = ((1 - density) / density / len(values)) ** 0.5
    assert float(values.mean()) == pytest.approx(1.0, abs=4 * deviation)
    assert 4 * deviation < 0.03


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_density_one_is_task_arithmetic(tmp_path: Path, scale: float) -> None:
    base, finetuned = models()
    dare = load(merged(tmp_path / "dare", base, finetuned, method={"name": "dare", "density": 1.0}, scale=scale))
    assert same_bits(dare, load(merged(tmp_path / "plain", base, finetuned, method="task-arithmetic", scale=scale)))


def test_seeds_differ(tmp_path: Path) -> None:
    base, finetuned = models()
    first, again, other = (
        load(merged(tmp_path / name, base, finetuned, method={"name": "dare", "density": 0.5, "seed": seed}))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert same_bits(first, again)
    assert all(not torch.equal(first[name], other[name]) for name in base)


def test_the_flag_sets_the_methods_own_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, finetuned = models()
    expected = merged(tmp_path, base, finetuned, method={"name": "dare", "density": 0.3})
    monkeypatch.chdir(tmp_path)
    asked = ["--base", "./base", "--ft", "./ft0", "./ft1", "./ft2", "--method", "dare", "--density", "0.3"]
    assert main(["merge", *asked, "--out", "out", "--no-figures", "--quiet"]) == 0
    assert same_bits(load(Path("out")), load(expected))
    pinned = yaml.safe_load(Path("out/locstitch.yaml").read_text())
    assert pinned["method"] == {"name": "dare", "density": 0.3, "seed": 0} and "localizer" not in pinned
    record = json.loads(Path("out/locstitch.json").read_text())
    assert record["method"] == "dare" and record["masks"] == {} and record["localizer"] is None
    assert "DARE (density 0.3, seed 0)" in Path("out/README.md").read_text()
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet"]) == 0
    assert files_of(Path("again")) == files_of(Path("out"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"seed": -1}, "seed"),
        ({"densty": 0.5}, "did you mean 'density'"),
    ],
)
def test_what_it_cannot_be_told(settings: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_recipe({"base": "a/b", "finetuned": ["c/d"], "method": {"name": "dare", **settings}})


WEIGHTS = [0.7, 0.5, -0.2]


@pytest.mark.parametrize(("rescale", "normalize"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["dare-linear", "dare-ties"])
def test_linear_and_ties(tmp_path: Path, name: str, rescale: bool, normalize: bool) -> None:
    base, finetuned = models()
    method = {"name": name, "density": 0.6, "seed": 3, "rescale": rescale, "normalize": normalize}
    found = load(merged(tmp_path, base, finetuned, method=method, weights=WEIGHTS, scale=0.8))
    weights = torch.tensor(WEIGHTS).double()
    for tensor, start in base.items():
        alone = [reference(base, [state], 1.0, 3)[tensor].double() - start.double() for state in finetuned]
        kept = []
        for number, vector in enumerate(alone):
            drawn = np.random.Generator(np.random.PCG64([3, number, crc32(tensor.encode())])).random(start.numel())
            kept.append(vector * torch.from_numpy(drawn < 0.6).view(start.shape) / (0.6 if rescale else 1))
        weighted = torch.einsum("m,m...->m...", weights, torch.stack(kept))
        if name == "dare-ties":
            change = elect(weighted, weights, normalize)
        else:
            change = weighted.sum(0) / (weights.sum() if normalize else 1)
        due = (start.double() + 0.8 * change).float()
        torch.testing.assert_close(found[tensor], due, rtol=3e-7, atol=1e-7)


def test_linear_is_dare_unless_told_otherwise(tmp_path: Path) -> None:
    base, finetuned = models()
    one, other = (load(merged(tmp_path / name, base, finetuned, method=name)) for name in ("dare", "dare-linear"))
    assert same_bits(one, other)
