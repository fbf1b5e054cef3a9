"""Skills put into a loaded model and taken out again: the bytes of a merge of what is in it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.families import build, finetunes
from helpers.runs import quick_localize, quick_stitch

from hf_locstitch import RequestError, load_localized
from hf_locstitch.errors import MismatchError


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "dtype"), [
    ("llama", torch.bfloat16), ("llama", torch.float32), ("gpt2", torch.float32), ("mixtral", torch.bfloat16),
    ("qwen3-moe", torch.float32),
])  # fmt: skip
def test_at_every_moment_the_merge_of_what_is_in_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, *tuned = finetunes(tmp_path, kind, dtype, count=3)
    for number, folder in enumerate(tuned):
        quick_localize(base, folder, out=tmp_path / f"l{number}", localizer={"density": 0.3})
    due: dict[frozenset[int], dict[str, torch.Tensor]] = {frozenset(): weights(loaded(base, dtype))}
    for chosen in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        out = tmp_path / f"out{chosen}"
        quick_stitch(base, [tmp_path / f"l{number}" for number in chosen], out=out)
        due[frozenset(chosen)] = weights(loaded(out, dtype))
    skills = [load_localized(tmp_path / f"l{number}") for number in range(3)]
    model, inside = loaded(base, dtype), set[int]()
    for coming, going in zip(list(permutations(range(3)))[::2], list(permutations(range(3)))[1::2], strict=True):
        for number in coming:
            skills[number].apply(model)
            inside.add(number)
            assert same(weights(model), due[frozenset(inside)])
        for number in going:
            skills[number].remove(model)
            inside.remove(number)
            assert same(weights(model), due[frozenset(inside)])
    assert not [key for key in model.state_dict() if "locstitch" in key]


def test_what_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    base, tuned = finetunes(tmp_path, count=1)
    quick_localize(base, tuned, out=tmp_path / "l")
    skill, model = load_localized(tmp_path / "l"), loaded(base, torch.float32)
    with pytest.raises(RequestError, match="is not in this model"):
        skill.remove(model)
    skill.apply(model)
    with pytest.raises(RequestError, match="already"):
        skill.apply(model)
    other = build("gpt2", torch.float32)
    before = weights(other)
    with pytest.raises(MismatchError, match="not a parameter of this GPT2LMHeadModel"):
        skill.apply(other)
    wide = build("llama", torch.float32)
    wide.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(49, 32))
    kept = weights(wide)
    with pytest.raises(MismatchError, match=r"up_proj.weight is \[48, 32\] in .* but \[49, 32\]"):
        skill.apply(wide)
    assert same(weights(other), before) and same(weights(wide), kept)
