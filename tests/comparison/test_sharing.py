"""Which merges of a comparison share a scan."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.language_models import favouring

from hf_locstitch.comparison.compare import plan_comparison
from hf_locstitch.comparison.sharing import Scans


def test_a_device_of_the_command_keeps_scans_shared(tmp_path: Path) -> None:
    """It is not what the recipe says, of which scans are known."""
    for name, word in {"base": "A", "b": "B"}.items():
        favouring(tmp_path / name, word, seed=ord(word))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "A", "completion": "B"}) + "\n")
    fields = {
        "base": str(tmp_path / "base"),
        "finetuned": [str(tmp_path / "b")],
        "data": [str(tmp_path / "rows.jsonl")],
        "localizer": "saliency",
        "compare": {"grid": {"density": [0.1, 0.2]}, "select": {"suite": "quick"}},
    }
    planned = plan_comparison(fields, None, "cpu", where="request")
    scans = Scans(tmp_path / "scans", [cell.recipe for cell in planned.cells.values()])
    shared = [scans.of(cell.recipe, planned.plan(cell)) for cell in planned.cells.values()]
    assert shared[0] == shared[1] and shared[0] is not None
    assert list(planned.largest.groups) == shared[0].most
