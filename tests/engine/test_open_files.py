"""What was opened is closed at the end, also if a run fails and its error lives on, as in a notebook: Windows would
neither delete such a file nor let the same command begin again."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.models import State, finetune, save
from helpers.portable.other_system import open_in
from helpers.runs import quick_localize, quick_merge, quick_stitch

from hf_locstitch import verify
from hf_locstitch.artifacts.written_mask import WrittenMask
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.engine import localize_run, run
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.localize.localized_masks import LocalizedMask
from hf_locstitch.localize.selection import Selection
from hf_locstitch.localize.spill import Spill
from hf_locstitch.runtime.chunks import chunks_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which files a process has open")

FILE, QUERY = "model.safetensors", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a file that is open cannot be deleted: only there are variables dropped that else hold it open."""
    monkeypatch.setattr("hf_locstitch.runtime.files.OPEN_FILES_MOVE", False)


@pytest.fixture
def models(base: State, tmp_path: Path) -> list[Path]:
    return [tmp_path / "base", *(save(tmp_path / f"ft{seed}", finetune(base, seed)) for seed in (1, 2))]


def fail_after(calls: int, owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    """Of this function, the first calls go well."""
    original, left = getattr(owner, name), iter(range(calls))

    def failing(*args: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise OSError(5, "Input/output error")
        return original(*args, **named)

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("calls", "owner", "name"),
    [
        (3, Selection, "offer"),
        (1, Selection, "settle"),
        (1, Spill, "_take_up"),
        (1, run, "encode_masks"),
        (3, ShardWriter, "_put"),
    ],
)
def test_of_a_merge(
    calls: int, owner: Any, name: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_after(calls, owner, name, patch)
        with pytest.raises(OSError, match="Input/output") as caught:
            quick_merge(models[0], models[1:], out=tmp_path / "out")
    assert caught.value and open_in(tmp_path) is None


def test_of_a_localization(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after(0, localize_run, "write_values", patch)
        with pytest.raises(OSError, match="Input/output") as caught:
            quick_localize(models[0], models[1], out=tmp_path / "out")
    assert caught.value and open_in(tmp_path) is None


def test_of_a_stitch(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    localized = [tmp_path / "loc1", tmp_path / "loc2"]
    for model, out in zip(models[1:], localized, strict=True):
        quick_localize(models[0], model, out=out)
    with monkeypatch.context() as patch:
        fail_after(1, LocalizedMask, "read", patch)
        with pytest.raises(OSError, match="Input/output") as caught:
            quick_stitch(models[0], localized, out=tmp_path / "out")
    (work,) = tmp_path.glob(".out.*.partial")
    assert caught.value and open_in(work) is None


def test_of_a_localized_checkpoint_that_was_verified(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the inputs are looked for
    quick_localize(models[0], models[1], out="out")
    gc.disable()  # what waits for it stays open for long
    try:
        assert verify("out").checked.tensors > 0 and open_in(tmp_path) is None
    finally:
        gc.enable()


def test_of_masks_that_were_read_back(models: list[Path], tmp_path: Path) -> None:
    """As where each of several processes has selected a part: the folder that they lie in moves in the end."""
    quick_merge(models[0], models[1:], out=tmp_path / "out")
    part: Any = SimpleNamespace(names=[QUERY], chunks=chunks_of([36]), ones=1)
    reader = MappedCheckpoint(open_checkpoint(parse_ref(str(models[1]))), {FILE: models[1] / FILE})
    mask = WrittenMask(tmp_path / "out" / "masks" / "ft1.safetensors", part, reader)
    assert len(mask.kept(part.chunks[0]).values) > 0
    mask.close()
    assert open_in(tmp_path / "out") is None


def test_of_one_that_is_refused(base: State, models: list[Path], tmp_path: Path) -> None:
    """And nothing is left of it."""
    wrong = save(tmp_path / "wrong", base | {QUERY: base[QUERY] * float("nan")})
    with pytest.raises(NonFiniteError) as caught:
        quick_merge(models[0], [models[1], wrong], out=tmp_path / "out")
    assert caught.value and open_in(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft1", "ft2", "wrong"]
