"""Weights in FP8 with a scale for each block are read as the bfloat16 tensors that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers.fp8 import dequantized, fp8_config, quantized, save_fp8
from helpers.models import State, finetune, load, random_state, same_bits, save
from helpers.runs import quick_merge
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from hf_locstitch.adapters.opening import local_reader
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import CheckpointError, NonFiniteError

WEIGHT = "model.layers.1.mlp.up_proj.weight"  # [9, 6]
SCALES = f"{WEIGHT}_scale_inv"
SHAPES = {WEIGHT: (9, 6), "model.layers.0.experts.down_proj": (3, 7, 5), "model.layers.0.norm.weight": (6,)}


def opened(folder: Path) -> tuple[Checkpoint, CheckpointReader]:
    checkpoint = open_checkpoint(parse_ref(str(folder)))
    return checkpoint, local_reader(checkpoint, {file: folder / file for file in checkpoint.files})


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
def test_every_piece_of_a_tensor_is_what_its_blocks_stand_for(scales: torch.dtype, tmp_path: Path) -> None:
    """Blocks are cut off at both edges, a chunk begins and ends in the midst of rows, experts are stacked."""
    stored = quantized(random_state(0, shapes=SHAPES), scales=scales)
    checkpoint, reader = opened(save_fp8(tmp_path / "model", stored))
    due = dequantized(stored)
    assert {name: (info.dtype, info.shape) for name, (_, info) in checkpoint.tensors.items()} == {
        name: ("BF16", shape) for name, shape in SHAPES.items()
    }
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        for count in (1, 4, 11, numel):
            for first in range(numel - count + 1):
                got, expected = reader.flat(name, first, count), due[name].flatten()[first : first + count]
                assert torch.equal(got, expected)
                assert reader.values(name, first, count).tobytes() == expected.view(torch.uint8).numpy().tobytes()
    reader.flat(WEIGHT, 0, 5).fill_(0)  # memory of its own
    assert torch.equal(reader.flat(WEIGHT, 0, 5), due[WEIGHT].flatten()[:5])


def test_as_transformers_dequantizes_a_weight(tmp_path: Path) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 3
    stored = quantized({WEIGHT: weight}, (128, 128))
    folder = save(tmp_path / "model", stored, fp8_config([128, 128]))
    due = Fp8Dequantize(None)._dequantize_one(stored[WEIGHT], stored[SCALES], torch.bfloat16)
    assert torch.equal(opened(folder)[1].flat(WEIGHT, 0, weight.numel()).view(weight.shape), due)


def test_every_fp8_value(tmp_path: Path) -> None:
    """All 254 finite bit patterns, signs of zeros too."""
    patterns = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127].view(torch.float8_e4m3fn)
    stored = {WEIGHT: patterns.view(2, 127), SCALES: torch.full((1, 43), 0.3)}
    _, reader = opened(save_fp8(tmp_path / "model", stored))
    due = (patterns.float() * torch.tensor(0.3)).bfloat16()
    assert torch.equal(reader.flat(WEIGHT, 0, 254).view(torch.int16), due.view(torch.int16))


def other_shape(state: State) -> State:
    return {**state, SCALES: torch.ones(2, 2)}


def no_scales(state: State) -> State:
    return {name: value for name, value in state.items() if name != SCALES}


def scales_of_nothing(state: State) -> State:
    return {name: value for name, value in state.items() if name != WEIGHT}


def scales_of_bfloat16(state: State) -> State:
    return {**state, WEIGHT: torch.ones(9, 6, dtype=torch.bfloat16)}


def odd_scales(state: State) -> State:
    return {**state, SCALES: torch.ones(3, 2, dtype=torch.int32)}


def a_vector(state: State) -> State:
    return {**state, WEIGHT: torch.ones(54).to(torch.float8_e4m3fn)}


def other_fp8(state: State) -> State:
    return {**no_scales(state), WEIGHT: torch.ones(9, 6).to(torch.float8_e5m2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_shape, r"up_proj.weight_scale_inv is \[2, 2\], but .* of \[9, 6\] in blocks of 4×3 needs \[3, 2\]"),
        (no_scales, r"up_proj.weight is F8_E4M3, but there is no .*up_proj.weight_scale_inv"),
        (scales_of_nothing, r"it has .*up_proj.weight_scale_inv, but no .*up_proj.weight\."),
        (scales_of_bfloat16, r"it has .*scale_inv, but .*up_proj.weight is BF16, not F8_E4M3"),
        (odd_scales, r"scale_inv is I32, not one of BF16, F16, F32"),
        (a_vector, r"up_proj.weight is F8_E4M3 \[54\], not a matrix"),
        (other_fp8, r"holds .*up_proj.weight as F8_E5M2 \[9, 6\]"),
    ],
)
def test_what_does_not_fit_is_told_from_the_headers(
    change: Callable[[State], State], words: str, tmp_path: Path
) -> None:
    folder = save_fp8(tmp_path / "model", change(quantized(random_state(0))))
    with pytest.raises(CheckpointError, match=rf"model (cannot be dequantized|is quantized).*{words}.*unquantized"):
        open_checkpoint(parse_ref(str(folder)))


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [True, 4]])
def test_blocks_that_are_none(block: object, tmp_path: Path) -> None:
    config = fp8_config(block)  # pyright: ignore[reportArgumentType]
    save(tmp_path / "model", quantized(random_state(0)), config)
    with pytest.raises(CheckpointError, match=r"weight_block_size of .*two numbers above 0"):
        open_checkpoint(parse_ref(str(tmp_path / "model")))


def test_one_scale_for_a_whole_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", quantized(random_state(0)), fp8_config(None))
    with pytest.raises(CheckpointError, match=r"quantized \(fp8\).*Use the unquantized checkpoint"):
        open_checkpoint(parse_ref(str(tmp_path / "model")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(value: float, tmp_path: Path) -> None:
    state = quantized(random_state(0))
    state[SCALES][1, 0] = value
    base, ft = save_fp8(tmp_path / "base", state), save_fp8(tmp_path / "ft", quantized(finetune(random_state(0), 1)))
    with pytest.raises(NonFiniteError, match=r"up_proj.weight_scale_inv in model.safetensors holds NaN or infinity"):
        quick_merge(base, [ft], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_merge_is_loaded_as_an_ordinary_model(tmp_path: Path) -> None:
    """By transformers, whose own dequantization of the base it equals where nothing was merged."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    plain = load(tmp_path / "plain")
    for name, state in (("base", plain), ("ft", finetune(plain, 1))):
        save(tmp_path / name, quantized(state, (16, 16)), fp8_config([16, 16], **config.to_diff_dict()))
    quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "out", exclude=["*layers.1.*"])
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert merged.dtype == torch.bfloat16
    kept = {name: value for name, value in base.state_dict().items() if "layers.1." in name}
    assert kept and same_bits(kept, {name: merged.state_dict()[name] for name in kept})
