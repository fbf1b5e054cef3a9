"""Cards, manifests, plans and bars say what is true: as many examples as there were, local inputs, bytes that move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from helpers.data import ROWS, write_jsonl
from helpers.families import build, family
from helpers.models import finetune, random_state, save, save_sharded
from helpers.refits import read_record
from helpers.runs import quick_localize, quick_merge, quick_stitch

from hf_locstitch.plan.describe import format_plan
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.progress import Progress
from loopback_hub import LoopbackHub


def test_as_many_examples_as_there_were(tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)[:2]
    fields: dict[str, Any] = {"data": [str(write_jsonl(tmp_path / "rows.jsonl", ROWS[:2]))]}
    how = {"method": "saliency", "density": 0.1}
    plan = make_plan(make_recipe({"base": str(folders[0]), "finetuned": [str(folders[1])], "localizer": how, **fields}))
    assert "up to 64 drawn examples" in format_plan(plan)
    out = quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=how, **fields).out
    assert out is not None and read_record(out)["masks"][folders[1].name]["examples"] == 2
    assert "`./rows.jsonl`, 2, split" in (out / "README.md").read_text()
    quick_localize(folders[0], folders[1], out=tmp_path / "loc", localizer=how, **fields)
    quick_stitch(folders[0], tmp_path / "loc", out=tmp_path / "stitched")
    for made in ("loc", "stitched"):
        assert read_record(tmp_path / made)["masks"][folders[1].name]["examples"] == 2


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    base = random_state(0)
    return [save_sharded(tmp_path / "base", base, lambda names: [names[:3], names[3:]]),
            save(tmp_path / "ft", finetune(base, 1))]  # fmt: skip


def pushed(hub: LoopbackHub, folder: Path) -> str:
    repo = f"demo/{uuid4().hex[:12]}"
    hub.add_repo(repo, {file.name: file for file in folder.iterdir()})
    return repo


def test_what_inputs_are_pinned_to(folders: list[Path], home_hub: LoopbackHub, tmp_path: Path) -> None:
    repos = [pushed(home_hub, folder) for folder in folders]
    for out, refs, words in (
        ("local", folders, "pins every input to the hash of its content:"),
        ("mixed", [repos[0], folders[1]], "pins every input from the Hub to its commit, every local one to its hash:"),
        ("hub", repos, "pins every input to its commit:"),
    ):
        quick_merge(refs[0], refs[1:], out=tmp_path / out)
        assert words in (tmp_path / out / "README.md").read_text()


Bars = dict[str, list[int]]  # stage -> bytes due, bytes done


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    seen: Bars = {}

    @contextmanager
    def bar(_: Progress, stage: str, total: int, unit: str = "B") -> Iterator[Callable[[int], None]]:
        counted = seen.setdefault(stage, [0, 0])
        counted[0] += total

        def advance(count: int) -> None:
            counted[1] += count

        yield advance

    monkeypatch.setattr(Progress, "bar", bar)
    return seen


def test_bars_end_where_they_should(folders: list[Path], tmp_path: Path, bars: Bars) -> None:
    quick_merge(folders[0], folders[1:], out=tmp_path / "out")
    quick_localize(folders[0], folders[1], out=tmp_path / "loc")
    quick_stitch(folders[0], tmp_path / "loc", out=tmp_path / "stitched")
    assert bars.keys() == {"localizing", "merging", "writing", "reading"}  # nothing is fetched of what is here
    assert all(total == done > 0 for total, done in bars.values()), bars


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "streamed"])
def test_only_downloads_are_fetched(
    folders: list[Path], home_hub: LoopbackHub, hub_cache: Path, tmp_path: Path, bars: Bars, cache: bool
) -> None:
    repos = [pushed(home_hub, folder) for folder in folders]
    quick_merge(repos[0], repos[1:], out=tmp_path / "out", cache=cache)
    total, done = bars.pop("fetching")
    assert total == done > 0
    quick_merge(repos[0], [folders[1]], out=tmp_path / "again", cache=cache)
    assert bars.get("fetching", [0, 0])[0] == bars.get("fetching", [0, 0])[1]
    assert cache != ("fetching" in bars)
