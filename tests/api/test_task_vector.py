"""What a finetune changed in one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapters import merged_by_peft, save_base, save_lora
from helpers.models import finetune, random_state, save

from hf_locstitch import RequestError, task_vector

NAME = "model.layers.1.mlp.up_proj.weight"


def test_of_a_finetune(tmp_path: Path) -> None:
    state = random_state(0, torch.bfloat16)
    tuned = finetune(state, 1)
    base, ft = save(tmp_path / "base", state), save(tmp_path / "ft", tuned)
    save(tmp_path / "wrapped", {f"module.{name}": value for name, value in tuned.items()})
    due = tuned[NAME].float() - state[NAME].float()
    assert torch.equal(task_vector(base, ft, NAME), due)
    assert torch.equal(task_vector(base, tmp_path / "wrapped", NAME), due)
    with pytest.raises(RequestError, match="has no tensor 'nothing'"):
        task_vector(base, ft, "nothing")
    wide = save(tmp_path / "wide", {**tuned, "lm_head.weight": torch.zeros(12, 6)})
    with pytest.raises(RequestError, match=r"lm_head.weight is \[12, 6\] in .* but \[11, 6\]"):
        task_vector(base, wide, "lm_head.weight")


def test_of_an_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    lora = save_lora(tmp_path / "lora", base, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    due = merged_by_peft(base, lora).get_parameter(name) - save_and_load(base, name)
    assert torch.allclose(task_vector(base, lora, name), due, atol=1e-7)
    assert not task_vector(base, lora, name.replace("q_proj", "k_proj")).any()


def save_and_load(base: Path, name: str) -> torch.Tensor:
    from helpers.models import load

    return load(base)[name]
