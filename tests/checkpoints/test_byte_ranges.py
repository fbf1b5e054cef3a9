"""Which bytes of a file are read, and how many of them wait for their turn."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.models import random_state, save

from hf_locstitch.checkpoints.byte_ranges import byte_ranges, most_held
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import Ref

SHAPES = {"embed.w": (200, 300)} | {f"layers.{i}.w": (300, 400) for i in range(6)} | {"head.w": (200, 300)}
SIZE = 2 * sum(a * b for a, b in SHAPES.values())


def test_a_shard_that_waits_for_its_turn(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", random_state(0, torch.bfloat16, SHAPES))
    checkpoint = open_checkpoint(Ref(folder=folder))
    whole = [(name, 0, info.numel) for name, (_, info) in checkpoint.tensors.items()]
    assert most_held(checkpoint, whole) == max(2 * count for _, _, count in whole)
    assert most_held(checkpoint, whole[::-1]) == SIZE
    assert most_held(checkpoint, [whole[2], whole[1], whole[4]]) == 2 * (whole[1][2] + whole[2][2])
    assert byte_ranges(checkpoint, whole)[checkpoint.shards[0].file] == [
        (checkpoint.shards[0].size - SIZE, checkpoint.shards[0].size)
    ]
