"""Models that write into their weights while they run, as RWKV does: neither a crash nor other weights elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import load, save

from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref

WRITE = """
import sys
from pathlib import Path
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
checkpoint = open_checkpoint(parse_ref(sys.argv[1]))
reader = MappedCheckpoint(checkpoint, {"model.safetensors": Path(sys.argv[1]) / "model.safetensors"})
for name in checkpoint.tensors:
    reader.flat(name, 0, checkpoint.info(name).numel).div_(2)
"""


@pytest.mark.parametrize("count", [3, 300_005], ids=["copied", "mapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writing_into_a_weight_changes_only_that_tensor(tmp_path: Path, count: int, dtype: torch.dtype) -> None:
    state = {"odd": torch.ones(3).to(dtype), "weight": torch.arange(2 * count).to(dtype)}
    folder = save(tmp_path / "model", state)
    file = folder / "model.safetensors"
    before = file.read_bytes()
    # In a process of its own, which a write into read-only memory would kill.
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True, timeout=120)
    assert file.read_bytes() == before

    checkpoint = open_checkpoint(parse_ref(str(folder)))
    reader = MappedCheckpoint(checkpoint, {file.name: file})
    written = reader.flat("weight", 1, 2 * count - 1).div_(2)
    reader.release("weight", 0, 2 * count)
    assert torch.equal(written, load(folder)["weight"][1:] / 2)
    assert torch.equal(reader.flat("weight", 1, 2 * count - 1), load(folder)["weight"][1:])
    assert not reader.values("weight", 0, 2).flags.writeable
