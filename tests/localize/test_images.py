"""Images through the whole job: files named in a table, real processors, a vision tower over a whole CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.families import build
from helpers.models import load
from helpers.runs import quick_merge
from PIL import Image

from hf_locstitch import Saliency, load_mask


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six pictures beside a JSONL file that names them and their classes."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(6):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": number % 3})
    path = tmp_path / "pictures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finetune(model: Any, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def test_image_classification(table: Path, tmp_path: Path) -> None:
    model = build("vit", torch.float32)
    model.save_pretrained(tmp_path / "base")
    finetune(model)
    model.save_pretrained(tmp_path / "ft")
    sizes = {"size": {"height": 16, "width": 16}, "do_resize": True}
    transformers.ViTImageProcessor(**sizes).save_pretrained(tmp_path / "base")
    how = Saliency(density=0.1, micro_batch=4)
    quick_merge(tmp_path / "base", [tmp_path / "ft"], out=tmp_path / "out", localizer=how, data=[str(table)])
    mask = load_mask(tmp_path / "out", "ft")
    n = sum(tensor.numel() for tensor in mask.values())
    assert sum(int(tensor.sum()) for tensor in mask.values()) == n // 10
    from_magnitude = tmp_path / "magnitude"
    quick_merge(tmp_path / "base", [tmp_path / "ft"], out=from_magnitude)
    assert any(not torch.equal(tensor, load_mask(from_magnitude, "ft")[name]) for name, tensor in mask.items())


def test_a_vision_tower_over_a_whole_clip(table: Path, tmp_path: Path) -> None:
    """As the Hub has the paper's experts: only the tower is stored; text tower and projections are the base's."""
    model = build("clip", torch.float32)
    model.save_pretrained(tmp_path / "base")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "base")
    finetune(tower)
    tower.save_pretrained(tmp_path / "ft")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, make_tokenizer()).save_pretrained(tmp_path / "base")
    objective = {"kind": "clip-zero-shot", "classes": ["abc", "def", "0123"], "prompt": "{}"}
    out = tmp_path / "out"
    quick_merge(
        tmp_path / "base",
        [tmp_path / "ft"],
        out=out,
        include=["vision_model.encoder.layers.*"],
        localizer=Saliency(density=0.1),
        data=[{"ref": str(table), "objective": objective}],
    )
    mask = load_mask(out, "ft")
    assert all(name.startswith("vision_model.encoder.layers.") for name in mask)
    state, tuned, merged = load(tmp_path / "base"), load(tmp_path / "ft"), load(out)
    for name, kept in mask.items():
        assert torch.equal(merged[name], torch.where(kept, tuned[name], state[name]))
