"""Methods that take whole tensors: what the engine promises of them as of all others, and their memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import finetune, load, random_state, same_bits, save, save_sharded
from helpers.ranks import merge_in_ranks
from helpers.runs import Killed, files_of

from hf_locstitch import merge_from_hub, plan_merge
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.cost import estimate, files_here
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.settings import IMPORTS_BYTES, Settings
from hf_locstitch.stitch.method import Context, Place, TensorMethod
from hf_locstitch.stitch.methods import METHODS

KINDS = [name for name in METHODS.names() if issubclass(METHODS.find(name), TensorMethod)]
SHAPES = {f"layers.{i}.w": (120, 90) for i in range(4)} | {"layers.0.norm": (90,), "embed.w": (300, 90), "empty": (0,)}


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    base = random_state(0, torch.bfloat16, SHAPES)
    folders = [save_sharded(tmp_path / "base", base, lambda names: [[name] for name in names])]
    return folders + [save(tmp_path / f"ft{i}", finetune(base, i, 1e-1)) for i in range(2)]


def test_there_are_some() -> None:
    assert {"slerp", "model-stock"} <= set(KINDS)


def test_processes_change_no_byte(inputs: list[Path], tmp_path: Path) -> None:
    base, *finetuned = map(str, inputs)
    for count in (1, 2):
        fields = {"base": base, "finetuned": finetuned, "method": "model-stock"}
        merge_in_ranks(count, tmp_path / f"out{count}", fields)
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out2")


def test_a_cut_merge_goes_on(inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(out: str) -> None:
        merge_from_hub(inputs[0], inputs[1:], out=tmp_path / out, method="slerp", figures=False)

    merge("expected")
    write, calls = ShardWriter.write, iter(range(4))

    def cut(self, shard, path):  # type: ignore[no-untyped-def]
        if next(calls, None) is None:
            raise Killed
        return write(self, shard, path)

    monkeypatch.setattr(ShardWriter, "write", cut)
    with pytest.raises(Killed):
        merge("out")
    monkeypatch.undo()
    merge("out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_memory_is_that_of_the_tensors_merged_at_a_time(inputs: list[Path]) -> None:
    recipe = make_recipe({"base": str(inputs[0]), "finetuned": list(map(str, inputs[1:])), "method": "slerp"})
    embed, layer = 300 * 90 * (28 + 2 * 8), 120 * 90 * (28 + 2 * 8)
    for workers, held in ((1, embed), (3, embed + 2 * layer)):
        plan = make_plan(recipe, Settings(chunk=1000, workers=workers))
        assert estimate(plan, files_here(plan)).memory == IMPORTS_BYTES + held
    with_room = Settings(chunk=1000, workers=8, limit=IMPORTS_BYTES + embed + 2 * layer)
    assert make_plan(recipe, with_room).settings.workers == 3


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "method",
    [
        *[METHODS.find(kind)() for kind in KINDS if not METHODS.find(kind).linear_algebra],  # torch's is not traced
        METHODS.find("model-stock")(filter_wise=True),
        METHODS.find("della")(elect=False, normalize=False),
        METHODS.find("breadcrumbs")(elect=True, normalize=True),
    ],
    ids=lambda method: method.name,
)
def test_it_takes_no_more(method: TensorMethod, count: int) -> None:
    """With its inputs, in float32, and what it returns."""
    count = 2 if method.most == 2 else count

    def merge(side: int) -> int:
        tracemalloc.start()
        base, *finetuned = [np.random.default_rng(i).random((side, side), np.float32) for i in range(count + 1)]
        weights, dtype = [0.5] * count, base.dtype
        tracemalloc.reset_peak()
        method.merge(base, finetuned, Context(weights, Place("w", 0), 0.9, dtype))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    merge(8)  # imports
    assert merge(400) <= method.memory((400, 400), count) + 100_000


def test_a_limit_that_does_not_hold_the_largest_tensor(inputs: list[Path]) -> None:
    fields = {"base": str(inputs[0]), "finetuned": list(map(str, inputs[1:])), "method": "slerp"}
    with pytest.raises(RecipeError, match=r"slerp takes whole tensors, and embed.w of 2 finetunes needs 201.2 MB"):
        make_plan(make_recipe(fields), Settings(chunk=1000, limit=IMPORTS_BYTES + 1_000_000))
    assert plan_merge({**fields, "method": "task-arithmetic"}, max_memory="202MB").settings.limit == 202_000_000
    assert plan_merge({**fields, "exclude": ["embed.w"]}, max_memory="202MB").settings.workers == 1


def test_threads_and_chunks_change_no_byte(inputs: list[Path], tmp_path: Path) -> None:
    for method in KINDS:
        outs = []
        for number, memory in enumerate((None, "250MB", "600MB")):
            out = tmp_path / f"{method}{number}"
            if memory == "250MB" and METHODS.find(method).linear_algebra:
                continue
            merge_from_hub(inputs[0], inputs[1:], out=out, method=method, max_memory=memory, figures=False)
            outs.append(load(out))
        assert all(same_bits(outs[0], other) for other in outs[1:]), method
