"""What a sample tells of a finetune and its base: the cases that the thresholds were set by, and hand-made ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import finetune, random_state, save
from torch import nn

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.lineage import STRANGE, Lineage, lineage, lineage_warnings
from hf_locstitch.checkpoints.sample import ELEMENTS, Sample, sample_pieces, stood_for
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe

WIDTH, LETTERS, LENGTH = 48, 32, 12
Data = Callable[[int], torch.Tensor]


def letters(seed: int) -> Data:
    """Batches of sequences in which every letter depends on the one before."""
    odds = torch.softmax(2 * torch.randn(LETTERS, LETTERS, generator=torch.Generator().manual_seed(seed)), -1)

    def batch(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        columns = [torch.randint(LETTERS, (16,), generator=generator)]
        for _ in range(LENGTH):
            columns.append(torch.multinomial(odds[columns[-1]], 1, generator=generator)[:, 0])
        return torch.stack(columns, 1)

    return batch


class Model(nn.Module):
    """Two residual blocks over letters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(LETTERS, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 2 * WIDTH), "down": nn.Linear(2 * WIDTH, WIDTH)}) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = hidden + layer["down"](torch.relu(layer["up"](hidden)))  # type: ignore[index]
        return self.head(hidden)


def train(model: Model, data: Data, steps: int, rate: float, how: Any = torch.optim.AdamW, **options: Any) -> Model:
    model = copy.deepcopy(model)
    optimizer = how(model.parameters(), lr=rate, **options)
    for step in range(steps):
        text = data(step)
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def with_low_rank(model: Model, data: Data, steps: int, rate: float, rank: int = 4) -> Model:
    """A LoRA, merged into the weights."""
    model = copy.deepcopy(model)
    linears = [layer[name] for layer in model.layers for name in ("up", "down")]  # type: ignore[index]
    for linear in linears:
        rows, columns = linear.weight.shape
        factors = nn.Parameter(torch.zeros(rows, rank)), nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        nn.utils.parametrize.register_parametrization(linear, "weight", LowRank(*factors))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("parametrizations.weight.0" in name)
    model = train(model, data, steps, rate)
    for layer in model.layers:
        for linear in layer.values():  # type: ignore[operator]
            nn.utils.parametrize.remove_parametrizations(linear, "weight")
    return model


class LowRank(nn.Module):
    def __init__(self, up: nn.Parameter, down: nn.Parameter) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 4 * self.up @ self.down


def test_finetunes_and_models_trained_apart(tmp_path: Path) -> None:
    """However they were trained, finetunes lie far above the threshold, and models trained apart far below."""
    own, new = letters(1), letters(2)
    base = train(Model(0), own, 150, 3e-3)
    finetunes = {
        "sgd": train(base, new, 100, 0.3, torch.optim.SGD),
        "adamw": train(base, new, 100, 1e-4),
        "at-a-high-rate": train(base, new, 300, 1e-2),
        "with-decay": train(base, new, 300, 3e-3, weight_decay=0.3),
        "continued": train(base, own, 300, 3e-3),
        "low-rank": with_low_rank(base, new, 150, 1e-2),
    }
    strangers = {
        "other-start": train(Model(1), own, 150, 3e-3),
        "other-start-and-data": train(Model(2), new, 150, 3e-3),
        "untrained": Model(3),
        "other-and-long": train(Model(4), new, 300, 1e-2),
    }
    models = {"base": base, **finetunes, **strangers}
    refs = {name: str(save(tmp_path / name, model.state_dict())) for name, model in models.items()}
    plan = make_plan(make_recipe({"base": refs.pop("base"), "finetuned": list(refs.values())}))
    found = {name: one.correlation or 0 for name, one in plan.lineage.items()}
    assert min(found[name] for name in finetunes) > 2.5 * STRANGE, found
    assert max(abs(found[name]) for name in strangers) < STRANGE / 2, found
    warned = [warning.split(" looks")[0] for warning in plan.warnings if "was not finetuned from this base" in warning]
    assert warned == list(strangers)
    assert plan.lineage["at-a-high-rate"].distance > 1  # by its length alone it would be none


BF16, F32 = torch.bfloat16, torch.float32


def rounded(base: torch.dtype, finetuned: torch.dtype, step: float, start: torch.dtype, tmp: Path) -> list[str]:
    """What is said of finetunes by `step`, of a base whose original is in `start`."""
    shapes = {f"layers.{i}.w": (60, 80) for i in range(4)}
    original = random_state(0, start, shapes)
    tuned = finetune({name: value.float() for name, value in original.items()}, 1, step)
    folders = [
        save(tmp / name, {key: value.to(dtype) for key, value in state.items()})
        for name, state, dtype in (("base", original, base), ("ft", tuned, finetuned))
    ]
    plan = make_plan(make_recipe({"base": str(folders[0]), "finetuned": [str(folders[1])]}))
    return [warning for warning in plan.warnings if "rounding" in warning]


def test_a_base_that_was_rounded(tmp_path: Path) -> None:
    """The error of rounding a standard normal to BF16 has a norm of 1.65e-3 for each weight."""
    (warning,) = rounded(BF16, F32, 2e-3, F32, tmp_path / "a")
    assert "about 64 % of the task vector of ft is the base's rounding to BF16" in warning and "in F32" in warning
    (warning,) = rounded(F32, BF16, 1e-3, F32, tmp_path / "b")
    assert "is the finetune's rounding to BF16" in warning


@pytest.mark.parametrize("step", [1e-5, 5e-4, 2e-3, 3e-3, 4e-3, 5e-3, 1e-2])
def test_a_base_that_the_finetune_began_at(tmp_path: Path, step: float) -> None:
    assert rounded(BF16, F32, step, BF16, tmp_path / "a") == []
    assert rounded(F32, F32, step, F32, tmp_path / "b") == []


def test_a_step_beside_which_rounding_is_small(tmp_path: Path) -> None:
    assert rounded(BF16, F32, 2e-2, F32, tmp_path) == []


def of(base: Any, finetuned: Any) -> Lineage:
    samples: list[Sample] = [{"w": np.array(values, np.float32)} for values in (base, finetuned)]
    return lineage(*samples, {"w": 100})


def test_hand_made() -> None:
    found = of([3, 4, 0, 0], [3, 4, 3, 0])
    assert (found.sampled, found.unchanged, found.distance) == (4, 0.75, 0.6)
    assert of([1, 2, 3], [2, 4, 6]).correlation == pytest.approx(1)
    assert of([1, 1, 1], [2, 4, 6]).correlation is None
    assert of([0, 0], [0, 1]).distance == 0  # there is nothing to compare with
    assert of([1, np.nan, 2], [1, 2, np.inf]).sampled == 1
    assert list(lineage_warnings("ft", of([1, 1], [1, 1]))) == []


def test_a_tensor_counts_for_those_it_stands_for() -> None:
    """And not for as many as were read of it."""
    base: Sample = {"small": np.full(10, 1, np.float32), "large": np.full(10, 1, np.float32)}
    finetuned: Sample = {"small": np.full(10, 3, np.float32), "large": base["large"]}
    found = lineage(base, finetuned, {"small": 10, "large": 990})
    assert found.unchanged == 0.99 and found.distance == pytest.approx(0.2)  # √(4 · 10 / 1000)


def test_what_pieces_stand_for() -> None:
    """Tensors of their shape first, the nearest ones."""
    sizes = [1, 2, 2, 4, 5, 6, 2]
    tensors = [TensorInfo(name, "BF16", (size,), 0, 0) for name, size in zip("abcdefg", sizes, strict=True)]
    assert stood_for(tensors, [("b", 0, 1), ("f", 0, 1)]) == {"b": 1 + 2 + 2 + 4 + 2, "f": 5 + 6}
    assert stood_for(tensors, []) == {}


def test_where_samples_are_taken() -> None:
    tensors = [TensorInfo(f"{i}", "BF16", (1000, 1000), 0, 0) for i in range(100)]
    pieces = sample_pieces([TensorInfo("norm", "BF16", (9,), 0, 0), *tensors])
    assert [pieces[0][0], pieces[-1][0], len(pieces)] == ["0", "99", 16]
    assert sum(count for _, _, count in pieces) == ELEMENTS
    assert all(first == (1_000_000 - count) // 2 for _, first, count in pieces)
    assert sample_pieces([TensorInfo("norm", "BF16", (9,), 0, 0)]) == [("norm", 0, 9)]
    assert sample_pieces([TensorInfo("empty", "BF16", (0, 9), 0, 0)]) == []
