"""Checkpoints whose matrices are FP8 with a scale for each block, and what they stand for, one block at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from helpers.models import State, save, save_sharded

BLOCK = (4, 3)
FEW = ("embed", "head", "norm")  # names of what stays as it is


def quantized(state: State, block: tuple[int, int] = BLOCK, scales: torch.dtype = torch.float32) -> State:
    """Matrices in FP8 with their scales beside them, all else in bfloat16."""
    found: State = {}
    for name, value in state.items():
        if value.ndim < 2 or any(word in name for word in FEW):
            found[name] = value.bfloat16()
            continue
        rows, columns = (math.ceil(size / of) for size, of in zip(value.shape[-2:], block, strict=True))
        scale = torch.zeros(*value.shape[:-2], rows, columns, dtype=scales)
        weight = torch.zeros(value.shape, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                inside = (..., *_slices(row, column, block))
                largest = value[inside].float().abs().amax((-2, -1)).clamp(min=1e-9)
                scale[..., row, column] = largest / 448
                weight[inside] = (value[inside].float() / scale[..., row, column, None, None].float()).to(weight.dtype)
        found |= {name: weight, f"{name}_scale_inv": scale}
    return found


def dequantized(state: State, block: tuple[int, int] = BLOCK) -> State:
    """What such tensors stand for, in bfloat16."""
    found = {name: value.clone() for name, value in state.items() if not name.endswith("_scale_inv")}
    for name, value in state.items():
        if name.endswith("_scale_inv"):
            weight = state[name.removesuffix("_scale_inv")]
            whole = weight.float()
            for row in range(value.shape[-2]):
                for column in range(value.shape[-1]):
                    inside = (..., *_slices(row, column, block))
                    whole[inside] = whole[inside] * value[..., row, column, None, None].float()
            found[name.removesuffix("_scale_inv")] = whole.bfloat16()
    return found


def _slices(row: int, column: int, block: tuple[int, int]) -> tuple[slice, slice]:
    return slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1])


def fp8_config(block: Sequence[int] | None = BLOCK, **fields: object) -> str:
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    return json.dumps({"model_type": "toy", **fields, "quantization_config": quantization})


def save_fp8(folder: Path, state: State, cut: Callable[[Sequence[str]], Sequence[Sequence[str]]] | None = None) -> Path:
    """Tensors that are quantized, in one file or as `save_sharded` has them."""
    if cut is None:
        return save(folder, state, fp8_config())
    save_sharded(folder, state, cut)
    (folder / "config.json").write_text(fp8_config())
    return folder
