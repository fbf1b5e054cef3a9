"""The core without torch, and what is said where a package is missing."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_locstitch import RequestError
from hf_locstitch.comparison.search import check_search
from hf_locstitch.evaluation.evaluate import evaluate
from hf_locstitch.evaluation.tracking import find_tracker
from hf_locstitch.plan.compare_options import CompareOptions
from hf_locstitch.runtime.packages import EXTRA, install_command, installed, need

HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft"}
ROOT = Path(__file__).parents[2]


def test_the_core_needs_no_torch() -> None:
    script = Path(__file__).with_name("light_core.py")
    done = subprocess.run([sys.executable, script, *sorted(HEAVY), "lm_eval"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_its_requirements_are_the_others() -> None:
    """requirements-light.txt against pyproject.toml."""
    declared = {Requirement(line) for line in requires("hf-locstitch") or () if "extra ==" not in line}
    light = {Requirement(line) for line in (ROOT / "requirements-light.txt").read_text().splitlines() if line[0] != "#"}
    assert light == {one for one in declared if one.name not in HEAVY} and {one.name for one in declared} > HEAVY


def test_every_extra_that_is_named_exists() -> None:
    extras = {Requirement(line).name.replace("-", "_"): line for line in requires("hf-locstitch") or ()}
    brought_by = {"authlib": "gradio"}  # by gradio[oauth]
    for package, extra in EXTRA.items():
        assert f'extra == "{extra}"' in extras[brought_by.get(package, package)]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "optuna", "trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=r"evaluating on mmlu needs lm_eval, .* pip install 'hf-locstitch\[eval\]'"):
        evaluate("nobody/has-this", tasks=["mmlu"])  # before the Hub is asked
    with pytest.raises(RequestError, match=r"--track trackio needs .*'hf-locstitch\[track\]'"):
        find_tracker("trackio")
    with pytest.raises(RequestError, match=r"--track wandb needs .* pip install wandb\."):
        find_tracker("wandb")
    asked = {"grid": {"density": [0.1, 0.2, 0.3]}, "select": {"tasks": ["mmlu"]}, "trials": 2}
    options = CompareOptions.model_validate(asked)
    with pytest.raises(RequestError, match=r"needs optuna, .*'hf-locstitch\[search\]'\. Or drop trials"):
        check_search(options)


def test_several_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))  # it has no spec
    assert installed("made_up") and installed("json") and not installed("surely_not_there")
    need("this", "json", "made_up")
    assert install_command("lm_eval", "optuna", "peft") == "pip install 'hf-locstitch[eval,search]' peft"
    with pytest.raises(RequestError, match="this needs surely_not_there and nor_this, which are not installed"):
        need("this", "json", "surely_not_there", "nor_this")
