"""The combinations of a comparison, as recipes."""

from __future__ import annotations

from typing import Any

import pytest

from hf_locstitch.comparison.cells import Cell, all_settings, make_cells
from hf_locstitch.comparison.sharing import largest_densities
from hf_locstitch.plan.compare_options import CompareOptions

FIELDS = {"base": "./base", "finetuned": ["./a", "./b"]}


def cells(grid: Any, **fields: Any) -> list[Cell]:
    options = CompareOptions.model_validate({"grid": grid, "select": {"suite": "quick"}})
    made = make_cells({**FIELDS, **fields}, all_settings(options))
    return list({cell.identity: cell for cell in made.values()}.values())


def test_what_a_method_does_not_have_is_left_out() -> None:
    found = cells(
        {"density": [0.1, 0.2], "scope": ["model", "tensor"], "method": ["ties", "dare", "average"]},
        localizer={"density": 0.3},
    )
    assert [cell.label for cell in found if not cell.label.startswith("ties")] == [
        "dare, density 0.1", "average", "dare, density 0.2",
    ]  # fmt: skip
    assert len(found) == 4 + 3 and [cell.density for cell in found[:2]] == [0.1, 0.1]
    assert found[-1].recipe.localizer is None or found[-1].recipe.localizer.density == 0.2


def test_a_method_with_a_density_for_each_finetune_takes_no_other() -> None:
    own = {"name": "dare", "densities": [0.1, 0.3]}
    found = cells({"method": [own, "dare"], "density": [0.2, 0.4]})
    assert [cell.label for cell in found] == [
        "dare (densities [0.1, 0.3])", "dare, density 0.2", "dare, density 0.4",
    ]  # fmt: skip
    over = cells({"density": [0.2, 0.4]}, method=own)  # the grid's takes the place of the recipe's
    assert [(cell.recipe.method.name, cell.density) for cell in over] == [("dare", 0.2), ("dare", 0.4)]
    assert not any(cell.recipe.method.densities for cell in over)


def test_data_goes_where_it_is_used() -> None:
    data = ["alpaca", "gsm8k"]
    found = cells({"localizer": ["magnitude", "saliency"], "method": ["locstitch", "regmean", "average"]}, data=data)
    uses = {cell.label: bool(cell.recipe.data) for cell in found}
    assert uses == {"locstitch, magnitude": False, "regmean": True, "average": False, "locstitch, saliency": True}


def test_several_grids_are_added_up() -> None:
    found = cells([{"density": 0.1}, {"localizer": "joint", "stitch": "refit", "density": [0.2, 0.3]}])
    assert [cell.label for cell in found] == [
        "density 0.1", "joint, density 0.2, stitch refit", "joint, density 0.3, stitch refit",
    ]  # fmt: skip


def test_settings_of_another_localizer_do_not_stay() -> None:
    found = cells({"localizer": ["magnitude", "saliency"]}, localizer={"method": "mask", "epochs": 3, "density": 0.2},
                  data=["alpaca", "gsm8k"])  # fmt: skip
    assert [(cell.recipe.localizer.method, cell.density) for cell in found if cell.recipe.localizer] == [
        ("magnitude", 0.2), ("saliency", 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("localizers", "scans"),
    [
        (["magnitude"], 1),
        (["magnitude", {"method": "saliency", "at": [0.5]}, {"method": "saliency", "at": [0.0]}], 3),
        ([{"method": "mask"}], 2),  # where it starts depends on its density
    ],
)
def test_localizers_that_score_alike_share_a_scan(localizers: list[Any], scans: int) -> None:
    found = cells({"localizer": localizers, "density": [0.1, 0.2], "scale": [1, 2]}, data=["alpaca", "gsm8k"])
    shared = largest_densities(cell.recipe.localizer for cell in found if cell.recipe.localizer is not None)
    assert len(shared) == scans and max(value or 0 for value in shared.values()) == 0.2
