"""Models whose head lies in a shard of its own, as large ones do: what runs a model reads all of it."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest
from helpers.data import write_texts
from helpers.families import finetunes
from helpers.models import load, same_bits
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

HOW = {
    "refit": ["--stitch", "refit", "--density", "0.3"],
    "regmean": ["--method", "regmean"],
    "saliency": ["--localizer", "saliency", "--density", "0.1"],
    "mask": ["--localizer", "mask", "--density", "0.1"],
}


def shard(folder: Path, apart: str) -> None:
    """Move one tensor of a checkpoint to a second shard."""
    state = load(folder)
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (name == apart)}-of-00002.safetensors" for name in state}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in state.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("kind", HOW)
def test_a_head_in_a_shard_of_its_own(
    kind: str, tmp_path: Path, home_hub: LoopbackHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model as from single files, from folders and from the Hub."""
    folders = finetunes(tmp_path)
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in range(2)]
    common = [*HOW[kind], "--data", *data, "--no-figures", "--quiet"]

    def merge(refs: list[str], out: str) -> Path:
        assert main(["merge", "--base", refs[0], "--ft", *refs[1:], *common, "--out", str(tmp_path / out)]) == 0
        return tmp_path / out

    whole = load(merge([str(folder) for folder in folders], "whole"))
    for folder in folders:
        shard(folder, "lm_head.weight")
    assert same_bits(load(merge([str(folder) for folder in folders], "sharded")), whole)
    repos = []
    for folder in folders:
        repos.append(f"demo/{folder.name}-{uuid4().hex[:8]}")
        HfApi().create_repo(repos[-1])
        HfApi().upload_folder(folder_path=folder, repo_id=repos[-1])
    assert same_bits(load(merge(repos, "fetched")), whole)
