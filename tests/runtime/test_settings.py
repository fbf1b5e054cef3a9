"""How a merge is made: no setting changes a byte, and a limit on memory is kept or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import finetune, random_state, save
from helpers.runs import files_of, quick_merge

from hf_locstitch.errors import RecipeError
from hf_locstitch.runtime.settings import CHUNK_BYTES_PER_ELEMENT, IMPORTS_BYTES, Settings, make_settings


def test_memory_is_shared_out_over_threads_and_then_chunks() -> None:
    many = Settings(chunk=1 << 19, workers=64)
    assert many.within(10**12) == replace(many, limit=10**12)
    some = many.within(1_000_000_000)
    assert 1 < some.workers < 64 and some.chunk == many.chunk and some.memory <= 1_000_000_000
    one = many.within(IMPORTS_BYTES + 100_000 * CHUNK_BYTES_PER_ELEMENT)
    assert (one.workers, one.chunk) == (1, 100_000)
    with pytest.raises(RecipeError, match=r"--max-memory 190 MB is too little.*Allow at least 201 MB"):
        many.within(190_000_000)


def test_sizes_are_read_as_people_write_them() -> None:
    assert make_settings(max_memory="1GB").memory <= 10**9
    assert make_settings(max_memory=400_000_000).memory <= 400_000_000
    with pytest.raises(RecipeError, match="'a lot' is not a size"):
        make_settings(max_memory="a lot")


def test_little_memory_gives_the_same_bytes(tmp_path: Path) -> None:
    base = random_state(0, torch.bfloat16, {f"layers.{i}.w": (300, 400) for i in range(2)})
    folders = [save(tmp_path / "base", base), save(tmp_path / "ft", finetune(base, 1, 1e-2))]
    quick_merge(folders[0], folders[1:], out=tmp_path / "a")
    quick_merge(folders[0], folders[1:], out=tmp_path / "b", max_memory="202MB")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
