"""SLERP against a transcription in float64, and what it is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.models import State, finetune, load, random_state, same_bits
from helpers.runs import merge_folders, merged
from torch import Tensor, acos, sin

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.stitch.methods.slerp import weights_on_arc


def models() -> tuple[State, list[State]]:
    """Two finetunes far enough apart that the arc is no line; one of their tensors is the same."""
    base = random_state(0)
    finetuned = [finetune(base, seed, step=0.8) for seed in range(2)]
    finetuned[1]["model.norm.weight"] = 3 * finetuned[0]["model.norm.weight"]
    return base, finetuned


def on_arc(one: Tensor, other: Tensor, t: float) -> Tensor:
    a, b = one.double(), other.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = acos(cosine)
    return (sin((1 - t) * angle) * a + sin(t * angle) * b) / sin(angle)


@pytest.mark.parametrize(("t", "scale"), [(0.5, 1.0), (0.2, 1.0), (0.7, 0.5)])
def test_equals_the_transcription(tmp_path: Path, t: float, scale: float) -> None:
    base, (first, second) = models()
    found = load(merged(tmp_path, base, [first, second], method={"name": "slerp", "t": t}, scale=scale))
    for name, start in base.items():
        point = on_arc(first[name], second[name], t)
        due = (start.double() + scale * (point - start.double())).float()
        assert np.allclose(found[name], due, rtol=3e-7, atol=1e-8), name


def test_t_goes_from_the_first_to_the_second(tmp_path: Path) -> None:
    base, finetuned = models()
    for number, t in ((0, 0.0), (1, 1.0)):
        out = load(merged(tmp_path / str(number), base, finetuned, method={"name": "slerp", "t": t}))
        assert same_bits(out, finetuned[number])
    entries = [{"ref": str(tmp_path / "0" / f"ft{number}"), "name": f"ft{number}"} for number in (1, 0)]
    assert same_bits(load(merge_folders(tmp_path / "0", entries, method={"name": "slerp", "t": 0.0})), finetuned[1])


def test_t_by_globs(tmp_path: Path) -> None:
    base, finetuned = models()
    t = {"*.layers.0.*": 0.0, "model.*": 1.0}
    found = load(merged(tmp_path, base, finetuned, method={"name": "slerp", "t": t}))
    for name in base:
        if ".layers.0." in name or name.startswith("model."):
            assert found[name].equal(finetuned[".layers.0." not in name][name])
        else:
            assert np.allclose(found[name], on_arc(finetuned[0][name], finetuned[1][name], 0.5), atol=1e-6)


def test_parallel_and_opposite_vectors_lie_on_a_line() -> None:
    assert weights_on_arc(1.0, 0.3) == weights_on_arc(-1.0, 0.3) == (0.7, 0.3)


@pytest.mark.parametrize("count", [1, 3])
def test_it_merges_two(count: int) -> None:
    with pytest.raises(RecipeError, match=f"slerp merges 2 finetunes, not {count}"):
        make_recipe({"base": "a/b", "finetuned": [f"c/d{i}" for i in range(count)], "method": "slerp"})


def test_globs_that_match_nothing(tmp_path: Path) -> None:
    base, finetuned = models()
    with pytest.raises(RecipeError, match=r"model.layer.0.\*.*method.t.*did you mean"):
        merged(tmp_path, base, finetuned, method={"name": "slerp", "t": {"model.layer.0.*": 0.3}})
