"""Hidden states that are put off the device while a pass waits: the same numbers, and nothing left where they were."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.data import write_texts
from helpers.families import build, family, masked_tokenizer
from helpers.models import load, same_bits
from helpers.refits import SMALL, read_record
from torch import Tensor

from hf_locstitch.cli.main import main
from hf_locstitch.stitch.refit import states as module
from hf_locstitch.stitch.refit.states import InFile, InMemory, Shelf, States


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)


def make_shelf(kind: str, folder: Path) -> Shelf:
    return InFile(folder / "states") if kind == "file" else InMemory()


def is_empty(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_views_see_what_was_put_away(kind: str, tmp_path: Path) -> None:
    states = States(make_shelf(kind, tmp_path))
    weight = torch.randn(3, 4)
    whole, other = torch.randn(6, 4), torch.randn(5, dtype=torch.float64)
    view, rows = whole[1:], weight[:2]
    states.note(whole, ())
    states.note(view, (whole, 1))
    states.note((rows, other), (weight, slice(2)))
    due = [tensor.clone() for tensor in (whole, view, other, weight)]
    for _ in range(2):
        states.put_away()
        assert is_empty(whole) and is_empty(view) and is_empty(other)
        assert torch.equal(rows, weight[:2])  # somebody else's
        with states.at_hand([view]):
            assert torch.equal(view, due[1]) and torch.equal(whole, due[0]) and is_empty(other)
        assert is_empty(whole)
        states.take_back()
        assert all(torch.equal(one, two) for one, two in zip((whole, view, other, weight), due, strict=True))


def test_what_changes_in_place_is_put_away_as_it_is(tmp_path: Path) -> None:
    states = States(InFile(tmp_path / "states"))
    one = torch.zeros(8)
    states.note(one, ())
    for step in range(3):
        states.put_away()
        states.take_back()
        assert torch.equal(one, torch.full((8,), float(step)))
        one += 1


def test_what_nobody_uses_is_not_kept(tmp_path: Path) -> None:
    states = States(InFile(tmp_path / "states"))
    one, other = torch.zeros(1000), torch.zeros(10)
    states.note((one, other), ())
    del one
    states.put_away()
    assert (tmp_path / "states").stat().st_size == other.nbytes


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    """And not a wrong model."""
    states = States(InFile(tmp_path / "states"))
    one = torch.ones(1000)
    states.note(one, ())
    states.put_away()
    (tmp_path / "states").write_bytes((tmp_path / "states").read_bytes()[:-4])
    with pytest.raises(OSError, match="truncated"):
        states.take_back()


def write_recipe(root: Path, method: str, states_on: str) -> None:
    """For the models and texts that lie there."""
    fields: dict[str, Any] = {
        "base": "./base",
        "finetuned": ["./ft0", "./ft1"],
        "data": ["./0.jsonl", "./1.jsonl"],
        "method": "regmean" if method == "regmean" else "locstitch",
        "stitch": {"method": method, "inputs": 24, "batch": 5, "states_on": states_on},
        "figures": False,
    }
    if method == "refit":
        fields["stitch"] |= {**SMALL, "lambdas": [0.3, "inf"]}
        fields["localizer"] = {"method": "magnitude", "density": 0.3}
    (root / f"{states_on}.yaml").write_text(yaml.safe_dump(fields))


def prepare(root: Path, kind: str, method: str) -> None:
    family(build(kind, torch.float32), root, masked_tokenizer())
    for seed in range(2):
        write_texts(root / f"{seed}.jsonl", seed=seed)
    for states_on in ("device", "disk"):
        write_recipe(root, method, states_on)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", "refit"), ("mixtral", "refit"), ("gpt2", "refit"), ("bert", "refit"), ("llama", "regmean")],
)
def test_the_same_bytes_as_on_the_device(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, kind, method)
    monkeypatch.chdir(tmp_path)
    put, written = InFile.put, []

    def note(self: InFile, contents: Sequence[Tensor]) -> None:
        put(self, contents)
        written.append(sum(map(len, contents)))

    monkeypatch.setattr(InFile, "put", note)
    assert main(["merge", "device.yaml", "--out", "device", "--quiet"]) == 0
    assert not written
    assert main(["merge", "disk.yaml", "--out", "disk", "--quiet"]) == 0
    assert len(written) > 50 and min(written) > 0
    assert same_bits(load(Path("device")), load(Path("disk")))
    record = read_record(Path("disk"))["stitch"]
    assert record["refitted"] and record["states_on"] == "disk"
    assert not list(tmp_path.glob(".disk*"))


@pytest.mark.parametrize("method", ["refit", "regmean"])
def test_the_dry_run_tells_where_they_lie(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path, "llama", method)
    monkeypatch.chdir(tmp_path)
    told = {}
    for states_on in ("device", "disk"):
        assert main(["merge", f"{states_on}.yaml", "--dry-run", "--json"]) == 0
        told[states_on] = json.loads(capsys.readouterr().out)["refitting"]
    device, disk = told["device"], told["disk"]
    assert device["aside"] == 0 and disk["aside"] == device["states"] > disk["states"]
    assert disk["disk"] == device["disk"] + disk["aside"] and disk["peak"] < device["peak"]
    assert main(["merge", "disk.yaml", "--dry-run"]) == 0
    assert "offloaded to " in capsys.readouterr().out


def test_a_full_disk_is_said_and_the_merge_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path, "llama", "refit")
    monkeypatch.chdir(tmp_path)
    put, calls = InFile.put, []

    def fill(self: InFile, contents: Sequence[Tensor]) -> None:
        calls.append(None)
        if len(calls) == 100:
            raise OSError(errno.ENOSPC, "No space left on device", str(self._path))
        put(self, contents)

    monkeypatch.setattr(InFile, "put", fill)
    assert main(["merge", "disk.yaml", "--out", "disk", "--quiet"]) != 0
    assert "is full. Free some" in capsys.readouterr().err
    assert not Path("disk").exists() and not list(tmp_path.glob(".disk*/spill/fit/states*"))
    assert main(["merge", "disk.yaml", "--out", "disk", "--quiet"]) == 0
    assert main(["merge", "device.yaml", "--out", "device", "--quiet"]) == 0
    assert same_bits(load(Path("device")), load(Path("disk")))
