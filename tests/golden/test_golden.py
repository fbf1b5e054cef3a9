"""What merges, localizing and stitching write, by hash: a change of the code must not change a byte by accident.

`PYTHONPATH=tests python tests/golden/test_golden.py` writes golden.json anew, where a change is meant. Inputs are made
of integers, so that they are the same on every machine. What is fitted to data is compared as numbers: matrix products
differ in their last digits from processor to processor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.launch import launch
from safetensors.torch import load_file, save_file

from hf_locstitch import localize_from_hub, merge_from_hub, stitch_from_hub

GOLDEN = Path(__file__).with_name("golden.json")
BLOCK = {"self_attn.q_proj.weight": (24, 20), "mlp.up_proj.weight": (30, 20), "norm.weight": (20,)}
SHAPES = {
    "model.embed_tokens.weight": (40, 20),
    **{f"model.layers.{layer}.{name}": shape for layer in (0, 1, 10) for name, shape in BLOCK.items()},
    "model.norm.weight": (20,),
    "lm_head.weight": (40, 20),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789= "

Hashes = dict[str, str]


def draw(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """float32 [*shape], −1 … 1."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**16), 2**16, shape) / 2**16).float()


def save(folder: Path, state: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(state)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def toy(root: Path, dtype: torch.dtype = torch.float32, shards: int = 1, count: int = 3) -> list[Path]:
    """A base and finetunes of it; a third of the weights are the base's, many move by the same amount."""
    base = {name: draw(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
    folders = [save(root / "base", {name: value.to(dtype) for name, value in base.items()}, shards)]
    for number in range(count):
        state = {}
        for i, (name, value) in enumerate(base.items()):
            step = (draw(100 * (number + 1) + i, value.shape) * 12).round() / 64
            state[name] = (value + step * (step.abs() > 0.06)).to(dtype)
        folders.append(save(root / f"ft{number}", state, shards))
    return folders


def llama(root: Path, count: int = 2) -> list[Path]:
    """A base Llama and finetunes of its blocks, with a tokenizer of letters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *LETTERS]
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float()
    start = {name: draw(i, p.shape) * 0.3 + (p.dim() == 1) for i, (name, p) in enumerate(model.named_parameters())}
    folders = []
    for number in range(count + 1):
        with torch.no_grad():
            for i, (name, parameter) in enumerate(model.named_parameters()):
                step = 0.05 * draw(100 * number + i, parameter.shape) if number and ".layers." in name else 0.0
                parameter.copy_(start[name] + step)
        folders.append(root / (f"ft{number - 1}" if number else "base"))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


def texts(path: Path, seed: int, count: int = 24) -> str:
    drawn = np.random.default_rng(seed)
    lines = ["".join(drawn.choice(list(LETTERS), drawn.integers(6, 16))) for _ in range(count)]
    rows = [{"prompt": line[: len(line) // 2], "completion": line[len(line) // 2 :]} for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hashes(*folders: Path) -> Hashes:
    """Of all weights, masks, values and indexes."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if "safetensors" in path.name]
    return {
        f"{path.relative_to(folders[0].parent)}": hashlib.sha256(path.read_bytes()).hexdigest()[:24] for path in files
    }


def merged(root: Path, folders: Sequence[Path], **asked: Any) -> Hashes:
    merge_from_hub(folders[0], folders[1:], out=root / "out", figures=False, **asked)
    return hashes(root / "out")


def stitched(root: Path, folders: Sequence[Path], stitch: dict[str, Any] | None = None, **asked: Any) -> Hashes:
    """Localize each finetune, then stitch them."""
    parts = [root / f"localized-{folder.name}" for folder in folders[1:]]
    for folder, part in zip(folders[1:], parts, strict=True):
        localize_from_hub(folders[0], folder, out=part, figures=False, **asked)
    stitch_from_hub(folders[0], parts, out=root / "out", figures=False, **(stitch or {}))
    return hashes(root / "out", *parts)


def in_two_processes(root: Path, folders: Sequence[Path], *flags: str) -> Hashes:
    refs = ["--base", folders[0], "--ft", *folders[1:]]
    done = launch(2, root, *refs, "--out", root / "out", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return hashes(root / "out")


def with_data(root: Path, localizer: dict[str, Any]) -> Hashes:
    data = [texts(root / f"{seed}.jsonl", seed) for seed in range(2)]
    return merged(root, llama(root), localizer=localizer, data=data)


EXACT: dict[str, Callable[[Path], Hashes]] = {
    "default": lambda root: merged(root, toy(root)),
    "bfloat16": lambda root: merged(root, toy(root, torch.bfloat16)),
    "float16, density 0.5": lambda root: merged(root, toy(root, torch.float16), localizer={"density": 0.5}),
    "float64, 1 %": lambda root: merged(root, toy(root, torch.float64), localizer={"density": 0.01}),
    "inside each tensor": lambda root: merged(root, toy(root), localizer={"density": 0.29, "scope": "tensor"}),
    "scale": lambda root: merged(root, toy(root, torch.bfloat16), scale=0.7, localizer={"density": 0.3}),
    "everything": lambda root: merged(root, toy(root), localizer={"density": 1}),
    "nothing": lambda root: merged(root, toy(root), localizer={"density": 0}),
    "include and exclude": lambda root: merged(root, toy(root), include=["model.*"], exclude=["*.norm.*"]),
    "rest from a finetune": lambda root: merged(
        root, toy(root), names=["a", "b", "c"], rest_from="b", files_from="c", localizer={"density": 0.2}
    ),
    "cast and cut": lambda root: merged(root, toy(root), dtype="bfloat16", shard_size="2KB"),
    "shards": lambda root: merged(root, toy(root, shards=3), localizer={"density": 0.2}),
    "bounded memory": lambda root: merged(root, toy(root, count=5), max_memory="202MB"),
    "average": lambda root: merged(root, toy(root, torch.bfloat16), method="average"),
    "average, scale": lambda root: merged(root, toy(root), method="average", scale=0.5),
    "task arithmetic": lambda root: merged(root, toy(root), method="task-arithmetic", scale=0.4),
    "ties": lambda root: merged(root, toy(root, torch.bfloat16), method="ties"),
    "ties inside each tensor": lambda root: merged(
        root, toy(root), method="ties", scale=0.6, localizer={"density": 0.5, "scope": "tensor"}
    ),
    "ties, weights": lambda root: merged(root, toy(root), method="ties", weights=[0.7, 0.5, {"*.mlp.*": 0.2}]),
    "task arithmetic, weights": lambda root: merged(
        root, toy(root, torch.bfloat16), method="task-arithmetic", weights=[1, -0.5, 0.25]
    ),
    "dare": lambda root: merged(root, toy(root), method={"name": "dare", "density": 0.3, "seed": 2}),
    "dare-ties": lambda root: merged(root, toy(root), method={"name": "dare-ties", "density": 0.3}),
    "della": lambda root: merged(root, toy(root), method="della"),
    "breadcrumbs": lambda root: merged(root, toy(root, torch.bfloat16), method="breadcrumbs", scale=0.5),
    "consensus": lambda root: merged(root, toy(root), method="consensus", scale=0.4),
    "localized and stitched": lambda root: stitched(root, toy(root, torch.bfloat16)),
    "localized and stitched, many unchanged": lambda root: stitched(
        root, toy(root), localizer={"density": 0.8}, stitch={"scale": 0.5, "dtype": "float16"}
    ),
    "two processes": lambda root: in_two_processes(root, toy(root, shards=2), "--density", "0.2"),
    "ties in two processes": lambda root: in_two_processes(root, toy(root, shards=2), "--method", "ties"),
    "saliency": lambda root: with_data(root, {"method": "saliency", "density": 0.05}),
    "saliency inside each tensor": lambda root: with_data(
        root, {"method": "saliency", "density": 0.1, "scope": "tensor", "at": [0, 0.5]}
    ),
    "mask": lambda root: with_data(root, {"method": "mask", "density": 0.05, "epochs": 2}),
}


def fitted(root: Path, **asked: Any) -> Path:
    data = [texts(root / f"{seed}.jsonl", seed) for seed in range(2)]
    folders = llama(root)
    merge_from_hub(folders[0], folders[1:], out=root / "out", figures=False, data=data, **asked)
    return root / "out"


SMALL = {"inputs": 24, "batch": 6, "tokens": 32}
FITTED: dict[str, Callable[[Path], Path]] = {
    "refit": lambda root: fitted(
        root, stitch={"method": "refit", "start": "mean", **SMALL, "lambdas": [0.3]}, localizer={"density": 0.2}
    ),
    "refit, chosen": lambda root: fitted(
        root,
        stitch={"method": "refit", "start": "mean", **SMALL, "lambdas": [1.0, "inf"]},
        localizer={"density": 0.3},
        scale=0.5,
    ),
    "regmean": lambda root: fitted(root, method="regmean", stitch={"method": "regmean", **SMALL}),
    "regmean, scale": lambda root: fitted(
        root, method="regmean", scale=0.5, stitch={"method": "regmean", **SMALL, "alpha": 0.5}
    ),
}


def numbers(out: Path) -> dict[str, list[float]]:
    """Of every tensor: its length, and its product with fixed numbers."""
    state = load_file(out / "model.safetensors")
    return {
        name: [value.double().norm().item(), (value.double() * draw(7, value.shape)).sum().item()]
        for name, value in sorted(state.items())
    }


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_as_they_were(name: str, tmp_path: Path) -> None:
    assert EXACT[name](tmp_path) == golden()["exact"][name]


@pytest.mark.parametrize("name", FITTED)
def test_fitted_values_are_as_they_were(name: str, tmp_path: Path) -> None:
    found, due = numbers(FITTED[name](tmp_path)), golden()["fitted"][name]
    assert found.keys() == due.keys()
    for tensor in due:
        assert found[tensor] == pytest.approx(due[tensor], rel=1e-4, abs=1e-4), tensor


if __name__ == "__main__":
    import tempfile

    made: dict[str, Any] = {"exact": {}, "fitted": {}}
    local: dict[str, Hashes] = {}
    for name, work in EXACT.items():
        with tempfile.TemporaryDirectory() as folder:
            made["exact"][name] = work(Path(folder))
    for name, fit in FITTED.items():
        with tempfile.TemporaryDirectory() as folder:
            out = fit(Path(folder))
            made["fitted"][name] = numbers(out)
            local[name] = hashes(out)
    if len(sys.argv) > 1:  # exact hashes of fitted values, to compare on one machine
        Path(sys.argv[1]).write_text(json.dumps(local, indent=1) + "\n")
    else:
        GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
