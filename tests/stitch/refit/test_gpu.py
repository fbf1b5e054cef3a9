"""Refits on a CUDA device: as on the CPU. Opt-in: python -m pytest -m gpu"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.data import write_texts
from helpers.families import build, family
from helpers.models import load
from helpers.refits import HOW
from helpers.runs import quick_merge

from hf_locstitch.stitch.refit import states

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("states_on", ["device", "cpu", "disk"])
@pytest.mark.parametrize("method", ["refit", "regmean"])
def test_the_device_refits_as_the_cpu_does(
    method: str, states_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for rounding, which is far below what a refit changes."""
    monkeypatch.setattr(states, "SMALLEST", 1)
    folders = family(build("llama", torch.float32), tmp_path)
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in range(2)]
    merged = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        stitch = {"method": method, "inputs": 24, "batch": 5, "device": device, "states_on": states_on}
        if method == "refit":
            stitch |= {"lambdas": [1.0], "held_out": 0.0}
        quick_merge(
            folders[0], folders[1:], out=out, data=data, stitch=stitch,
            **({"localizer": HOW} if method == "refit" else {"method": "regmean"}),
        )  # fmt: skip
        merged[device] = load(out)
    base = load(folders[0])
    largest = max((merged["cpu"][name] - base[name]).abs().max().item() for name in base)
    for name, values in merged["cpu"].items():
        assert (merged["cuda"][name] - values).abs().max().item() < 1e-3 * largest, name
