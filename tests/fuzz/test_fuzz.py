"""Damaged and hostile masks, localized checkpoints, manifests, configs, indexes, cards and recipes.

Whatever they hold, they are read or refused with an error of our own. FUZZ_INPUTS=10000 draws so many of each.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from helpers.fuzzing import Outcomes, changed, damaged, draws, pick, rounds, safetensors_bytes
from helpers.models import finetune, random_state, save, save_sharded
from helpers.runs import quick_localize, quick_merge

from hf_locstitch import inspect, load_localized, load_mask, plan_merge, verify
from hf_locstitch.plan.describe import format_plan, plan_json
from hf_locstitch.plan.mergekit.methods import REFUSED, TRANSLATED
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.plan.recipe_file import load_recipe

MASK, VALUES, MANIFEST = "masks/a.safetensors", "values/a.safetensors", "locstitch.json"
VECTORS = "figures/task-vectors.json"
SAMPLED = {
    "edges": [0.5, 1.0], "shares": [1.0], "unchanged": 0.0, "threshold": 0.6, "tied": 0.0, "norm": 1.0,
    "base_norm": 2.0, "sampled": 4,
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, two finetunes, a localized checkpoint of each, and a merge."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = random_state(0)
    save(tmp_path / "base", base)
    for number, name in enumerate("ab", 1):
        save(tmp_path / name, finetune(base, number))
        quick_localize("base", name, out=tmp_path / f"loc-{name}")
    quick_merge("base", ["a", "b"], out=tmp_path / "out")
    for folder in ("out", "loc-a"):
        (tmp_path / folder / "figures").mkdir()
        (tmp_path / folder / VECTORS).write_text(json.dumps({"a": SAMPLED}))
    return tmp_path


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def another_file(rng: Random, content: bytes) -> bytes:
    """A safetensors file with another header, other metadata, or other data."""
    header, data = split(content)
    act = rng.randrange(6)
    if act == 0:
        return damaged(rng, content)
    if act == 1:
        return safetensors_bytes(changed(rng, header), data)
    if act == 2:
        return safetensors_bytes(header, damaged(rng, data))
    metadata = header["__metadata__"]
    if act == 3 or "shapes" not in metadata:
        header["__metadata__"] = changed(rng, metadata)
    elif act == 4:
        shapes = changed(rng, json.loads(metadata["shapes"]))
        metadata["shapes"] = json.dumps(shapes)
        metadata["N"] = pick(rng, (metadata["N"], _elements(shapes)))
    else:
        return with_stream(rng, header, data)
    return safetensors_bytes(header, data)


def _elements(shapes: Any) -> str:
    total = 0
    for shape in shapes.values() if isinstance(shapes, dict) else ():
        numel = 1
        for size in shape if isinstance(shape, list) else ():
            numel *= size if isinstance(size, int) else 1
        total += numel
    return str(total) if abs(total) < 10**100 else "0"


def with_stream(rng: Random, header: dict[str, Any], data: bytes) -> bytes:
    """One tensor's stream replaced by other gaps, deflated properly."""
    names = sorted(name for name in header if name != "__metadata__")
    chosen, at, streams = pick(rng, names), 0, []
    for name in sorted(names, key=lambda name: header[name]["data_offsets"]):
        first, last = header[name]["data_offsets"]
        stream = data[first:last]
        if name == chosen:
            gaps = bytes(pick(rng, (0, 1, 7, 255)) for _ in range(rng.randrange(60))) * pick(rng, (1, 1, 1000))
            stream = zlib.compress(gaps) + pick(rng, (b"", b"", b"x"))
        header[name].update(shape=[len(stream)], data_offsets=[at, at + len(stream)])
        at += len(stream)
        streams.append(stream)
    return safetensors_bytes(header, b"".join(streams))


def settle(folder: Path, file: str) -> None:
    """Let the manifest have the size and hash that a file now has."""
    record = json.loads((folder / MANIFEST).read_text())
    content = (folder / file).read_bytes()
    record["outputs"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(record))


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def another_json(rng: Random, content: bytes) -> bytes:
    return encoded(changed(rng, json.loads(content))) if rng.random() < 0.8 else damaged(rng, content)


def test_masks(home: Path) -> None:
    good, path, outcomes = (home / "loc-a" / MASK).read_bytes(), home / "mask.safetensors", Outcomes()
    for rng in draws(rounds(300)):
        path.write_bytes(content := another_file(rng, good))
        outcomes.note(lambda: load_mask(path), content)
    outcomes.check("masks")


def test_localized_checkpoints(home: Path) -> None:
    folder, outcomes = home / "loc-a", Outcomes()
    good = {file: (folder / file).read_bytes() for file in (MASK, VALUES, MANIFEST)}

    def read() -> None:
        localized = load_localized(folder)
        for tensor in localized.shapes:
            localized.mask(tensor)
            localized.values(tensor)

    for rng in draws(rounds(100)):
        file = pick(rng, (MASK, VALUES, MANIFEST))
        content = (another_json if file == MANIFEST else another_file)(rng, good[file])
        (folder / file).write_bytes(content)
        if file != MANIFEST and rng.random() < 0.9:
            settle(folder, file)
        outcomes.note(read, content)
        if rng.random() < 0.3:
            plan = lambda: plan_json(plan_merge({"base": "base", "localized": ["loc-a", "loc-b"]}))  # noqa: E731
            outcomes.note(plan, content)
        for name, bytes_ in good.items():
            (folder / name).write_bytes(bytes_)
    outcomes.check("localized checkpoints")


@pytest.mark.parametrize("what", ["inspect", "inspect two", "verify"])
def test_manifests_and_masks(home: Path, what: str) -> None:
    folder, outcomes = home / ("loc-a" if what == "inspect two" else "out"), Outcomes()
    good = {file: (folder / file).read_bytes() for file in (MASK, MANIFEST, VECTORS)}

    def read() -> None:
        report = {"inspect": lambda: inspect(folder), "inspect two": lambda: inspect(folder, "loc-b")}.get(
            what, lambda: verify(folder, show_progress=False)
        )()
        report.describe()
        json.dumps(report.as_json())

    for rng in draws(rounds(60)):
        file = pick(rng, (MASK, MANIFEST, MANIFEST, MANIFEST, VECTORS))
        content = (another_file if file == MASK else another_json)(rng, good[file])
        (folder / file).write_bytes(content)
        if file == MASK:
            settle(folder, MASK)
        outcomes.note(read, content)
        for name, bytes_ in good.items():
            (folder / name).write_bytes(bytes_)
    outcomes.check(f"manifests and masks, {what}")


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 6, "vocab_size": 11,
    "text_config": {"model_type": "text", "hidden_size": 6}, "vision_config": {"image_size": 4, "patch_size": 2},
    "rope_scaling": {"factor": 2.0}, "id2label": {"0": "a"}, "tie_word_embeddings": False,
}  # fmt: skip
CARD = {"license": "mit", "license_name": "x", "pipeline_tag": "text-generation", "tags": ["a"], "base_model": "b/c"}


def test_configs_indexes_and_cards(home: Path) -> None:
    base, outcomes = random_state(0), Outcomes()
    for name, number in (("s-base", 0), ("s-ft", 1)):
        folder = save_sharded(home / name, finetune(base, number), lambda names: [names[:4], names[4:]])
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n# Title\n")
    folder = home / "s-ft"
    files = ("config.json", "model.safetensors.index.json", "README.md")
    good = {file: (folder / file).read_bytes() for file in files}

    def read() -> None:
        for fields in ({"base": "s-base", "finetuned": "s-ft"}, {"base": "s-ft", "finetuned": "s-base"}):
            plan = plan_merge(fields)
            format_plan(plan)
            json.dumps(plan_json(plan))

    for rng in draws(rounds(100)):
        file = pick(rng, files)
        if file == "README.md" and rng.random() < 0.6:
            content = b"---\n" + yaml.safe_dump(changed(rng, CARD)).encode("utf-8", "surrogatepass") + b"---\n# Title\n"
        else:
            content = damaged(rng, good[file]) if file == "README.md" else another_json(rng, good[file])
        (folder / file).write_bytes(content)
        outcomes.note(read, content)
        (folder / file).write_bytes(good[file])
    outcomes.check("configs, indexes and cards")


RECIPE = {
    "base": {"ref": "base", "sha256": "0" * 64},
    "finetuned": ["a", {"ref": "b", "name": "b"}],
    "method": {"name": "locstitch"},
    "localizer": {"method": "magnitude", "density": 0.1, "scope": "model"},
    "stitch": {"method": "refit", "data": {"a": {"ref": "x.jsonl", "number": 4}, "b": "y.jsonl"}, "ridge": 0.1},
    "data": [],
    "scale": 1.0,
    "include": ["*"],
    "exclude": [],
    "rest_from": "a",
    "dtype": "auto",
    "shard_size": "5GB",
    "figures": True,
    "evaluate": {"tasks": ["arc_easy:0"], "limit": 3},
    "out": "somewhere",
}


MERGEKIT = {
    "merge_method": "ties",
    "base_model": {"model": {"path": "./base", "revision": None}},
    "models": [
        {"model": "./a", "parameters": {"weight": [0, 0.5, 1], "density": 0.5}},
        {"model": "./base+./b@main", "parameters": {"weight": [{"filter": "mlp", "value": [1, 0]}, {"value": 0.3}]}},
    ],
    "parameters": {"normalize": True, "int8_mask": True, "lambda": 0.9, "density": 0.5},
    "tokenizer": {"source": "base", "pad_to_multiple_of": None},
    "chat_template": "auto",
    "dtype": "bfloat16",
    "out_dtype": "float32",
}


def test_configs_of_mergekit(home: Path) -> None:
    path, outcomes = home / "mergekit.yaml", Outcomes()
    methods = [*TRANSLATED, *REFUSED]
    for rng in draws(rounds(300)):
        start = {**MERGEKIT, "merge_method": rng.choice(methods)}
        text = yaml.safe_dump(changed(rng, start) if rng.randrange(3) else start, sort_keys=False)
        content = text.encode("utf-8", "surrogatepass")
        content = damaged(rng, content) if rng.randrange(2) else content
        path.write_bytes(content)
        outcomes.note(lambda: make_recipe(load_recipe(path)), content)
    outcomes.check("configs of mergekit")


def test_recipes(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "recipe.yaml", Outcomes()
    texts = [yaml.safe_dump(RECIPE, sort_keys=False), "base: &b a\nfinetuned: [*b, &c {ref: d}]\n<<: {scale: 2}\n"]
    for rng in draws(rounds(400)):
        act = rng.randrange(3)
        if act == 0:
            content = damaged(rng, pick(rng, texts).encode())
        else:
            content = yaml.safe_dump(changed(rng, RECIPE), sort_keys=False).encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        outcomes.note(lambda: make_recipe(load_recipe(path)), content)
    outcomes.check("recipes")
