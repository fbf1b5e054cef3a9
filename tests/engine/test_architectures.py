"""Every kind of transformers model merges without a table of architectures, and loads from the Hub afterwards."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
import torch
import transformers
from helpers.architectures import MODELS, blocks, make_model, save_family
from helpers.models import load, same_bits
from helpers.reference import reference_masks, reference_stitch
from helpers.runs import quick_merge

from hf_locstitch import Magnitude
from loopback_hub import LoopbackHub


@pytest.mark.parametrize("kind", MODELS)
def test_merges_and_loads(kind: str, tmp_path: Path, home_hub: LoopbackHub) -> None:
    folders = save_family(kind, tmp_path)
    repo = f"demo/{uuid4().hex[:12]}"
    out = tmp_path / "out"
    quick_merge(folders[0], folders[1:], out=out, push_to=repo, localizer=Magnitude(density=0.2))

    base, *finetuned = [load(folder) for folder in folders]
    names = blocks(base)
    assert 0.3 * sum(t.numel() for t in base.values()) < sum(base[n].numel() for n in names)
    masks = [reference_masks(base, state, names, "0.2") for state in finetuned]
    expected = reference_stitch(base, finetuned, masks)
    assert same_bits(load(out), expected)

    loader = getattr(transformers, kind.split("-")[0])
    merged, report = loader.from_pretrained(repo, output_loading_info=True)
    assert not any(report.values()), report
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in make_model(kind).parameters())
    local = loader.from_pretrained(out)
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in merged.state_dict().items())
    for parameter in merged.parameters():
        assert torch.isfinite(parameter).all()


def test_auto_class_loads_from_the_hub(tmp_path: Path, home_hub: LoopbackHub) -> None:
    folders = save_family("LlamaForCausalLM", tmp_path)
    repo = f"demo/{uuid4().hex[:12]}"
    quick_merge(folders[0], folders[1:], push_to=repo)
    model = transformers.AutoModelForCausalLM.from_pretrained(repo)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)
