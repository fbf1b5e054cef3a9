"""Rows that are matched by tokens while the inputs are on their way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest
import torch
from helpers.models import State, finetune, random_state, save, save_sharded
from helpers.streaming import CACHING, PASSING, merged, served, sizes

from loopback_hub import LoopbackHub

TOKENS = 1200
WIDTH = 300


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    layers = {f"model.layers.{i}.w": (300, 400) for i in range(4)}
    return {"model.embed_tokens.weight": (rows, WIDTH), **layers, "lm_head.weight": (rows, WIDTH)}


def speaking(folder: Path, words: Sequence[str], added: Sequence[str]) -> dict[str, Path]:
    """The folder's files, with a tokenizer of these tokens."""
    vocab = {word: number for number, word in enumerate(words)}
    entries = [{"id": len(words) + number, "content": token} for number, token in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": entries}))
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": len(words) + len(added)}))
    return {path.name: path for path in folder.iterdir()}


def tuned(base: State, seed: int, added: int) -> State:
    layers = {name: value for name, value in finetune(base, seed, 1e-2).items() if "layers" in name}
    return {**random_state(seed, torch.bfloat16, shapes(TOKENS + added)), **layers}


@pytest.fixture
def repos(home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path) -> list[str]:
    """ft2 has all of the base's tokens in another order."""
    words = [f"w{number}" for number in range(TOKENS)]
    base = random_state(0, torch.bfloat16, shapes(TOKENS))
    org = f"t{uuid4().hex[:8]}"
    files = {
        "base": speaking(save_sharded(tmp_path / "base", base, lambda names: [names[:3], names[3:]]), words, []),
        "ft1": speaking(save(tmp_path / "ft1", tuned(base, 1, 2)), words, ["a", "b"]),
        "ft2": speaking(save(tmp_path / "ft2", tuned(base, 2, 1)), Random(0).sample(words, TOKENS), ["c"]),
    }
    for name, content in files.items():
        home_hub.add_repo(f"{org}/{name}", content)
    return [f"{org}/{name}" for name in files]


@pytest.mark.parametrize("asked", [{}, {"tokenizer": "ft2", "embeddings": "mean"}, {"embeddings": "ft2"}], ids=str)
def test_the_same_bytes_and_none_twice(
    repos: list[str], home_hub: LoopbackHub, tmp_path: Path, asked: dict[str, str]
) -> None:
    passing = merged(repos, tmp_path / "a", PASSING, **asked)
    assert all(served(home_hub, repo) == sizes(home_hub, repo) for repo in repos[1:])
    assert passing == merged(repos, tmp_path / "b", CACHING, **asked)
