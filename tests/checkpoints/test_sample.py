"""Samples of weights that are read before the work begins."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import random_state, save

from hf_locstitch.checkpoints import sample
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.sample import RangedFile, read_samples, sample_pieces


@pytest.fixture
def ranged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files in folders are read as those of the Hub are."""
    monkeypatch.setattr(sample, "_opened", RangedFile)
    monkeypatch.setattr(sample, "SHARE", 0)
    yield


def test_all_models_are_asked_at_once(ranged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pieces of the last model are asked for before any piece of the first has come."""
    models = {
        name: open_checkpoint(parse_ref(str(save(tmp_path / name, random_state(0))))) for name in ("base", "a", "b")
    }
    pieces = sample_pieces([info for _, info in models["base"].tensors.values()], count=2)
    together = threading.Barrier(len(models) * len(pieces))
    raw = RangedFile.raw

    def wait(self: RangedFile, start: int, stop: int) -> memoryview:
        together.wait(10)
        return raw(self, start, stop)

    monkeypatch.setattr(RangedFile, "raw", wait)
    found = read_samples(models, pieces)
    assert found.keys() == models.keys() and len(found["a"]) == 2
    assert torch.equal(*(torch.from_numpy(found[name][pieces[0][0]].astype("float32")) for name in ("a", "b")))
