"""Components of other packages: installed beside ours, they work like ours, through the command line end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.models import BLOCK_NAMES, SHAPES, finetune, load, random_state, same_bits, save
from helpers.reference import reference_stitch
from helpers.runs import files_of

from hf_locstitch import load_mask
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.localize.localizers.magnitude import Magnitude
from hf_locstitch.stitch.methods import METHODS

Run = Callable[..., subprocess.CompletedProcess[str]]

RELATIVE = '''
"""A localizer: the entries that change most for their size."""

from typing import Literal

import numpy as np

from hf_locstitch.localize.density import TopShare


class Relative(TopShare):
    method: Literal["relative"] = "relative"
    floor: float = 0.01

    def describe(self):
        return f"relative, density {self.density:g}, floor {self.floor:g}, largest change in proportion {self.where}"

    def scores(self, tensor, first, finetuned, base):
        start = base.astype(np.float32)
        return np.abs(finetuned.astype(np.float32) - start) / (np.abs(start) + np.float32(self.floor))
'''
MEDIAN = '''
"""A method: the median of the finetuned models, and so much of it."""

from typing import ClassVar, Literal

import numpy as np

from hf_locstitch.stitch.method import DenseMethod


class Median(DenseMethod):
    name: Literal["median"] = "median"
    title: ClassVar[str] = "Median of theirs"
    paper: ClassVar[str] = "https://example.com/median"
    share: float = 1.0

    def combine(self, base, finetuned, context):
        start = base.astype("f8")
        middle = np.median([values.astype("f8") for values in finetuned], axis=0)
        return (start + self.share * context.scale * (middle - start)).astype(context.dtype)
'''
BROKEN = '''
"""A localizer whose scores are wrong, in a way of its own."""

from typing import Literal

import numpy as np

from hf_locstitch.localize.density import TopShare


class Broken(TopShare):
    method: Literal["broken"] = "broken"
    how: Literal["negative", "nan", "infinite", "short", "long", "column"] = "negative"

    def describe(self):
        return f"broken, {self.how}"

    def scores(self, tensor, first, finetuned, base):
        size = np.abs(finetuned - base)
        if self.how == "negative":
            return -size
        if self.how in ("nan", "infinite"):
            return np.where(size > size.mean(), np.float32(self.how[:3]), size)
        if self.how == "short":
            return size[1:]
        return np.concatenate([size, size]) if self.how == "long" else size[:, None]
'''
ENTRY_POINTS = """
[hf_locstitch.localizers]
relative = theirs.relative:Relative
broken = theirs.broken:Broken
magnitude = theirs.broken:Broken

[hf_locstitch.methods]
median = theirs.median:Median
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages with the package `theirs` in it, as an installer leaves it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "theirs").mkdir()
    (folder / "theirs" / "__init__.py").touch()
    for name, source in {"relative": RELATIVE, "median": MEDIAN, "broken": BROKEN}.items():
        (folder / "theirs" / f"{name}.py").write_text(source)
    about = folder / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base and three finetunes."""
    base = random_state(0)
    save(tmp_path / "base", base)
    for number in range(3):
        save(tmp_path / f"ft{number}", finetune(base, number))
    return tmp_path


@pytest.fixture
def run(site: Path, home: Path) -> Run:
    """The command in a process that finds `theirs` installed."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hf_locstitch", *args]
        return subprocess.run(
            command, cwd=home, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
        )

    return run


def merge(run: Run, *flags: str, out: str = "out") -> subprocess.CompletedProcess[str]:
    inputs = ["--base", "./base", "--ft", "./ft0", "./ft1", "./ft2"]
    return run("merge", *flags, *inputs, "--out", out, "--no-figures", "--quiet")


def succeeded(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


def relative_mask(folder: Path, finetuned: str, density: float, floor: float = 0.01) -> dict[str, torch.Tensor]:
    """Of the blocks, the k largest |τ| / (|base| + floor); there are no ties."""
    base, state = load(folder / "base"), load(folder / finetuned)
    scores = {name: (state[name] - base[name]).abs() / (base[name].abs() + floor) for name in BLOCK_NAMES}
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.sort(descending=True).values[int(density * len(flat)) - 1]
    return {name: score >= threshold for name, score in scores.items()}


def test_they_are_offered_and_told_in_errors(run: Run, home: Path) -> None:
    text = " ".join(run("merge", "--help").stdout.split())
    assert "--localizer {broken,joint,magnitude,mask,relative,saliency}" in text
    assert "median, model-stock, regmean" in text
    done = merge(run, "--localizer", "relatve")
    assert done.returncode == 2 and "relatve" in done.stderr and "Did you mean relative?" in done.stderr
    for fields, words in {
        "localizer: {method: relatve}": ["unknown localizer 'relatve'", "did you mean 'relative'?"],
        "method: medain": ["unknown method 'medain'", "did you mean 'median'?"],
        "method: {name: median, shrae: 0.5}": ["unknown key 'method.shrae'", "did you mean 'share'"],
        "localizer: {method: relative, flor: 1}": ["unknown key 'localizer.flor'", "did you mean 'floor'"],
    }.items():
        (home / "wrong.yaml").write_text(f"{fields}\n")
        done = run("merge", "wrong.yaml", "--base", "./base", "--ft", "./ft0", "--out", "out")
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert not list(home.glob("*out*"))


def test_without_the_package_there_is_no_such_name() -> None:
    assert "relative" not in LOCALIZERS.names() and "median" not in METHODS.names()
    with pytest.raises(KeyError, match=r"'magnitud' is unknown \(did you mean 'magnitude'\?\)"):
        LOCALIZERS.find("magnitud")


def test_a_localizer(run: Run, home: Path) -> None:
    succeeded(merge(run, "--localizer", "relative", "--density", "0.2"))
    masks = [relative_mask(home, f"ft{number}", 0.2) for number in range(3)]
    for number, due in enumerate(masks):
        found = load_mask(home / "out", f"ft{number}")
        assert found.keys() == due.keys() and all(torch.equal(found[name], due[name]) for name in due)
    finetuned = [load(home / f"ft{number}") for number in range(3)]
    assert same_bits(load(home / "out"), reference_stitch(load(home / "base"), finetuned, masks))

    record = json.loads((home / "out" / "locstitch.json").read_text())
    asked = {"method": "relative", "density": 0.2, "scope": "model", "floor": 0.01}
    assert record["localizer"] == asked and record["k"] == record["masks"]["ft0"]["ones"] == int(0.2 * record["N"])
    assert yaml.safe_load((home / "out" / "locstitch.yaml").read_text())["localizer"] == asked
    card = (home / "out" / "README.md").read_text()
    assert "relative, density 0.2, floor 0.01, largest change in proportion over the whole model" in card
    succeeded(run("merge", "out/locstitch.yaml", "--out", "again", "--quiet"))
    assert files_of(home / "again") == files_of(home / "out")
    succeeded(run("verify", "out", "--tensors", "all"))


def test_its_settings_and_scope_from_a_recipe(run: Run, home: Path) -> None:
    recipe = {"localizer": {"method": "relative", "density": 0.5, "scope": "tensor", "floor": 2.0}, "figures": False}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = run("merge", "recipe.yaml", "--base", "./base", "--ft", "./ft0", "--dry-run").stdout
    assert "relative, density 0.5, floor 2, largest change in proportion within each tensor" in said
    succeeded(run("merge", "recipe.yaml", "--base", "./base", "--ft", "./ft0", "--out", "out", "--quiet"))
    found, base, state = load_mask(home / "out", "ft0"), load(home / "base"), load(home / "ft0")
    for name, mask in found.items():
        score = ((state[name] - base[name]).abs() / (base[name].abs() + 2.0)).flatten()
        due = score >= score.sort(descending=True).values[len(score) // 2 - 1]
        assert torch.equal(mask.flatten(), due)


def test_a_localizer_in_steps(run: Run, home: Path) -> None:
    """`localize` and `stitch` with it: the weights of one merge."""
    succeeded(merge(run, "--localizer", "relative", "--density", "0.2"))
    for number in range(3):
        asked = ["--localizer", "relative", "--density", "0.2", "--no-figures", "--quiet"]
        succeeded(run("localize", "--base", "./base", "--ft", f"./ft{number}", "--out", f"loc{number}", *asked))
    record = json.loads((home / "loc1" / "locstitch.json").read_text())
    assert record["localizer"]["method"] == "relative"
    assert "largest change in proportion" in (home / "loc1" / "README.md").read_text()
    parts = [f"./loc{number}" for number in range(3)]
    succeeded(run("stitch", "--base", "./base", "--localized", *parts, "--out", "stitched", "--no-figures", "--quiet"))
    assert same_bits(load(home / "stitched"), load(home / "out"))
    assert json.loads((home / "stitched" / "locstitch.json").read_text())["localizer"]["method"] == "relative"
    assert "largest change in proportion" in (home / "stitched" / "README.md").read_text()


def test_a_method(run: Run, home: Path) -> None:
    succeeded(merge(run, "--method", "median"))
    states = [load(home / f"ft{number}") for number in range(3)]
    base, found = load(home / "base"), load(home / "out")
    median = {name: torch.stack([state[name] for state in states]).median(0).values for name in SHAPES}
    for name in SHAPES:
        torch.testing.assert_close(found[name], median[name], rtol=2e-7, atol=1e-7)
    record = json.loads((home / "out" / "locstitch.json").read_text())
    assert record["method"] == "median" and record["masks"] == {} and record["localizer"] is None
    card = (home / "out" / "README.md").read_text()
    assert "by [Median of theirs](https://example.com/median)" in card and "Median of theirs (share 1.0)" in card

    recipe = {"method": {"name": "median", "share": 0.5}, "scale": 0.5}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeeded(merge(run, "recipe.yaml", out="half"))
    assert yaml.safe_load((home / "half" / "locstitch.yaml").read_text())["method"] == {"name": "median", "share": 0.5}
    half = load(home / "half")
    for name in SHAPES:
        torch.testing.assert_close(half[name], base[name] + (median[name] - base[name]) / 4, rtol=1e-6, atol=1e-7)
    succeeded(run("merge", "half/locstitch.yaml", "--out", "again", "--quiet"))
    assert files_of(home / "again") == files_of(home / "half")


@pytest.mark.parametrize("command", ["merge", "localize"])
@pytest.mark.parametrize("how", ["negative", "nan", "infinite", "short", "long", "column"])
def test_wrong_scores_are_refused(command: str, how: str, run: Run, home: Path) -> None:
    (home / "recipe.yaml").write_text(yaml.safe_dump({"localizer": {"method": "broken", "how": how}}))
    before = sorted(home.rglob("*"))
    done = run(command, "recipe.yaml", "--base", "./base", "--ft", "./ft0", "--out", "out", "--quiet")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    for word in ("the localizer broken", "scores", "model.layers.", "non-negative"):
        assert word in done.stderr, done.stderr
    assert sorted(home.rglob("*")) == before


def test_our_names_cannot_be_taken(run: Run, home: Path) -> None:
    """`theirs` says that magnitude is its own."""
    succeeded(merge(run, "--localizer", "magnitude", "--density", "0.3"))
    found = load_mask(home / "out", "ft0")
    assert LOCALIZERS.find("magnitude") is Magnitude
    assert sum(int(mask.sum()) for mask in found.values()) == int(0.3 * sum(np.prod(SHAPES[n]) for n in BLOCK_NAMES))
    assert "largest |task vector|" in (home / "out" / "README.md").read_text().replace("\\|", "|")
