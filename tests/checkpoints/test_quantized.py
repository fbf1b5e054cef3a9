"""Checkpoints that are no weights of a whole model, though nothing in their config says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.models import State, finetune, random_state, save
from helpers.runs import quick_merge
from safetensors.torch import save_file

from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import CheckpointError

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
PREFIX = WEIGHT.removesuffix("weight")


def int_weights(state: State) -> State:
    return {**state, WEIGHT: torch.ones(6, 6, dtype=torch.int8)}


def fp8(state: State) -> State:
    return {**state, WEIGHT: torch.ones(6, 6).to(torch.float8_e4m3fn)}


def fp8_scales(state: State) -> State:
    """A weight_scale_inv would be localized as if it were a weight."""
    return {**fp8(state), PREFIX + "weight_scale_inv": torch.ones(1, 1)}


def gptq(state: State) -> State:
    packed = {"qweight": torch.ones(1, 6, dtype=torch.int32), "qzeros": torch.ones(1, 1, dtype=torch.int32),
              "scales": torch.ones(1, 6, dtype=torch.float16), "g_idx": torch.zeros(6, dtype=torch.int32)}  # fmt: skip
    rest = {name: value for name, value in state.items() if name != WEIGHT}
    return {**rest, **{PREFIX + name: value for name, value in packed.items()}}


def bitsandbytes(state: State) -> State:
    packed = {"weight": torch.ones(18, 1, dtype=torch.uint8), "weight.absmax": torch.ones(1)}
    return {**state, **{PREFIX + name: value for name, value in packed.items()}}


def compressed(state: State) -> State:
    return {**state, PREFIX + "weight_packed": torch.ones(6, 1, dtype=torch.int32)}


@pytest.mark.parametrize("quantize", [int_weights, fp8, fp8_scales, gptq, bitsandbytes, compressed])
def test_quantized_weights_are_refused(quantize: object, tmp_path: Path) -> None:
    state = random_state(0)
    base = save(tmp_path / "base", quantize(state))  # type: ignore[operator]
    ft = save(tmp_path / "ft", quantize(finetune(state, 1)))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"base is quantized.*q_proj.*use the unquantized checkpoint"):
        quick_merge(base, [ft], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_state_of_whole_numbers_is_not_taken_for_quantized(tmp_path: Path) -> None:
    buffers = {
        "embeddings.position_ids": torch.arange(4)[None],
        "model.layers.0.attn.relative_position_index": torch.zeros(2, 2, dtype=torch.int64),
        "model.layers.0.attn.bias": torch.ones(1, 1, 2, 2, dtype=torch.uint8),
        "model.layers.0.bn.num_batches_tracked": torch.tensor(3),
        "logit_scale": torch.tensor(1.0),
        "model.layers.0.mlp.down_proj.weight": torch.ones(2, 2, dtype=torch.float64),
    }
    open_checkpoint(parse_ref(str(save(tmp_path / "base", {**random_state(0), **buffers}))))


def native(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for number, file in enumerate(files):
        save_file({f"layers.{number}.attention.wq.weight": torch.ones(2, 2)}, folder / file)
    (folder / "params.json").write_text(json.dumps({"dim": 2}))
    return folder


@pytest.mark.parametrize(
    "files",
    [["consolidated.safetensors"], [f"consolidated-0000{number}-of-00002.safetensors" for number in (1, 2)]],
    ids=["one", "shards"],
)
def test_the_native_format_of_mistral_is_refused(files: list[str], tmp_path: Path) -> None:
    base, ft = native(tmp_path / "base", *files), native(tmp_path / "ft", *files)
    with pytest.raises(CheckpointError, match=r"Mistral's own format.*transformers' format"):
        quick_merge(base, [ft], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_beside_the_weights_of_transformers_it_is_not_looked_at(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", random_state(0))
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    assert open_checkpoint(parse_ref(str(folder))).tensors.keys() == random_state(0).keys()
