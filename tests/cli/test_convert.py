"""Configs of mergekit on the command line: merged as they are, or written as recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.models import finetune, load, random_state, same_bits, save

from hf_locstitch.cli.main import main
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.plan.recipe_file import load_recipe

CONFIG = """
merge_method: dare_ties
base_model: ./start
models:
  - model: ./math
    parameters: {weight: 0.5, density: 0.6}
  - model: ./code
    parameters: {weight: [0, 1], density: 0.6}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `hf-locstitch merge` beside models and a config; exit status, standard output, standard error."""
    base = random_state(0)
    for name, state in (("start", base), ("math", finetune(base, 1)), ("code", finetune(base, 2))):
        save(tmp_path / name, state)
    (tmp_path / "config.yml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        status = main(["merge", *args])
        return status, *capsys.readouterr()

    return run


def test_a_config_is_merged_and_says_what_differs(run: Run) -> None:
    status, _, err = run("config.yml", "--out", "out", "--quiet")
    assert status == 0
    assert "warning: config.yml: which entries are dropped is drawn by another generator" in err
    assert load(Path("out")).keys() == load(Path("start")).keys()


def test_its_recipe_makes_the_same_merge(run: Run) -> None:
    status, out, err = run("config.yml", "--convert")
    assert status == 0 and "drawn" in err
    written = yaml.safe_load(out)
    assert written["method"]["name"] == "dare-ties" and written["method"]["density"] == 0.6
    assert written["weights"][1] == {
        "model.layers.0.*": 0.0, "model.layers.1.*": 0.1, "model.layers.10.*": 1.0, "*": 0.0,
    }  # fmt: skip
    assert run("config.yml", "--convert", "recipe.yaml")[:2] == (0, "")
    assert Path("recipe.yaml").read_text() == out
    assert run("config.yml", "--out", "one", "--quiet")[0] == run("recipe.yaml", "--out", "other", "--quiet")[0] == 0
    assert same_bits(load(Path("one")), load(Path("other")))


def test_flags_are_in_the_recipe_that_is_written(run: Run) -> None:
    status, out, _ = run("config.yml", "--convert", "--dtype", "bfloat16", "--density", "0.3")
    assert status == 0
    assert yaml.safe_load(out)["dtype"] == "bfloat16"
    assert yaml.safe_load(out)["method"]["density"] == 0.3


def test_where_it_goes_and_how_it_is_judged_are_in_it_too(run: Run) -> None:
    judged = {
        "data": {"rows": {"ref": "./rows.jsonl", "objective": {"kind": "causal-lm", "max_length": 64}}},
        "limit": 5,
    }
    compared = {"grid": {"density": [0.1, 0.2]}, "select": {"tasks": ["arc_easy"], "objective": "causal-lm"}}
    Path("config.yml").write_text(CONFIG + yaml.safe_dump({"evaluate": judged, "compare": compared, "strict": True}))
    flags = ["--out", "there", "--adapter", "beside", "--push-to", "org/merge", "--create-pr"]
    assert run("config.yml", "--convert", "recipe.yaml", *flags)[0] == 0
    written, asked = load_recipe(Path("recipe.yaml")), load_recipe(Path("config.yml"))
    goes = {"out": "there", "adapter": "beside", "push_to": "org/merge", "create_pr": True}
    assert make_recipe(written) == make_recipe({**asked, **goes})
    assert written["evaluate"]["limit"] == 5 and written["strict"]


def test_nothing_is_overwritten(run: Run) -> None:
    status, _, err = run("config.yml", "--convert", "config.yml")
    assert status == 2 and "config.yml: File exists" in err
    assert Path("config.yml").read_text() == CONFIG


def test_a_config_may_say_where_the_merge_goes(run: Run) -> None:
    Path("config.yml").write_text(f"{CONFIG}out: there\nstrict: false\n")
    assert run("config.yml", "--quiet")[0] == 0
    assert Path("there/model.safetensors").exists()


def test_what_cannot_be_translated_is_an_invalid_request(run: Run) -> None:
    Path("config.yml").write_text("merge_method: nearswap\nmodels: [{model: ./math}]\n")
    status, out, err = run("config.yml", "--out", "out")
    assert (status, out) == (2, "")
    assert "merge_method nearswap" in err and not Path("out").exists()


def test_several_merges_in_one_file_are_refused(run: Run) -> None:
    Path("config.yml").write_text(f"name: first\n{CONFIG}---\n{CONFIG}")
    status, _, err = run("config.yml", "--dry-run")
    assert status == 2 and "expected a single document" in err
