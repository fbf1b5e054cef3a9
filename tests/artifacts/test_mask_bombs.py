"""Masks that claim more than they hold, or hold more than they claim."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import finetune, random_state, save
from helpers.runs import quick_localize
from safetensors.torch import save_file

from hf_locstitch import inspect, load_localized, load_mask, verify
from hf_locstitch.artifacts.mask_file import MaskFile
from hf_locstitch.errors import CheckpointError, IntegrityError, LocstitchError

GB = 10**9


def write_mask(path: Path, shape: list[int], gaps: bytes, number: int, **metadata: str) -> Path:
    coded = torch.frombuffer(bytearray(gaps), dtype=torch.uint8) if gaps else torch.empty(0, dtype=torch.uint8)
    stated = {"N": str(math.prod(shape)), "ones": str(number), "shapes": json.dumps({"w": shape})}
    save_file({"w": coded}, path, metadata={"format": "hf-locstitch mask 1", **stated, **metadata})
    return path


def deflated(pattern: bytes, times: int) -> bytes:
    """Inflates to `times` repetitions of the pattern."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(pattern * 10**6) for _ in range(times // 10**6)) + deflate.flush()


@pytest.mark.parametrize("pattern", [b"\xff", b"\x00"])
def test_a_stream_is_inflated_no_further_than_its_shape(
    tmp_path: Path, pattern: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_mask(tmp_path / "bomb.safetensors", [100], deflated(pattern, 100_000_000), 0)
    assert path.stat().st_size < 200_000
    parts: list[int] = []
    inflate = zlib.decompressobj

    def counting() -> SimpleNamespace:
        real = inflate()

        def decompress(coded: bytes, most: int) -> bytes:
            content = real.decompress(coded, most)
            parts.append(len(content))
            part.unconsumed_tail = real.unconsumed_tail
            return content

        part = SimpleNamespace(decompress=decompress, unconsumed_tail=b"", eof=False, unused_data=b"")
        return part

    monkeypatch.setattr("hf_locstitch.artifacts.mask_file.zlib.decompressobj", counting)
    with pytest.raises(IntegrityError, match="beyond its 100 elements"):
        load_mask(path)
    assert sum(parts) <= 1 << 20


def test_more_ones_than_stated(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.safetensors", [3 * GB], deflated(b"\x00", 2_000_000), 10)
    with pytest.raises(IntegrityError, match="where the whole mask has 10"):
        MaskFile(path).positions("w")
    with pytest.raises(IntegrityError, match="2 ones, its metadata says 3"):
        load_mask(write_mask(tmp_path / "n.safetensors", [4], zlib.compress(b"\x00\x01"), 3))


def test_more_elements_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mask(tmp_path / "m.safetensors", [3, GB], b"", 0)
    memory = SimpleNamespace(available=2 * GB)
    monkeypatch.setattr("hf_locstitch.artifacts.mask_file.virtual_memory", lambda: memory)
    with pytest.raises(CheckpointError, match=r"3,000,000,000 elements.*2,000,000,000 bytes of memory are free"):
        load_mask(path)
    memory.available = 2**60
    path = write_mask(tmp_path / "n.safetensors", [2**47], b"", 0)
    with pytest.raises(CheckpointError, match=r"this process may not use so much memory"):
        load_mask(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"N": "5"}, "N = 5 and ones = 1 for 4 elements"),
        ({"ones": "5"}, "ones = 5 for 4 elements"),
        ({"ones": "many"}, "many"),
        ({"shapes": "[" * 5000}, "deep"),
        ({"shapes": '["w"]'}, "no mapping"),
        ({"shapes": '{"w": [-2, -2]}'}, "no list of sizes"),
        ({"shapes": '{"w": [true, 4]}'}, "no list of sizes"),
        ({"shapes": '{"w": [4611686018427387904, 0]}'}, "more than"),
        ({"shapes": '{"v": [4]}'}, "disagree on v"),
    ],
)
def test_metadata_that_do_not_agree(tmp_path: Path, metadata: dict[str, str], words: str) -> None:
    path = write_mask(tmp_path / "m.safetensors", [4], zlib.compress(b"\x00"), 1, **metadata)
    with pytest.raises(IntegrityError, match=words):
        load_mask(path)


def test_what_follows_the_last_one(tmp_path: Path) -> None:
    for i, coded in enumerate((zlib.compress(b"\x00\xff"), zlib.compress(b"\x00") + b"more")):
        with pytest.raises(IntegrityError, match="follows its last one"):
            load_mask(write_mask(tmp_path / f"{i}.safetensors", [1000], coded, 1))


def test_a_localized_checkpoint_that_claims_a_lot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither counting its mask nor comparing two of them takes memory for what is only claimed."""
    monkeypatch.chdir(tmp_path)
    base = random_state(0)
    save(tmp_path / "base", base)
    for name in ("a", "b"):
        save(tmp_path / name, finetune(base, ord(name)))
        quick_localize("base", name, out=tmp_path / f"loc-{name}")
        claim(tmp_path / f"loc-{name}", name, 2**46)
    report = inspect("loc-a", "loc-b")
    assert report.N > 2**46 and report.covered_by[0] > 2**46 - 10**3
    assert verify("loc-a").checked.mask_elements > 2**46
    with pytest.raises(CheckpointError, match="bytes of memory are free"):
        load_mask("loc-a")
    with pytest.raises(LocstitchError, match="ones"):
        claim(tmp_path / "loc-a", "a", 2**46, ones="7")
        load_localized("loc-a")


def claim(folder: Path, name: str, size: int, **metadata: str) -> None:
    """Let the first tensor of a localized checkpoint have `size` elements, everywhere that its size stands."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = folder / "masks" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        stated = dict(file.metadata() or {})
    shapes = json.loads(stated["shapes"])
    shapes[min(shapes)] = [size]
    total = sum(map(math.prod, shapes.values()))
    save_file(load_file(path), path, metadata={**stated, "N": str(total), "shapes": json.dumps(shapes), **metadata})
    record = json.loads((folder / "locstitch.json").read_text())
    record["N"] = total
    record["covered_by"][0] = total - record["covered_by"][1]
    record["outputs"][f"masks/{name}.safetensors"]["size"] = path.stat().st_size
    (folder / "locstitch.json").write_text(json.dumps(record))
