"""On a GPU the refit without data differs from that of the CPU by rounding only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.families import finetunes
from helpers.models import load
from helpers.runs import quick_merge


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_gpu_agrees_with_the_cpu(kind: str, tmp_path: Path) -> None:
    folders, states = finetunes(tmp_path, kind, count=3), []
    for device in ("cpu", "cuda"):
        quick_merge(
            folders[0], folders[1:], out=tmp_path / device,
            localizer={"method": "joint", "density": 1, "device": device},
            stitch={"method": "refit", "device": device},
        )  # fmt: skip
        states.append(load(tmp_path / device))
    for name, values in states[0].items():
        assert torch.allclose(values, states[1][name], atol=1e-4), name
