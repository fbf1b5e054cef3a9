"""What tests of methods share: models to merge, their task vectors, and plain transcriptions in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from helpers.models import State, finetune, load, random_state
from helpers.runs import merged

SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.self_attn.q_proj.weight": (12, 10),
    "model.layers.0.mlp.experts.down_proj": (3, 10, 8),
    "model.layers.0.norm.weight": (10,),
    "model.layers.1.conv.weight": (6, 5, 3, 3),
    "model.layers.1.gate": (),
}
Change = Callable[
    [Tensor], Tensor
]  # task vectors [models, *shape], float64 -> what is added to the base, before `scale`


def models(count: int = 3, step: float = 0.1) -> tuple[State, list[State]]:
    base = random_state(0, shapes=SHAPES)
    return base, [finetune(base, seed, step) for seed in range(count)]


def task_vectors(base: State, finetuned: Sequence[State], name: str) -> Tensor:
    """Float64 [models, *shape]."""
    return torch.stack([state[name].double() - base[name].double() for state in finetuned])


def check_change(tmp: Path, change: Change, count: int = 3, step: float = 0.1, **fields: object) -> None:
    """Merge made-up models, and compare with base + scale · change. fields: of the recipe."""
    base, finetuned = models(count, step)
    found, scale = load(merged(tmp, base, finetuned, **fields)), float(str(fields.get("scale", 1)))
    assert found.keys() == base.keys()
    for name, start in base.items():
        due = (start.double() + scale * change(task_vectors(base, finetuned, name))).float()
        torch.testing.assert_close(found[name], due, rtol=3e-7, atol=1e-7, msg=name)


def elect(weighted: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """TIES: the sum, or the weighted mean, of those that have the sign of the sum. weighted: [models, *shape]."""
    sign = weighted.sum(0).sign()
    agrees = (weighted.sign() == sign) & (sign != 0)
    total = torch.einsum("m,m...->...", weights.double(), agrees.double())
    return (weighted * agrees).sum(0) / (torch.where(total == 0, 1.0, total) if normalize else 1)
