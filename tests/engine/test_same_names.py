"""Finetunes in folders of the same name: which is which is told by what they hold, never by the order they come in."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from helpers.data import write_texts
from helpers.families import finetunes
from helpers.models import load, same_bits
from helpers.refits import SMALL
from helpers.runs import quick_localize, quick_merge, quick_stitch
from helpers.vocabularies import family

from hf_locstitch import verify
from hf_locstitch.artifacts.summing_order import summing_order

DENSITY = {"density": 0.6}
T = TypeVar("T")


def same_name(folders: Sequence[Path], name: str = "final") -> list[Path]:
    """The folders, moved: ./ft0 to ./ft0.run/final."""
    return [Path(shutil.move(folder, folder.parent / f"{folder.name}.run" / name)) for folder in folders]


def orders(items: Iterable[T]) -> list[tuple[T, ...]]:
    """Three orders of three, each with another one at its end; sums of three differ by which that is."""
    first, second, third = items
    return [(first, second, third), (first, third, second), (third, second, first)]


def moved(folders: Sequence[Path], data: Sequence[Path] = ()) -> list[tuple[list[Path], list[str]]]:
    """Orders of the folders, with the data of each."""
    pairs = orders(itertools.zip_longest(folders, map(str, data)))
    return [([folder for folder, _ in order], [str(one) for _, one in order if one]) for order in pairs]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and three finetunes in float64, in which a sum of three depends on the order."""
    base, *tuned = finetunes(tmp_path, dtype=torch.float64, count=3)
    return [base, *same_name(tuned)]


@pytest.mark.parametrize("asked", [
    {"localizer": DENSITY},
    {"method": "average"},
    {"method": {"name": "dare", "density": 0.5}},
    {"localizer": {"method": "joint", **DENSITY}, "stitch": "refit"},
    {"localizer": DENSITY, "stitch": "refit"},
], ids=str)  # fmt: skip
def test_any_order_gives_the_same_bytes(folders: list[Path], asked: dict[str, Any], tmp_path: Path) -> None:
    base, *tuned = folders
    results = []
    for number, (order, _) in enumerate(moved(tuned)):
        out = tmp_path / f"out{number}"
        quick_merge(base, order, names=["x", "y", "z"], out=out, **asked)
        results.append(load(out))
        if "method" not in asked:
            report = verify(out, base=base, finetuned=order, tensors="all")
            assert report.ok, report.describe()
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", ["final", "other"], ids=["same names", "own names"])
def test_values_fitted_to_inputs(name: str, tmp_path: Path) -> None:
    base, *tuned = finetunes(tmp_path, count=3)
    tuned = [*same_name(tuned[:1], name), *same_name(tuned[1:])]
    data = [write_texts(tmp_path / f"{seed}.jsonl", seed=seed) for seed in range(3)]
    results = []
    for number, (order, inputs) in enumerate(moved(tuned, data)):
        quick_merge(base, order, names=["x", "y", "z"], out=tmp_path / f"out{number}", localizer=DENSITY, data=inputs,
                    stitch={**SMALL, "lambdas": [0.1], "held_out": 0})  # fmt: skip
        results.append(load(tmp_path / f"out{number}"))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_localized_and_stitched_in_any_order_it_is_the_merge(folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = folders
    quick_merge(base, tuned, names=["x", "y", "z"], out=tmp_path / "merge", localizer=DENSITY)
    localized = [tmp_path / f"{number}" / "skill" for number in range(3)]
    for folder, out in zip(tuned, localized, strict=True):
        out.parent.mkdir()
        quick_localize(base, folder, out=out, localizer=DENSITY)
    for number, order in enumerate(orders(localized)):
        out = tmp_path / f"out{number}"
        quick_stitch(base, list(order), names=["x", "y", "z"], out=out)
        assert same_bits(load(out), load(tmp_path / "merge"))
        assert verify(out, base=base, finetuned=[tuned[localized.index(one)] for one in order], tensors="all").ok


def test_the_very_same_finetune_under_one_name(folders: list[Path], tmp_path: Path) -> None:
    base, first, second, _ = folders
    twin = shutil.copytree(first, tmp_path / "twin" / "final")
    results = []
    for number, (order, _) in enumerate(moved([first, twin, second])):
        quick_merge(base, order, names=["x", "y", "z"], out=tmp_path / f"out{number}", localizer=DENSITY)
        results.append(load(tmp_path / f"out{number}"))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_new_tokens(tmp_path: Path) -> None:
    """Their ids are the same in any order, and `verify` finds them so where folders have other names by now."""
    models = family(tmp_path, tied=False)
    math, chat = same_name([models["math"], models["chat"]])
    for out, order in (("one", [math, chat]), ("other", [chat, math])):
        quick_merge(models["base"], order, names=["x", "y"], out=tmp_path / out, localizer=DENSITY)
    one, other = tmp_path / "one", tmp_path / "other"
    assert same_bits(load(one), load(other))
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    anew = [Path(shutil.move(math, tmp_path / name)) for math, name in ((math, "z"), (chat, "a"))]
    for order in (anew, anew[::-1]):
        out = one if order is anew else other
        report = verify(out, base=models["base"], finetuned=order, tensors="all")
        assert report.ok, report.describe()


def test_content_is_looked_at_only_where_refs_are_shared() -> None:
    contents = {"a": ("2",), "b": ("1",), "d": ("1",)}
    refs = {"d": "./final", "a": "./final", "c": "./alone", "b": "./final"}
    assert summing_order(refs, contents.__getitem__) == ("c", "b", "d", "a")
    assert summing_order(dict(reversed(refs.items())), contents.__getitem__) == ("c", "b", "d", "a")
