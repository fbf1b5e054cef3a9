"""FittedValues stitching through the whole job: from a recipe to the merge, its record and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.architectures import make_model
from helpers.data import write_jsonl, write_texts
from helpers.families import build, family, masked_tokenizer
from helpers.models import State, load
from helpers.refits import HOW, SMALL, read_record
from helpers.runs import quick_merge
from PIL import Image

from hf_locstitch import load_mask
from hf_locstitch.errors import RecipeError


def union_of_masks(out: Path, names: list[str], state: State) -> State:
    masks = [load_mask(out, name) for name in names]
    nowhere = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in state.items()}
    return nowhere | {name: torch.stack([mask[name] for mask in masks]).any(0) for name in masks[0]}


def check_merge(folders: list[Path], out: Path, plain: Path) -> dict[str, Any]:
    """The base's bytes outside the masks, the plain stitch's where nothing was refitted. Returns the record."""
    record = read_record(out)["stitch"]
    state, mean, merged = load(folders[0]), load(plain), load(out)
    union = union_of_masks(out, [folder.name for folder in folders[1:]], state)
    for name, value in merged.items():
        assert torch.equal(value[~union[name]], state[name][~union[name]]), name
        assert torch.equal(value, mean[name]) == (name not in record["refitted"]), name
    left = {name for name in load_mask(out, folders[1].name) if state[name].dim() > 1} - set(record["refitted"])
    assert left == set(record["kept_plain"])
    return record


TEXTS = {
    "llama": None,
    "llama-tied": None,
    "gpt2": None,
    "mixtral": None,
    "qwen3-moe": None,
    "falcon": None,
    "falcon-bias": None,
    "roberta-mlm": {"kind": "masked-lm", "template": "{text}{mask}", "label_words": ["=", "a", "b"]},
    "bert-classes": None,
    "bert": None,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_linear_of_a_text_model_is_refitted(kind: str, tmp_path: Path) -> None:
    folders = family(build(kind, torch.float32), tmp_path, masked_tokenizer())
    asked = [
        {"ref": str(write_texts(tmp_path / f"{seed}.jsonl", seed=seed)), "objective": TEXTS[kind]} for seed in range(2)
    ]
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer=HOW)
    lambdas: Any = [0.1, "inf"] if kind != "bert-classes" else [0.1]
    how = {**SMALL, "lambdas": lambdas}
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=asked, stitch=how)
    record = check_merge(folders, tmp_path / "out", tmp_path / "mean")
    if kind != "bert-classes":  # whose untrained head tells nothing
        assert record["disagreement"][record["lambda"]] < record["disagreement"]["inf"]
    assert not record["kept_plain"]


def test_layers_that_are_used_several_times(tmp_path: Path) -> None:
    """An Albert has one layer for all: it is fitted without inputs, and refused with a way out on inputs."""
    folders = family(build("albert", torch.float32), tmp_path, masked_tokenizer())
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in range(2)]
    with pytest.raises(RecipeError, match=r"several times in a pass \(num_hidden_groups: 1, .*: 3\).*regmean"):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=data, stitch=SMALL)
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, stitch="refit")
    record = read_record(tmp_path / "out")["stitch"]
    assert not record["kept_plain"] and len([name for name in record["refitted"] if name.endswith(".weight")]) == 8


def test_an_encoder_decoder(tmp_path: Path) -> None:
    folders = family(make_model("T5ForConditionalGeneration"), tmp_path)
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in range(2)]
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer=HOW)
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=data, stitch=SMALL)
    record = check_merge(folders, tmp_path / "out", tmp_path / "mean")
    assert record["disagreement"][record["lambda"]] < record["disagreement"]["inf"]
    assert all("relative_attention_bias" in name for name in record["kept_plain"])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A JSONL file that names pictures beside it, without their classes."""
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    return write_jsonl(tmp_path / "pictures.jsonl", [{"image": f"{number}.png"} for number in range(12)])


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_pictures(kind: str, pictures: Path, tmp_path: Path) -> None:
    """Of a whole CLIP pictures reach the vision tower only: the text tower keeps the plain stitch, as is said."""
    folders = family(build(kind, torch.float32), tmp_path)
    if kind == "vit":
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    else:
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        transformers.CLIPProcessor(images, make_tokenizer()).save_pretrained(tmp_path / "base")
    objective = (
        {"kind": "clip-zero-shot", "classes": ["abc", "def", "0123"], "prompt": "{}"} if kind == "clip" else None
    )
    asked = [{"ref": str(pictures), "objective": objective}] * 2
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer=HOW)
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=asked, stitch=SMALL)
    record = check_merge(folders, tmp_path / "out", tmp_path / "mean")
    assert record["disagreement"][record["lambda"]] < record["disagreement"]["inf"]
    assert all(name.startswith("text_model.") for name in record["kept_plain"])
    assert (kind == "clip") == bool(record["kept_plain"])


def test_finetunes_that_replaced_the_base_s_head_are_compared_under_their_own(pictures: Path, tmp_path: Path) -> None:
    folders = family(build("vit", torch.float32), tmp_path)
    for folder, labels in zip(folders, (5, 3, 2), strict=True):
        model = transformers.ViTForImageClassification.from_pretrained(
            folder, num_labels=labels, ignore_mismatched_sizes=True
        )
        model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    data = [str(pictures)] * 2
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer=HOW)
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=HOW, data=data, stitch=SMALL)
    record = check_merge(folders, tmp_path / "out", tmp_path / "mean")
    assert record["disagreement"][record["lambda"]] < record["disagreement"]["inf"]
