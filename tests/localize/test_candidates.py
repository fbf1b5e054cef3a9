"""Candidates of a chunk: by hand, and the same bits whatever finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from models import finetune, random_state, save
from test_run import files_of

from hf_locstitch import merge_from_hub
from hf_locstitch.localize.candidates import OnCpu, OnDevice

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def bits(*numbers: float) -> list[int]:
    return np.array(numbers, np.float32).view(np.int32).tolist()


def test_by_hand() -> None:
    finder = OnCpu(8)
    finder.begin(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    finetuned = torch.tensor([1.5, 2.0, -0.0, -3.0])
    positions, scores = finder.find(finetuned, bits(0.5)[0])
    assert positions.tolist() == [0, 3] and scores.tolist() == bits(0.5, 2.0)
    positions, scores = finder.find(finetuned, bits(0.6)[0])
    assert positions.tolist() == [3] and scores.tolist() == bits(2.0)
    positions, scores = finder.find(finetuned, 0)  # −0 differs from 0 in a bit
    assert positions.tolist() == [0, 2, 3] and scores.tolist() == bits(0.5, 0.0, 2.0)


def check(device: str, dtypes: Sequence[torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    for base_dtype in dtypes:
        for dtype in dtypes:
            base = torch.randn(5000, generator=generator).to(base_dtype)
            finetuned = (base.double() + 1e-2 * torch.randn(5000, generator=generator).double()).to(dtype)
            finetuned[::7] = base[::7].to(dtype)
            finetuned[3], finetuned[4] = float("nan"), float("inf")
            cpu, other = OnCpu(5000), OnDevice(device)
            cpu.begin(base)
            other.begin(base)
            for low in [0, *bits(1e-3, 1e-2)]:
                expected, found = cpu.find(finetuned, low), other.find(finetuned, low)
                assert np.array_equal(expected[0], found[0]) and len(found[0])
                finite = expected[0] != 3  # a NaN's own bits are nobody's promise
                assert np.array_equal(expected[1][finite], found[1][finite])
                assert (found[1][~finite] > 0x7F800000).all()


def test_the_way_of_devices_finds_the_same() -> None:
    check("cpu", DTYPES)


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    check("cuda", DTYPES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_merge_on_a_gpu_has_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    base = random_state(0, dtype, {f"layers.{i}.w": (700, 900) for i in range(4)})
    folders = [save(tmp_path / "base", base), *(save(tmp_path / f"ft{i}", finetune(base, i, 1e-2)) for i in range(3))]
    for device in ("cpu", "cuda"):
        merge_from_hub(folders[0], folders[1:], out=tmp_path / device, device=device)
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "cuda")
