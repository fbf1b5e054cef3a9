"""Weights of finetunes: by name or in order, by globs of tensors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.models import State, finetune, load, random_state, same_bits
from helpers.reference import reference_masks
from helpers.runs import merge_folders, merged

from hf_locstitch.cli.main import main
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.describe import format_plan, plan_json
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.task_vectors import agreeing_mean

WEIGHTS = (0.7, 0.3, -0.4)
BY_NAME = {"ft0": 0.7, "ft1": {"*.layers.*": 0.3, "lm_head.*": 2}, "ft2": -0.4}


def models() -> tuple[State, list[State]]:
    base = random_state(0)
    return base, [finetune(base, seed) for seed in range(3)]


def vectors(base: State, finetuned: list[State], name: str) -> torch.Tensor:
    return torch.stack([state[name].double() - base[name].double() for state in finetuned])


def close(found: State, due: State) -> bool:
    return all(torch.allclose(found[name], due[name].float(), rtol=3e-7, atol=1e-7) for name in found)


def weights_in(name: str) -> tuple[float, float, float]:
    """Those of BY_NAME."""
    return 0.7, 0.3 if ".layers." in name else 2.0 if name.startswith("lm_head.") else 1.0, -0.4


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [WEIGHTS, BY_NAME])
def test_task_arithmetic(tmp_path: Path, weights: Any, normalize: bool) -> None:
    base, finetuned = models()
    method = {"name": "task-arithmetic", "normalize": normalize}
    found = load(merged(tmp_path, base, finetuned, method=method, weights=weights, scale=0.5))
    due = {}
    for name, start in base.items():
        own = torch.tensor(weights_in(name) if weights is BY_NAME else WEIGHTS, dtype=torch.float64)
        total = torch.einsum("m,m...->...", own, vectors(base, finetuned, name))
        due[name] = start.double() + 0.5 * total / (own.sum() if normalize else 1)
    assert close(found, due)


@pytest.mark.parametrize("normalize", [False, True])
def test_average(tmp_path: Path, normalize: bool) -> None:
    base, finetuned = models()
    method = {"name": "average", "normalize": normalize}
    found = load(merged(tmp_path, base, finetuned, method=method, weights=[2, 1, 1]))
    total = {name: 2 * finetuned[0][name] + finetuned[1][name] + finetuned[2][name] for name in base}
    assert close(found, {name: value / (4 if normalize else 1) for name, value in total.items()})


@pytest.mark.parametrize("normalize", [False, True])
def test_ties(tmp_path: Path, normalize: bool) -> None:
    """The election is one of the weighted task vectors, and the mean is weighted, too."""
    base, finetuned = models()
    masks = [reference_masks(base, state, list(base), "0.5") for state in finetuned]
    weights = torch.tensor(WEIGHTS).double()
    method = {"name": "ties", "normalize": normalize}
    found = load(merged(tmp_path, base, finetuned, method=method, weights=WEIGHTS, localizer={"density": 0.5}))
    due = {}
    for name, start in base.items():
        kept = torch.stack([mask[name] for mask in masks])
        weighted = torch.einsum("m,m...->m...", weights, vectors(base, finetuned, name) * kept)
        agrees = (weighted.sign() == weighted.sum(0).sign()) & (weighted.sum(0) != 0)
        total = torch.einsum("m,m...->...", weights, agrees.double())
        update = (weighted * agrees).sum(0)
        due[name] = start.double() + (update / torch.where(total == 0, 1.0, total) if normalize else update)
    assert close(found, due)


@pytest.mark.parametrize(
    "method", [n for n in METHODS.names() if METHODS.find(n).weighted and not METHODS.find(n).needs_data]
)
def test_weights_of_one_are_no_weights_and_the_order_does_not_matter(tmp_path: Path, method: str) -> None:
    base, finetuned = models()
    plain = load(merged(tmp_path, base, finetuned, method=method))
    entries = [{"ref": str(tmp_path / f"ft{i}"), "name": f"ft{i}"} for i in range(3)]
    assert same_bits(load(merge_folders(tmp_path, entries, method=method, weights=[1, 1, 1])), plain)
    one = load(merge_folders(tmp_path, entries, method=method, weights=WEIGHTS))
    turned = [entries[i] for i in (2, 0, 1)]
    assert same_bits(load(merge_folders(tmp_path, turned, method=method, weights=[-0.4, 0.7, 0.3])), one)
    assert not same_bits(one, plain)


def test_the_flag_the_plan_the_card_and_the_pinned_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, finetuned = models()
    expected = merged(tmp_path, base, finetuned, method="task-arithmetic", weights=WEIGHTS)
    monkeypatch.chdir(tmp_path)
    asked = ["--base", "./base", "--ft", "./ft0", "./ft1", "./ft2", "--method", "task-arithmetic"]
    assert main(["merge", *asked, "--weights", "0.7", "0.3", "-0.4", "--out", "out", "--no-figures", "--quiet"]) == 0
    assert same_bits(load(Path("out")), load(expected))
    assert yaml.safe_load(Path("out/locstitch.yaml").read_text())["weights"] == list(WEIGHTS)
    assert "ft0 0.7; ft1 0.3; ft2 -0.4" in Path("out/README.md").read_text()
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet"]) == 0
    assert same_bits(load(Path("again")), load(expected))
    entries = [{"ref": f"./ft{i}"} for i in range(3)]
    plan = make_plan(make_recipe({"base": "./base", "finetuned": entries, "method": "average", "weights": BY_NAME}))
    assert "ft0 0.7; ft1 0.3 in *.layers.*, 2 in lm_head.*; ft2 -0.4" in format_plan(plan)
    assert json.loads(json.dumps(plan_json(plan)))["weights"] == BY_NAME


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "locstitch"}, "locstitch takes no weights"),
        ({"method": "slerp", "finetuned": ["./ft0", "./ft1"]}, "slerp takes no weights"),
        ({"weights": [1, 2]}, "expected 3, got 2"),
        ({"weights": [1, 2, float("nan")]}, "finite"),
        ({"weights": {"ft0": {"*": float("inf")}}}, "finite"),
        ({"weights": {"ft4": 1}}, r"a weight is given for 'ft4', which is not one of the finetunes \(ft0, ft1, ft2\)"),
    ],
)
def test_what_is_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: Any, said: str) -> None:
    base, finetuned = models()
    merged(tmp_path, base, finetuned, method="average")
    monkeypatch.chdir(tmp_path)
    asked = {"base": "./base", "finetuned": ["./ft0", "./ft1", "./ft2"], "method": "average", "weights": WEIGHTS}
    with pytest.raises(RecipeError, match=said):
        make_plan(make_recipe({**asked, **fields}))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"ft1": {"*.layer.0.*": 2}}, r"'\*.layer.0.\*' matches no tensor in what is merged \(weights.ft1\)"),
        ([1, -0.5, -0.5], "the finetunes in lm_head.weight add up to 0, and average divides by their sum"),
        ({"ft0": {"lm_head.*": -2}}, "the finetunes in lm_head.weight add up to 0"),
    ],
)
def test_weights_that_do_not_suit_the_models(tmp_path: Path, weights: Any, said: str) -> None:
    base, finetuned = models()
    with pytest.raises(RecipeError, match=said):
        merged(tmp_path, base, finetuned, method="average", weights=weights)
    assert not list(tmp_path.glob("out*"))


def test_what_is_advised_is_a_setting_of_the_method(tmp_path: Path) -> None:
    base, finetuned = models()
    for method, advice in (("average", "change one, or set normalize: false."), ("karcher", "change one.")):
        with pytest.raises(RecipeError) as refusal:
            merged(tmp_path / method, base, finetuned, method=method, weights=[1, -0.5, -0.5])
        assert str(refusal.value).endswith(advice)


def test_weights_that_cancel_but_for_rounding_are_divided_by_nowhere() -> None:
    """0.1 + 0.2 − 0.3 is not 0: where these three agree, the mean would be 10¹⁵ times as large."""
    vectors = [np.array([0.5]), np.array([0.4]), np.array([-0.3]), np.array([-0.001])]
    found = agreeing_mean(vectors, [0.1, 0.2, -0.3, 1.0], scale=1.0, normalize=True)
    assert found == pytest.approx(0.05 + 0.08 + 0.09)


@pytest.mark.parametrize("name", ["ties", "dare-ties", "della", "breadcrumbs"])
def test_elections_sum_the_weights_of_those_that_agree_only(tmp_path: Path, name: str) -> None:
    """All together may add up to 0, in a layer, too."""
    base, finetuned = models()
    method = {"name": name, "normalize": True} | ({"elect": True} if name in ("della", "breadcrumbs") else {})
    found = load(merged(tmp_path, base, finetuned, method=method, weights=[1, -1, {"lm_head.*": 0, "*": 2}]))
    assert all(value.isfinite().all() for value in found.values())
