"""The table that the benchmarks of quality make of what they wrote, and the images that one of them makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vision
from helpers.runs import quick_merge
from PIL import Image
from quality import (
    Bench,
    Method,
    Pushed,
    finetunings,
    markdown,
    methods,
    read_results,
    refits,
    regmeans,
    rivals,
    with_data,
)

from hf_locstitch import Saliency

WITHIN = "vit.layers.0.mlp.fc1.weight"


def test_seeds_and_rows_of_several_files_make_one_table(tmp_path: Path) -> None:
    def write(name: str, seed: int, **rows: list[float]) -> Path:
        accuracy = {row.replace("_", " "): dict(zip("ab", values, strict=True)) for row, values in rows.items()}
        content = {"seed": seed, "examples": {}, "accuracy": accuracy, "merge_seconds": {"mask": 10.0 * (1 + seed)}}
        (tmp_path / name).write_text(json.dumps({"seeds": [content]}))
        return tmp_path / name

    files = [
        write("0.json", 0, expert=[0.8, 0.5], mask=[0.4, 0.5], graft_mask=[0.8, 0.25]),
        write("1.json", 1, expert=[1.0, 0.5], mask=[0.5, 0.25]),
        write("more.json", 1, expert=[9.0, 9.0], base=[0.0, 0.1]),
    ]
    assert markdown(read_results(files)).splitlines()[2:] == [
        "| mask | 0, 1 | 0.625 ± 0.125 | 0.500 ± 0.000 | 0.750 | 0.500 | 15 |",
        "| base | 1 | 0.100 | 0.000 |  |  |  |",
    ]


def test_rows() -> None:
    rows = [*methods([0.05, 0.2]), *rivals([0.05, 0.2]), *with_data([0.05, 0.2], ["mask", "mask, held out"])]
    assert [(row.name, row.masked, row.slug) for row in rows if row.data or not row.masked] == [
        ("average", False, "average"),
        ("task arithmetic, tuned", False, "task-arithmetic-tuned"),
        ("ties 20%", False, "ties-20"),
        ("ties 20%, tuned", False, "ties-20-tuned"),
        ("tsv-m", False, "tsv-m"),
        ("iso-c", False, "iso-c"),
        ("wudi, solved for", False, "wudi-solved-for"),
        ("ace", False, "ace"),
        ("mask 5%", True, "mask-5"),
        ("mask, held out 5%", True, "mask-held-out-5"),
    ]
    assert len({row.slug for row in rows}) == len(rows)


def test_rows_that_are_fitted_or_finetuned() -> None:
    rows = [*refits([0.1, 1], [16], ["loss"], ["saliency"]), *regmeans(), *finetunings([1, 3], [16])]
    mean = {"start": "mean"}
    assert [(row.name, row.masked, row.inputs, dict(row.stitch)) for row in rows] == [
        ("magnitude 10%, refit", True, None, mean),
        ("magnitude 10%, refit, judged by loss", True, None, {**mean, "judge": "loss"}),
        ("magnitude 10%, refit, 16 inputs", False, 16, {**mean, "inputs": 16}),
        ("refit of all", False, None, mean),
        ("refit of all, judged by loss", False, None, {**mean, "judge": "loss"}),
        ("refit of all, 16 inputs", False, 16, {**mean, "inputs": 16}),
        ("saliency 10%, refit", True, None, mean),
        ("regmean, tuned", False, None, {}),
        ("magnitude 10%, finetuned, 1 epoch", True, None, {}),
        ("magnitude 10%, finetuned, 1 epoch, 16 inputs", False, 16, {}),
        ("magnitude 10%, finetuned, 3 epochs", True, None, {}),
        ("magnitude 10%, finetuned, 3 epochs, 16 inputs", False, 16, {}),
    ]
    assert len({row.slug for row in rows}) == len(rows)


def test_what_a_row_tries() -> None:
    (regmean,) = regmeans()
    assert [one.stitch for one in regmean.variants] == [{"alpha": alpha} for alpha in (0.1, 0.5, 0.9, 1.0)]
    arithmetic = Method("tuned", ("--method", "task-arithmetic"), scales=(0.3, 1.0))
    assert [one.flags[2:] for one in arithmetic.variants] == [("--scale", "0.3"), ("--scale", "1")]
    plain = Method("plain")
    assert plain.variants == [plain]


def test_digits_in_a_merge_that_looks_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoImageProcessor

    monkeypatch.setattr(vision, "COUNTS", dict.fromkeys(vision.COUNTS, 200))
    few = vision.Training(steps=2, learning_rate=1e-3, batch=8)
    how = vision.Making(hidden=16, layers=1, pretraining=few, finetuning=few)
    heads = vision.make_models(tmp_path, how, seed=0)
    made = (tmp_path / "turned" / "model.safetensors").stat().st_mtime_ns
    again = vision.make_models(tmp_path, how, seed=0)
    assert all(torch.equal(heads[name], again[name]) for name in vision.FIVE)
    assert (tmp_path / "turned" / "model.safetensors").stat().st_mtime_ns == made

    bed = vision.Digits(heads, 0, tmp_path)
    rows, _ = bed.localization_set("turned", "train")
    pixels, labels = vision.examples("turned", "train", 0)
    assert [row["label"] for row in rows] == labels.tolist()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "base")
    image = Image.open(tmp_path / rows[7]["image"]).convert("RGB")
    read = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"])
    assert torch.allclose(read, vision.to_input(pixels[7:8]))

    trained = bed.load(str(tmp_path / "base"), "main")
    before = trained.state_dict()[WITHIN].clone()
    bed.finetune(trained, {"turned": rows}, 1)
    assert not torch.equal(trained.state_dict()[WITHIN], before)

    data = tmp_path / "turned.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    experts, out = [tmp_path / "turned"], tmp_path / "out"
    quick_merge(tmp_path / "base", experts, out=out, localizer=Saliency(density=0.1), data=[str(data)])
    # The graft of the only expert is the merge.
    bench = Bench(bed, Pushed("base", ""), {"turned": Pushed("demo/turned", "")}, tmp_path)
    grafted, merged = bench.graft("turned", out).state_dict(), bed.load(str(out), "main").state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in grafted.items())
    assert not torch.equal(grafted[WITHIN], bed.load(str(tmp_path / "base"), "main").state_dict()[WITHIN])


def test_no_digit_is_in_two_splits() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {}
    for split in vision.DIGITS:
        drawn = vision.draw(split, 2000, generator, lambda digits: digits).pixels
        corners = drawn.view(-1, 2, 8, 2, 8).transpose(2, 3).reshape(-1, 64)
        seen[split] = {bytes(digit.tolist()) for digit in corners}
    assert {split: len(digits) for split, digits in seen.items()} == vision.DIGITS
    assert not seen["test"] & (seen["train"] | seen["validation"])
