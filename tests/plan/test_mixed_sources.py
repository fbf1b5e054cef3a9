"""Where tensors, dtypes and files come from when they are not all the base's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import BLOCK_NAMES, State, finetune, load, random_state, save
from helpers.runs import quick_merge

from hf_locstitch import verify
from hf_locstitch.errors import MismatchError
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe

EMBEDDINGS = "model.embed_tokens.weight"


def resized(state: State) -> State:
    """With two more words."""
    return {**state, EMBEDDINGS: torch.randn(13, 6), "lm_head.weight": torch.randn(13, 6)}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base, a finetune with a resized vocabulary, and one without."""
    base = random_state(0)
    states = {"base": base, "big": resized(finetune(base, 1)), "ft": finetune(base, 2)}
    return [save(tmp_path / name, state) for name, state in states.items()]


@pytest.mark.parametrize("mix", [{"files_from": "big"}, {"rest_from": "big", "files_from": "ft"}], ids=str)
def test_weights_and_config_of_different_sizes_are_refused(
    folders: list[Path], tmp_path: Path, mix: dict[str, str]
) -> None:
    with pytest.raises(MismatchError, match=r"(?s)is \[1[13], 6\] in .*would not load.*rest_from and files_from"):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", **mix)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_both_from_one_model_and_files_of_the_same_sizes_are_merged(folders: list[Path], tmp_path: Path) -> None:
    quick_merge(folders[0], folders[1:], out=tmp_path / "both", rest_from="big", files_from="big")
    quick_merge(folders[0], folders[1:], out=tmp_path / "same", files_from="ft")
    assert load(tmp_path / "both")[EMBEDDINGS].shape == (13, 6) and load(tmp_path / "same")[EMBEDDINGS].shape == (11, 6)


def test_a_head_that_the_config_describes_and_the_merge_lacks_is_warned_of(tmp_path: Path) -> None:
    base = random_state(0)
    ft = {**finetune(base, 1), "value_head.weight": torch.randn(1, 6)}
    refs = {"base": str(save(tmp_path / "base", base)), "finetuned": [str(save(tmp_path / "ft", ft))]}
    plan = make_plan(make_recipe({**refs, "files_from": "ft"}))
    assert any("value_head.weight" in warning and "rest_from" in warning for warning in plan.warnings)
    assert not any("random" in warning for warning in make_plan(make_recipe({**refs, "rest_from": "ft"})).warnings)


@pytest.mark.parametrize("asked", ["auto", "float16"])
def test_one_rule_for_dtypes(tmp_path: Path, asked: str) -> None:
    """auto: the base's, tensor by tensor, also of rest_from; what the base lacks keeps its own."""
    base = {**random_state(0, torch.bfloat16), EMBEDDINGS: torch.randn(11, 6)}
    ft = {**{name: value.float() for name, value in finetune(base, 1).items()}, "value_head.weight": torch.randn(1, 6)}
    folders = [save(tmp_path / "base", base), save(tmp_path / "ft", ft)]
    out = quick_merge(folders[0], folders[1:], out=tmp_path / "out", rest_from="ft", dtype=asked).out  # type: ignore[arg-type]
    assert out is not None
    merged = load(out)
    due = {**{name: value.dtype for name, value in base.items()}, "value_head.weight": torch.float32}
    assert {name: value.dtype for name, value in merged.items()} == (
        due if asked == "auto" else dict.fromkeys(due, torch.float16)
    )
    for name in merged.keys() - set(BLOCK_NAMES):
        assert torch.equal(merged[name], ft[name].to(merged[name].dtype))
    assert verify(out, base=folders[0], finetuned=folders[1:]).ok
