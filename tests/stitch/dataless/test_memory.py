"""How much memory a refit without data takes: as the plan says, within the limit, and without a change of a byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.families import LLAMA, build, family
from helpers.held import TensorMemory
from helpers.many_models import MANY
from helpers.runs import carry_out, files_of, quick_merge
from safetensors.torch import save_file

from hf_locstitch import plan_merge
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.plans import MergePlan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.stitch.dataless import cost, layers
from hf_locstitch.stitch.dataless.cost import strip_size
from hf_locstitch.stitch.dataless.layers import Layers, Piece, Unit
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput
from hf_locstitch.stitch.dataless.solve import DatalessSolver
from hf_locstitch.stitch.refit.stops import Linear
from hf_locstitch.stitch.refit.weights import Part

EXPERTS = {"gate_up": (2048, 512), "down": (512, 1024)}


@pytest.fixture
def t5(tmp_path: Path) -> list[Path]:
    """Its keys and values of all layers that look at the encoder share one input."""
    _, _, fields = MANY["t5"]
    torch.manual_seed(0)
    return family(transformers.T5ForConditionalGeneration(transformers.T5Config(**fields)), tmp_path)


@pytest.fixture
def whisper(tmp_path: Path) -> list[Path]:
    """The same, and its values have biases, its keys have none."""
    _, _, fields = MANY["whisper"]
    torch.manual_seed(0)
    return family(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**fields)), tmp_path)


@pytest.mark.parametrize("kind", ["t5", "whisper"])
@pytest.mark.parametrize("density", [0.3, 1])
def test_parts_of_layers_that_share_an_input_give_the_same_bytes(
    kind: str, density: float, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = request.getfixturevalue(kind)
    how = {"localizer": {"method": "joint", "density": density}, "stitch": "refit"}
    quick_merge(folders[0], folders[1:], out=tmp_path / "whole", **how)
    for most in (0, 3000):  # one layer at a time, two or three
        monkeypatch.setattr(cost, "STRIP", most)
        quick_merge(folders[0], folders[1:], out=tmp_path / f"most{most}", **how)
        assert files_of(tmp_path / f"most{most}") == files_of(tmp_path / "whole")


def test_the_limit_makes_parts_smaller() -> None:
    """The keys and values of 24 layers of a T5: 0.4 GB as float32, several times."""
    parts = [Part(f"{number}", None, (4096, 1024), (number,), torch.device("cpu")) for number in range(24)]
    shared = SharedInput(tuple(Linear(part, None, transposed=False) for part in parts))
    held = Layers(None, {}, [], [Unit((shared,), ())], [])
    one = 4096 * 1024

    def taken(most: int) -> int:
        return cost.LIBRARIES + sum(cost._memory(held, 3, most, Settings(workers=1)))

    assert taken(0) == taken(one) < taken(4 * one) < taken(cost.STRIP)
    for limit in (taken(cost.STRIP), taken(4 * one), taken(0)):
        assert taken(strip_size(held, 3, Settings(workers=1, limit=limit))) <= limit
    assert strip_size(held, 3, Settings()) == strip_size(held, 3, Settings(limit=10**12)) == cost.STRIP
    assert strip_size(held, 3, Settings(limit=1)) == 0
    assert [len(strip) for strip in shared.strips(10 * one)] == [10, 10, 4]
    assert [len(strip) for strip in shared.strips(0)] == [1] * 24


def test_stacks_that_are_held_whole_are_counted_for_every_model() -> None:
    """Eight experts of two matrices: each model holds both stacks while they are read."""
    stacks = {name: Part(name, None, (8, *shape), (name,), torch.device("cpu")) for name, shape in EXPERTS.items()}
    units = [
        Unit(tuple(SharedInput((Linear(stack.at(number), None, transposed=False),)) for number in range(8)), ())
        for stack in stacks.values()
    ]
    taken = [cost._memory(Layers(None, {}, [], units, []), tasks, cost.STRIP, Settings())[2] for tasks in (1, 5)]
    assert taken[1] - taken[0] == 4 * 4 * 8 * (2048 * 512 + 512 * 1024)


def with_experts(count: int, kind: str, root: Path) -> list[Path]:
    """A base and two finetunes of a mixture of so many experts, which lie one by one, or in a stack."""
    if kind == "gpt-oss":
        config = transformers.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=count, num_experts_per_tok=1)
        model = transformers.GptOssForCausalLM(config)
    else:
        model = build(kind.removesuffix(", stacked"), torch.float32, num_local_experts=count)
    folders = family(model, root)
    if kind.endswith(", stacked"):
        for folder in folders:
            state = type(model).from_pretrained(folder).state_dict()
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


@pytest.mark.parametrize("kind", ["mixtral", "mixtral, stacked", "gpt-oss"])
@pytest.mark.parametrize("localizer", ["joint", "magnitude"])
def test_experts_are_solved_for_one_by_one(
    kind: str, localizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with their number, and no byte is another one than where stacks are held whole."""
    memory = TensorMemory()
    for method in ("solve", "fit"):
        monkeypatch.setattr(DatalessSolver, method, within(memory, getattr(DatalessSolver, method)))
    how = {"localizer": {"method": localizer, "density": 0.3}, "stitch": "refit"}
    peaks = []
    for count in (4, 12):
        folders = with_experts(count, kind, tmp_path / f"{count}")
        memory.peak = 0
        carry_out(plan_of(folders, how), tmp_path / f"of{count}")
        peaks.append(memory.peak)
    assert 0 < peaks[1] < 1.05 * peaks[0]
    layers._layers.cache_clear()
    monkeypatch.setattr(layers, "_pieces", lambda *_: [])
    memory.peak = 0
    carry_out(plan_of(folders, how), tmp_path / "whole")
    assert memory.peak > 2 * peaks[1]
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "of12")
    layers._layers.cache_clear()


def within(memory: TensorMemory, method: Callable[..., Any]) -> Callable[..., Any]:
    def measured(*args: Any) -> Any:
        with memory:
            return method(*args)

    return measured


def plan_of(folders: list[Path], how: dict[str, Any]) -> MergePlan:
    fields = {"base": str(folders[0]), "finetuned": [str(one) for one in folders[1:]], "figures": False, **how}
    return make_plan(make_recipe(fields), Settings(chunk=1000, workers=1))


def test_the_plan_counts_one_expert_where_they_are_solved_for_one_by_one() -> None:
    stack = Part("up", None, (8, 2048, 512), ("up",), torch.device("cpu"))
    units = [Unit(tuple(SharedInput((Linear(one, None, transposed=False),)) for one in stack.at(0).siblings), ())]
    pieces = {"up": [[Piece("up", number, 1)] for number in range(8)]}
    whole, cut = (Layers(None, {}, [], units, [], pieces=one) for one in ({}, pieces))
    taken = [cost._memory(one, 3, cost.STRIP, Settings(workers=1)) for one in (whole, cut)]
    assert taken[0][:2] == taken[1][:2] and taken[0][2] > taken[1][2] == 0


@pytest.mark.parametrize("localizer", ["joint", "magnitude"])
def test_too_little_memory_is_refused_with_the_least_that_serves(localizer: str, tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    fields = {"base": str(folders[0]), "finetuned": [str(one) for one in folders[1:]], "stitch": "refit"}
    with pytest.raises(RecipeError, match=r"--max-memory 400.0 MB is too little.*fitting values takes 6\d\d\.\d MB"):
        plan_merge({**fields, "localizer": localizer}, max_memory="400MB")
    plan_merge({**fields, "localizer": localizer}, max_memory="1GB")
