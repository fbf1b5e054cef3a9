"""Where models run: what a command asks for takes the place of what the recipe says, where anything runs at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.models import finetune, random_state, save
from psutil import virtual_memory

from hf_locstitch.cli.main import main
from hf_locstitch.errors import RecipeError, RequestError
from hf_locstitch.localize.cost import free_memory
from hf_locstitch.plan.describe import format_plan
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe
from hf_locstitch.runtime.devices import in_float64
from hf_locstitch.runtime.settings import make_settings
from hf_locstitch.tasks.loading import find_device


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    base = random_state(0)
    folders = [save(tmp_path / "base", base), *(save(tmp_path / f"ft{i}", finetune(base, i)) for i in (1, 2))]
    return {"base": str(folders[0]), "finetuned": [str(folder) for folder in folders[1:]], "strict": True}


def test_masks_by_magnitude_are_found_on_the_processors(fields: dict[str, Any]) -> None:
    plan = make_plan(make_recipe(fields), make_settings(device="cuda"))
    assert "note       --device cuda changes nothing: no model runs here" in format_plan(plan)
    assert "changes nothing" not in format_plan(make_plan(make_recipe(fields), make_settings(device="cpu")))


@pytest.mark.parametrize("device", ["cuda:7", "xpu", "meta", "toaster"])
def test_a_device_that_is_not_here(device: str) -> None:
    with pytest.raises(RequestError, match=f"{device}.*Use (--device )?auto"):
        find_device(device)


@pytest.mark.parametrize(("kind", "float64"), [("cuda", True), ("mps", False), ("xpu", False)])
def test_auto_is_the_accelerator_that_torch_finds(monkeypatch: pytest.MonkeyPatch, kind: str, float64: bool) -> None:
    accelerator = Mock(is_available=lambda: True, device_count=lambda: 2, current_device_index=lambda: 1)
    accelerator.current_accelerator = lambda: torch.device(kind)
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: Mock(has_fp64=False))
    assert find_device("auto") == find_device(kind) == torch.device(kind, 1)
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto", float64=True) == (torch.device(kind, 1) if float64 else torch.device("cpu"))
    if not float64:
        with pytest.raises(RequestError, match=f"{kind} does not compute in float64"):
            find_device(kind, float64=True)


def test_float64_on_a_device_without_it() -> None:
    values = Mock(device=torch.device("mps"))
    assert in_float64(values) is values.cpu().double()
    assert in_float64(torch.ones(2)).dtype == torch.float64


def test_the_memory_of_any_accelerator_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that tells nothing shares the machine's."""
    asked: list[str] = []
    telling = SimpleNamespace(mem_get_info=lambda device: (asked.append(str(device)), (3, 7))[1])
    modules = {"xpu:1": telling, "mps:0": SimpleNamespace()}
    monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
    assert free_memory("xpu:1") == 3 and asked == ["xpu:1"]
    assert 0 < free_memory("mps:0") <= virtual_memory().total and free_memory("cpu") > 0


@pytest.mark.parametrize("device", ["CUDA", "cuda:", "cuda:x", "", "cuda 1"])
def test_what_is_no_name(device: str) -> None:
    with pytest.raises(RecipeError, match="no name of a device"):
        make_settings(device=device)


def test_a_recipe_takes_any_device(fields: dict[str, Any]) -> None:
    recipe = make_recipe({**fields, "stitch": {"method": "refit", "device": "cuda:1"}})
    assert recipe.fitting is not None and recipe.fitting.device == "cuda:1"
    with pytest.raises(RecipeError, match=r"stitch.*device"):
        make_recipe({**fields, "stitch": {"method": "refit", "device": "no device"}})


def test_the_command_overrides_the_recipe(fields: dict[str, Any], tmp_path: Path) -> None:
    from hf_locstitch.plan.device import with_device

    recipe = make_recipe({**fields, "localizer": {"method": "joint", "device": "cuda"}, "stitch": "refit"})
    moved, said = with_device(recipe, "cpu")
    assert not said and moved.fitting is not None
    assert (moved.localizer.device, moved.fitting.device) == ("cpu", "cpu")  # type: ignore[union-attr]
    command = ["merge", "--base", fields["base"], "--ft", *fields["finetuned"], "--out", str(tmp_path / "out")]
    assert main([*command, "--density", "0.3", "--device", "auto", "--no-figures"]) == 0
    assert main([*command[:-1], str(tmp_path / "other"), "--device", "toaster!", "--no-figures"]) == 2
