"""Masks as files: nothing is lost, little is taken, damage is told."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import finetune, random_state, save
from helpers.runs import quick_merge
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_locstitch import Magnitude, load_mask
from hf_locstitch.artifacts.mask_file import decode_positions, encode_positions, iter_positions
from hf_locstitch.errors import CheckpointError, IntegrityError


@given(st.sets(st.integers(0, 5000), max_size=60), st.integers(0, 60))
def test_positions_survive_however_they_are_cut(positions: set[int], cut: int) -> None:
    ordered = np.array(sorted(positions), dtype=np.int32)
    first = int(ordered[cut]) // 2 if cut < len(ordered) else 0
    coded = encode_positions([(0, ordered[:cut]), (first, ordered[cut:] - np.int32(first))])
    assert decode_positions(coded, 5001).tolist() == ordered.tolist()


@pytest.mark.parametrize("positions", [[], [0], [254], [255], [256], [510], [511], [0, 256, 511, 512, 10**7]])
def test_gaps_around_the_escape(positions: list[int]) -> None:
    assert decode_positions(encode_positions([(0, np.array(positions, dtype=np.int32))]), 10**8).tolist() == positions


@pytest.mark.parametrize(("density", "most"), [(0.01, 0.083), (0.05, 0.294), (0.1, 0.48), (0.5, 1.01), (1.0, 1.01)])
def test_a_mask_takes_about_its_entropy(density: float, most: float) -> None:
    n = 1_000_000
    ones = np.flatnonzero(np.random.default_rng(0).random(n) < density).astype(np.int32)
    assert 8 * len(encode_positions([(0, ones)])) / n <= most


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = random_state(0)
    save(tmp_path / "base", base)
    save(tmp_path / "ft", finetune(base, 1))
    quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "out", localizer=Magnitude(density=0.3))
    return tmp_path / "out"


def test_load_mask_by_file_and_by_name(merged: Path) -> None:
    one, other = load_mask(merged / "masks" / "ft.safetensors"), load_mask(merged, "ft")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["model.layers.1.mlp.up_proj.weight"].shape == (9, 6)
    assert one["model.layers.0.norm.weight"].dtype == torch.bool


def test_what_is_no_mask(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no mask 'fd'.*it has ft"):
        load_mask(merged, "fd")
    with pytest.raises(CheckpointError, match="not made by hf-locstitch"):
        load_mask(tmp_path / "base", "ft")
    with pytest.raises(CheckpointError, match="not a mask made by hf-locstitch"):
        load_mask(merged / "model.safetensors")


def test_a_damaged_mask(merged: Path, tmp_path: Path) -> None:
    content = bytearray((merged / "masks" / "ft.safetensors").read_bytes())
    content[-5] ^= 0xFF
    (tmp_path / "flipped.safetensors").write_bytes(content)
    (tmp_path / "short.safetensors").write_bytes(content[:-9])
    for name in ("flipped", "short"):
        with pytest.raises(IntegrityError, match=name):
            load_mask(tmp_path / f"{name}.safetensors")
    metadata = {"format": "hf-locstitch mask 1", "N": "4", "ones": "1", "shapes": '{"w": [2, 2]}'}
    coded = torch.frombuffer(bytearray(encode_positions([(0, np.array([9], dtype=np.int32))])), dtype=torch.uint8)
    save_file({"w": coded}, tmp_path / "beyond.safetensors", metadata=metadata)
    with pytest.raises(IntegrityError, match="beyond"):
        load_mask(tmp_path / "beyond.safetensors")


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_positions_part_by_part(piece: int) -> None:
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(200_000, 500, replace=False)).astype(np.int32)
    coded = encode_positions([(0, positions)])
    parts = list(iter_positions(coded, 200_000, piece))
    assert np.array_equal(np.concatenate(parts), decode_positions(coded, 200_000)) and len(parts) > (piece < 100)
    assert list(iter_positions(b"", 0)) == []
    with pytest.raises(zlib.error):
        list(iter_positions(coded[:-1], 200_000))
