"""Refits under torchrun: the values of one process, but for the order in which float32 is added up."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.data import write_texts
from helpers.families import build, family
from helpers.in_threads import fit_in
from helpers.launch import launch
from helpers.models import load, same_bits
from helpers.refits import SMALL, distance, read_record
from helpers.runs import Killed
from safetensors.torch import save_file

from hf_locstitch.cli.main import main
from hf_locstitch.runtime import journal
from hf_locstitch.stitch.fitted_values import FittedWriter
from hf_locstitch.stitch.methods.fisher import Fisher
from hf_locstitch.stitch.methods.regmean import RegMean
from hf_locstitch.stitch.methods.regmean_plusplus import RegMeanPlusPlus

CLOSE = 1e-4  # of the largest change that the refit makes to the plain stitch
GRID = [1.0, 3.0, "inf"]  # less, and conjugate gradients make more of a last digit: batches of another size would, too


def write_family(root: Path, kind: str, **stitch: Any) -> list[Path]:
    """A base, two finetunes, their inputs, and recipe.yaml, which refits them."""
    fields = {
        "base": "./base",
        "finetuned": ["./ft0", "./ft1"],
        "localizer": {"method": "magnitude", "density": 0.3},
        "data": [f"./{write_texts(root / f'{seed}.jsonl', seed=seed).name}" for seed in range(2)],
        "stitch": {**SMALL, **stitch},
        "figures": False,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(fields))
    (root / "mean.yaml").write_text(yaml.safe_dump({k: v for k, v in fields.items() if k not in ("data", "stitch")}))
    return family(build(kind, torch.float32), root)


def merge(recipe: str, out: str) -> None:
    """In this process."""
    assert main(["merge", f"{recipe}.yaml", "--out", out, "--quiet"]) == 0


def merge_in(count: int, root: Path, out: str) -> None:
    done = launch(count, root, "recipe.yaml", "--out", out, "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(root.glob(".out*"))


# Of two inputs a task, one fitted to, a third process gets none, and their tokens leave some experts to one task, some
# to none.
@pytest.mark.parametrize(
    ("kind", "count", "how"),
    [
        ("llama", 2, {"states_on": "disk"}),
        ("mixtral", 3, {"inputs": 2, "held_out": 0.5, "tokens": 2}),
    ],
)
def test_values_are_those_of_one_process(
    kind: str, count: int, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, kind, lambdas=GRID, **how)
    merge("mean", "mean")
    merge("recipe", "one")
    merge_in(count, tmp_path, "out")
    one, out = read_record(Path("one")), read_record(Path("out"))
    assert one["stitch"]["refitted"] and one["stitch"]["lambda"] != "inf"
    far = distance(Path("one"), Path("mean"))
    assert distance(Path("one"), Path("out")) < CLOSE * far
    scores = [record["stitch"].pop("disagreement") for record in (one, out)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert out["stitch"] == one["stitch"]


def write_method(root: Path, kind: str, name: str, **how: Any) -> None:
    """recipe.yaml merges by a method that looks at inputs, mean.yaml by the mean."""
    write_family(root, kind)
    fields = yaml.safe_load((root / "recipe.yaml").read_text())
    del fields["localizer"], fields["stitch"]
    fields["method"] = {"name": name, "device": "cpu", **how}
    (root / "recipe.yaml").write_text(yaml.safe_dump(fields))
    (root / "mean.yaml").write_text(
        yaml.safe_dump({k: v for k, v in fields.items() if k != "data"} | {"method": "average"})
    )


def check_as_one() -> None:
    """`out` is what one process makes, but for rounding."""
    one, out = read_record(Path("one")), read_record(Path("out"))
    assert len(one["stitch"]["refitted"]) > 7 and out["stitch"] == one["stitch"]
    assert distance(Path("one"), Path("out")) < CLOSE * distance(Path("one"), Path("mean"))


# Of one input a task, a third process gets none.
@pytest.mark.parametrize(
    ("method", "kind", "count", "how"),
    [
        (RegMean, "gpt2", 3, {"inputs": 1}),
        (RegMeanPlusPlus, "llama", 2, {"batch": 3}),
        (Fisher, "llama", 2, {"inputs": 3, "state_on": "disk"}),
    ],
)
def test_methods_are_those_of_one_process(
    method: Any, kind: str, count: int, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_method(tmp_path, kind, method.model_fields["name"].default, **how)
    merge("mean", "mean")
    merge("recipe", "one")
    fit = method.fit
    monkeypatch.setattr(method, "fit", lambda self, job: fit_in(count, partial(fit, self))(job))
    merge("recipe", "out")
    check_as_one()


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    """The second finetune's inputs are the second process's."""
    _, _, broken = write_family(tmp_path, "llama", lambdas=GRID)
    state = load(broken)
    state["model.embed_tokens.weight"].fill_(torch.nan)  # which no mask looks at
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    done = launch(2, tmp_path, "recipe.yaml", "--out", "out", "--quiet")
    assert done.returncode == 2 or "exitcode  : 2" in done.stderr  # torchrun has a status of its own
    assert done.stderr.count("hf-locstitch: error: ") == 1
    assert done.stderr.count("on the inputs of ft1, the outputs of the finetuned model contain NaN") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_two_go_on_where_one_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the values that one had fitted, and so to the same bytes."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, "llama", lambdas=GRID)
    merge("recipe", "one")
    assert read_record(Path("one"))["stitch"]["lambda"] == "1"
    write = FittedWriter.write

    def cut(self: FittedWriter, name: str, *args: Any) -> None:
        if self._folder.name == "3" and len(self.names) == 5:
            raise Killed
        write(self, name, *args)

    monkeypatch.setattr(FittedWriter, "write", cut)
    with pytest.raises(Killed):
        merge("recipe", "out")
    (found,) = tmp_path.glob(".out*/spill/fit/refit.json")
    assert list(journal.read_record(found)["scores"]) == ["1"]
    merge_in(2, tmp_path, "out")
    assert same_bits(load(Path("out")), load(Path("one")))
