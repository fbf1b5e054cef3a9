"""Small checkpoints for tests, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]

SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.norm.weight": (6,),
    "model.layers.1.mlp.up_proj.weight": (9, 6),
    "model.layers.1.norm.weight": (6,),
    "model.layers.10.mlp.up_proj.weight": (9, 6),
    "model.norm.weight": (6,),
    "lm_head.weight": (11, 6),
}
BLOCK_NAMES = [name for name in SHAPES if ".layers." in name]


def random_state(
    seed: int, dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def finetune(base: State, seed: int, step: float = 0.1) -> State:
    """The base and a random task vector of float32 normal entries times `step`, in the base's dtypes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (value.float() + step * torch.randn(value.shape, generator=generator)).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in base.items()
    }


def save(folder: Path, state: State, config: str = '{"model_type": "toy"}') -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(config)
    return folder


def save_sharded(folder: Path, state: State, cut: Callable[[Sequence[str]], Sequence[Sequence[str]]]) -> Path:
    """cut: names -> names of each shard."""
    import json

    folder.mkdir(parents=True)
    groups = cut(list(state))
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for file, group in zip(files, groups, strict=True):
        save_file({name: state[name] for name in group}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


def load(folder: Path) -> State:
    """All tensors of a folder's safetensors files, of which none stays open."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value.clone() for file in files for name, value in load_file(file).items()}


def same_bits(one: State, other: State) -> bool:
    """Equal names, dtypes, shapes and bytes; 0.0 and −0.0 differ."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(one[n].flatten().view(torch.uint8), other[n].flatten().view(torch.uint8))
        for n in one
    )
