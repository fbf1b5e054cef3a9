"""Checkpoints shaped like Llama, of any size, written quickly and in little memory; their values mean nothing.

    python benchmarks/synthetic.py FOLDER [--billions 0.1] [--finetunes 3] [--shard-gb 2]

FOLDER/base holds weights N(0, 0.02), FOLDER/ft1, ft2, ... the base plus N(0, 2e-3), all rounded to bfloat16. Noise is
a block of random numbers that repeats. The blocks of the base and of a finetune have coprime lengths, so a pair
(weight, change) comes again only after their product, which is larger than any model.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_locstitch.checkpoints.header import TensorSpec
from hf_locstitch.checkpoints.writer import SafetensorsWriter

CHUNK = 1 << 18  # elements written at once
BASE_PERIOD = (1 << 22) - 1  # elements
CHANGE_PERIOD = 1 << 22
BASE_STD, CHANGE_STD = 0.02, 2e-3
HEAD = 64  # width of an attention head
ITEM = 2  # bytes of a bfloat16

Tensors = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """The sizes that make a Llama."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 8192

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order of the model."""
        embedding = (self.vocabulary, self.hidden)
        blocks = {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(self.layers)
            for name, shape in self._block.items()
        }
        ends = {"model.norm.weight": (self.hidden,), "lm_head.weight": embedding}
        return {"model.embed_tokens.weight": embedding, **blocks, **ends}

    @property
    def _block(self) -> dict[str, tuple[int, ...]]:
        hidden, intermediate = self.hidden, self.intermediate
        return {
            "input_layernorm": (hidden,),
            **{f"self_attn.{letter}_proj": (hidden, hidden) for letter in "qkvo"},
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensors.values())

    @property
    def config(self) -> dict[str, Any]:
        """config.json"""
        heads = self.hidden // HEAD
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "num_attention_heads": heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
        }


def shape_of(billions: float) -> Shape:
    """A Llama of about so many billions of parameters, 64 times as wide as deep, as the usual ones are roughly."""
    hidden = max(128, round((billions * 1e9 * 64 / 12) ** (1 / 3) / 128) * 128)
    intermediate = round(hidden * 8 / 3 / 128) * 128
    ends = Shape(hidden, intermediate, 0).parameters
    block = Shape(hidden, intermediate, 1).parameters - ends
    return Shape(hidden, intermediate, max(1, round((billions * 1e9 - ends) / block)))


class Noise:
    """Normal float32 numbers that repeat after `period` elements."""

    def __init__(self, seed: int, std: float, period: int) -> None:
        self._period = period
        block = np.random.default_rng(seed).standard_normal(period, dtype=np.float32) * np.float32(std)
        self._block = np.concatenate([block, block[:CHUNK]])

    def at(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """Elements first ... first + count, as a view. count: at most CHUNK."""
        start = first % self._period
        return self._block[start : start + count]


class Weights:
    """The values of a model, a range at a time. number: 0 is the base, then come the finetunes."""

    def __init__(self, number: int) -> None:
        self._base = Noise(0, BASE_STD, BASE_PERIOD)
        self._change = Noise(number, CHANGE_STD, CHANGE_PERIOD) if number else None

    def at(self, first: int, count: int) -> npt.NDArray[np.uint16]:
        """The bits of the bfloat16 values first ... first + count of the model."""
        base = to_bfloat16(self._base.at(first, count))
        if self._change is None:
            return base
        return to_bfloat16((base.astype(np.uint32) << 16).view(np.float32) + self._change.at(first, count))


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even. values: finite."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def write_models(folder: Path, shape: Shape, finetunes: int, shard_bytes: int) -> None:
    """Write folder/base and folder/ft1 ... ft<finetunes>."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        write = partial(write_model, folder, shape, shard_bytes)
        list(pool.map(write, range(finetunes + 1)))


def write_model(folder: Path, shape: Shape, shard_bytes: int, number: int) -> None:
    model = folder / (f"ft{number}" if number else "base")
    model.mkdir(parents=True)
    _write_side_files(model, shape)
    weights, first = Weights(number), 0
    shards = list(split(shape.tensors, shard_bytes))
    files = shard_names(len(shards))
    for file, tensors in zip(files, shards, strict=True):
        write_shard(model / file, tensors, weights, first)
        first += sum(prod(size) for size in tensors.values())
    if len(shards) > 1:
        where = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
        index = {"metadata": {"total_size": ITEM * shape.parameters}, "weight_map": where}
        _write_json(model / "model.safetensors.index.json", index)


def split(tensors: Tensors, shard_bytes: int) -> Iterator[Tensors]:
    """Tensors in order, a new shard when the next one would pass `shard_bytes`."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if shard and ITEM * (sum(map(prod, shard.values())) + prod(shape)) > shard_bytes:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(path: Path, tensors: Tensors, weights: Weights, first: int) -> None:
    """first: the place of the shard's first element in the model."""
    layout = [TensorSpec(name, "BF16", shape, ITEM * prod(shape)) for name, shape in tensors.items()]
    with SafetensorsWriter(path, layout, {"format": "pt"}) as writer:
        for name, shape in tensors.items():
            numel = prod(shape)
            for start in range(0, numel, CHUNK):
                chunk = weights.at(first + start, min(CHUNK, numel - start))
                writer.write(name, chunk.data, ITEM * start)
            first += numel


def _write_side_files(model: Path, shape: Shape) -> None:
    """A config and a tokenizer of made-up words, so that nothing needs to be rebuilt or looked for."""
    vocabulary = {f"word{i}": i for i in range(shape.vocabulary)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"},
    }
    _write_json(model / "config.json", shape.config)
    _write_json(model / "tokenizer.json", tokenizer)
    _write_json(model / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "word0"})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Llama-shaped checkpoints of made-up weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--billions", type=float, default=0.1, help="of parameters, about (default: 0.1)")
    parser.add_argument("--finetunes", type=int, default=3)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="largest file, GB (default: 2)")
    args = parser.parse_args()
    write_models(args.folder, shape_of(args.billions), args.finetunes, round(args.shard_gb * 1e9))


if __name__ == "__main__":
    main()
