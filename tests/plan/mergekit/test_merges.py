"""Merges by configs of mergekit's, beside what mergekit computes: its formulas written again, in float64 and in memory.

benchmarks/parity.py compares with mergekit itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import State, finetune, load, random_state, save

from hf_locstitch.api import carry_out, plan_merge
from hf_locstitch.plan.mergekit.layers import layout_of
from hf_locstitch.plan.mergekit.translate import translate
from hf_locstitch.plan.recipe_file import load_recipe
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.stitch.per_tensor import value_for

NAMES = ("a", "b", "c")
LAYERS = 11  # of the models: 0, 1 and 10 have tensors
T = {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.3}]}

Models = dict[str, State]
Merge = Callable[[str, Models, Mapping[str, Any]], torch.Tensor]


def setting(value: Any, tensor: str) -> float:
    """The value of a parameter in a tensor, as mergekit's config.py and plan.py have it."""
    if isinstance(value, list) and isinstance(value[0], dict):
        value = next(one["value"] for one in value if one.get("filter", "") in tensor)
    if not isinstance(value, list):
        return value
    place = int(tensor.split(".")[2]) / (LAYERS - 1) * (len(value) - 1) if ".layers." in tensor else 0.0
    first = min(int(place), len(value) - 2)
    return value[first] + (place - first) * (value[first + 1] - value[first])


def own(config: Mapping[str, Any], name: str, tensor: str) -> list[float]:
    """A parameter of each model."""
    common = config.get("parameters", {})
    return [setting(one.get("parameters", common).get(name, common.get(name)), tensor) for one in config["models"]]


def task_vectors(tensor: str, models: Models) -> list[torch.Tensor]:
    return [models[name][tensor].double() - models["base"][tensor].double() for name in NAMES]


def linear(tensor: str, models: Models, config: Mapping[str, Any]) -> torch.Tensor:
    weights = own(config, "weight", tensor)
    total = sum(weight * models[name][tensor].double() for weight, name in zip(weights, NAMES, strict=True))
    return total / sum(weights)


def task_arithmetic(tensor: str, models: Models, config: Mapping[str, Any]) -> torch.Tensor:
    changes = zip(own(config, "weight", tensor), task_vectors(tensor, models), strict=True)
    return models["base"][tensor].double() + config["parameters"]["lambda"] * sum(w * change for w, change in changes)


def elected(changes: Sequence[torch.Tensor], weights: Sequence[float], normalize: bool) -> torch.Tensor:
    stacked = torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)])
    agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    shares = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * changes[0].dim()) * agrees
    divisor = torch.where(shares.sum(0) == 0, 1.0, shares.sum(0)) if normalize else 1.0
    return (stacked * agrees).sum(0) / divisor


def largest(change: torch.Tensor, kept: int, dropped: int = 0) -> torch.Tensor:
    order = change.abs().flatten().argsort(descending=True)[dropped : dropped + kept]
    return (
        torch.zeros(change.numel(), dtype=torch.float64).index_put((order,), change.flatten()[order]).view(change.shape)
    )


def ties(tensor: str, models: Models, config: Mapping[str, Any]) -> torch.Tensor:
    trimmed = [
        largest(change, int(density * change.numel()))
        for density, change in zip(own(config, "density", tensor), task_vectors(tensor, models), strict=True)
    ]
    return models["base"][tensor].double() + elected(trimmed, own(config, "weight", tensor), True)


def breadcrumbs_ties(tensor: str, models: Models, config: Mapping[str, Any]) -> torch.Tensor:
    thinned = []
    for change in task_vectors(tensor, models):
        kept = int(config["parameters"]["density"] * change.numel())
        outliers = min(int(config["parameters"]["gamma"] * change.numel()), change.numel() - kept)
        thinned.append(largest(change, kept, outliers))
    return models["base"][tensor].double() + elected(thinned, own(config, "weight", tensor), False)


def slerp(tensor: str, models: Models, config: Mapping[str, Any]) -> torch.Tensor:
    t = setting(config["parameters"]["t"], tensor)
    one, other = models["a"][tensor].double(), models["b"][tensor].double()
    cosine = (one * other).sum() / one.norm() / other.norm()
    if cosine.abs() > 0.9995:
        return (1 - t) * one + t * other
    angle = cosine.arccos()
    return ((angle * (1 - t)).sin() * one + (angle * t).sin() * other) / angle.sin()


def model_stock(tensor: str, models: Models, config: Mapping[str, Any]) -> torch.Tensor:
    changes = [change.flatten() for change in task_vectors(tensor, models)]
    pairs = [(changes[i], changes[j]) for i in range(3) for j in range(i + 1, 3)]
    cosine = sum(torch.dot(one, other) / one.norm() / other.norm() for one, other in pairs) / 3
    t = 3 * cosine / (1 + 2 * cosine)
    mean = sum(models[name][tensor].double() for name in NAMES) / 3
    return t * mean + (1 - t) * models["base"][tensor].double()


def models_with(*parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": dict(own)} for name, own in zip(NAMES, parameters, strict=True)]


LISTED = [{"model": name} for name in NAMES]
CASES: Mapping[str, tuple[Merge, dict[str, Any]]] = {
    "linear": (linear, {"models": models_with({"weight": 0.2}, {"weight": [0, 1]}, {"weight": 0.5})}),
    "task_arithmetic": (
        task_arithmetic,
        {
            "base_model": "base",
            "models": models_with({"weight": 1}, {"weight": T["t"]}, {"weight": -0.2}),
            "parameters": {"lambda": 0.7},
        },
    ),
    "ties": (
        ties,
        {"base_model": "base", "models": models_with(*[{"weight": w, "density": 0.4} for w in (1, 0.5, 2)])},
    ),
    "ties, densities": (
        ties,
        {
            "base_model": "base",
            "models": models_with(*[{"weight": 0.7, "density": d} for d in (0.4, [1, 0.2], 0.8)]),
        },
    ),
    "breadcrumbs_ties": (
        breadcrumbs_ties,
        {
            "base_model": "base",
            "models": LISTED,
            "parameters": {"weight": 0.6, "density": 0.5, "gamma": 0.2},
        },
    ),
    "slerp": (slerp, {"base_model": "a", "models": [{"model": "b"}, {"model": "a"}], "parameters": T}),
    "model_stock": (model_stock, {"base_model": "base", "models": [{"model": "base"}, *LISTED]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_mergekits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, config = CASES[case]
    base = random_state(0)
    models = {"base": base, **{name: finetune(base, seed, 0.3) for seed, name in enumerate(NAMES)}}
    for name, state in models.items():
        save(tmp_path / name, state)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({"merge_method": case.partition(",")[0], "out": "out", **config}))
    carry_out(plan_merge({**load_recipe(path), "figures": False}), Progress(False))
    found = load(tmp_path / "out")
    assert found.keys() == base.keys()
    for tensor, values in found.items():
        torch.testing.assert_close(values.double(), reference(tensor, models, config), rtol=1e-6, atol=1e-7)


SETTINGS = (
    [0, 1],
    [0.2, 0.9, 0.1],
    T["t"],
    [{"filter": "layers.1", "value": [1, 0]}, {"value": 2}],
    [{"filter": "0.mlp", "value": [1, 0]}, {"filter": "[", "value": 3}, {"value": 2}],
)


@pytest.mark.parametrize("value", SETTINGS, ids=str)
def test_globs_have_the_values_of_filters_and_layers(value: Any) -> None:
    """Filters that reach over the layer's number, too; layers without tensors count."""
    names = list(random_state(0))
    config = {"merge_method": "linear", "models": [{"model": "org/a", "parameters": {"weight": value}}]}
    (weight,) = translate(config, "config.yml", lambda _: layout_of(names)).fields["weights"]
    for name in names:
        assert value_for(weight, name, 9.0) == pytest.approx(setting(value, name))


def test_a_model_of_one_layer_has_the_last_value() -> None:
    config = {"merge_method": "linear", "models": [{"model": "org/a", "parameters": {"weight": [0.25, 0.75]}}]}
    layout = layout_of(["h.0.mlp.weight", "wte.weight"])
    (weight,) = translate(config, "config.yml", lambda _: layout).fields["weights"]
    assert weight == {"h.0.*": 0.75, "*": 0.25}
