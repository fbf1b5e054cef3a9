"""Manifests whose parts do not agree are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import quick_merge

from hf_locstitch import inspect
from hf_locstitch.artifacts.manifest import parse_manifest
from hf_locstitch.errors import CheckpointError


def merged(folder: Path) -> Path:
    base = random_state(0)
    save(folder / "base", base)
    for number, name in enumerate("ab"):
        save(folder / name, finetune(base, number + 1))
    quick_merge(folder / "base", [folder / "a", folder / "b"], out=folder / "out")
    return folder / "out"


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda record: record["overlap"][0].pop("masks"), "overlap.0.masks"),
    (lambda record: record["overlap"][0].update(jaccard="x"), "overlap.0.jaccard"),
    (lambda record: record["outputs"]["README.md"].pop("size"), "outputs.README.md.size"),
    (lambda record: record["outputs"]["README.md"].update(size=-1), "outputs.README.md.size"),
    (lambda record: record["inputs"].append(record["inputs"][0]), "one base"),
    (lambda record: record["inputs"].pop(0), "one base"),
    (lambda record: record.update(N=-1), "N: "),
    (lambda record: record.update(N=10**400), "N: "),
    (lambda record: record["masks"]["a"].update(ones=2**63), "masks.a.ones"),
    (lambda record: record["covered_by"].append(-1), "covered_by.3"),
    (lambda record: record["masks"]["a"].update(ones=-1), "masks.a.ones"),
    (lambda record: record["masks"]["a"].update(density=1e308), "masks.a.density"),
    (lambda record: record["masks"]["a"].update(real_density=-0.1), "masks.a.real_density"),
    (lambda record: record["overlap"][0].update(jaccard=float("inf")), "overlap.0.jaccard"),
]


def test_parts_that_do_not_agree(tmp_path: Path) -> None:
    good = json.loads((merged(tmp_path) / "locstitch.json").read_text())
    parse_manifest(json.dumps(good).encode(), "here")
    for change, words in CHANGES:
        record = json.loads(json.dumps(good))
        change(record)
        with pytest.raises(CheckpointError) as raised:
            parse_manifest(json.dumps(record).encode(), "here")
        assert words in str(raised.value) and "here" in str(raised.value)
    with pytest.raises(CheckpointError, match="not a manifest"):
        parse_manifest(b"[" * 100_000, "here")


def test_names_that_do_not_agree(tmp_path: Path) -> None:
    path = merged(tmp_path) / "locstitch.json"
    good = path.read_text()
    for part, words in (
        ("inputs", "masks: b is not one of the inputs"),
        ("masks", "overlap: b is not one of the masks"),
    ):
        record = json.loads(good)
        record[part].pop(*(["b"] if part == "masks" else []))
        path.write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=f"contradicts itself .{words}"):
            inspect(path.parent)


def test_noted_task_vectors_of_another_form_are_ignored(tmp_path: Path) -> None:
    out = merged(tmp_path)
    (out / "figures").mkdir()
    for text in ("[" * 100_000, '{"a": 3}', '{"a": {"edges": "x"}}', "[]"):
        (out / "figures" / "task-vectors.json").write_text(text)
        assert inspect(out).masks[0].norm is None
