"""Parameters that FSDP2 shares out over processes: what each holds, and what they learn together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from demo.skills import make_tokenizer
from helpers.architectures import blocks
from helpers.families import pair
from helpers.grafted import CASES, open_grafted, prepare
from helpers.models import load

from hf_locstitch.localize.grafted_model import MaskedParameter, make_grafted_model
from hf_locstitch.localize.learn import Room, learn_mask
from hf_locstitch.localize.localizers.mask import Mask
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.loaded_model import is_shared_out
from hf_locstitch.tasks.loading import load_config, load_model
from hf_locstitch.tasks.objectives.causal_lm import CausalLM
from hf_locstitch.tasks.passes import consuming


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """This process as a group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1),
                                         rank=0, world_size=1)  # fmt: skip
    yield
    torch.distributed.destroy_process_group()


def test_a_group_of_one_learns_the_same(group: None, tmp_path: Path) -> None:
    folders = pair("mixtral", tmp_path)
    state, config = load(folders[1]), load_config(folders[1])
    model, _ = load_model(folders[1], CausalLM(), config, torch.float64)
    base, absent = load_model(folders[0], CausalLM(), config, torch.float64)
    cpu = torch.device("cpu")
    grafted = make_grafted_model(
        model, base, absent, list(state), blocks(state), state.__getitem__, cpu, "ft", sharded=True
    )
    assert grafted.parameters and all(is_shared_out(masked.parameter) for masked in grafted.parameters.values())
    seen: list[str] = []
    task = CASES["mixtral"][1].prepare(CASES["mixtral"][2](), make_tokenizer(), None)
    with consuming(grafted.parameters.values(), lambda masked, gradient: seen.append(masked.name)):
        task.loss(grafted.model, task.examples).backward()
    assert sorted(seen) == sorted(grafted.parameters) and all(
        p.parameter.grad is None for p in grafted.parameters.values()
    )

    room = Room(tmp_path, Processes())
    expected, _ = learn_mask(Mask(density=0.1, epochs=2, micro_batch=2), *prepare("mixtral", folders), room)
    plain, _ = open_grafted(folders, CausalLM())
    due = dict(plain.to_disk(expected.__getitem__))
    for micro_batch in (2, 5):  # gradients that are added up, and that come whole
        scores, _ = learn_mask(Mask(density=0.1, epochs=2, micro_batch=micro_batch), grafted, task, room)
        found = dict(grafted.to_disk(scores.__getitem__))
        assert found.keys() == due.keys()
        for name, score in found.items():
            torch.testing.assert_close(score, due[name], rtol=1e-9, atol=1e-12)


def test_rows_are_shared_out_without_rest() -> None:
    """Three processes over four rows hold two, two and none, as torch.chunk has it."""

    class Mesh:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def size(self) -> int:
            return 3

        def get_local_rank(self) -> int:
            return self.rank

    class Parameter:
        def __init__(self, rank: int) -> None:
            self.device_mesh = Mesh(rank)

    rows = torch.arange(8.0).view(4, 2)
    parts = [MaskedParameter("w", Parameter(rank), rows, rows + 1).part(rows) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 0] and torch.equal(torch.cat(parts), rows)
