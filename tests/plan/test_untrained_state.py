"""State that no gradient reaches, such as biases of routers, is left out where data is used, and this is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers.data import ROWS, write_jsonl
from helpers.families import build, family
from helpers.grafted import open_grafted
from helpers.models import load
from helpers.runs import quick_localize, quick_merge
from safetensors.torch import save_file

from hf_locstitch import Saliency, load_localized, load_mask, plan_merge
from hf_locstitch.cli.main import main
from hf_locstitch.errors import MismatchError
from hf_locstitch.tasks.objectives.causal_lm import CausalLM

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
HOW = Saliency(density=0.1)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A tiny DeepSeek-V3 and two finetunes whose routers' biases were balanced anew, and rows."""
    made = family(build("deepseek-v3", torch.float32), tmp_path)
    for number, folder in enumerate(made):
        state = {**load(folder), BIAS: torch.arange(4.0) * number}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return made


def test_it_stays_the_bases_with_data(folders: list[Path], tmp_path: Path) -> None:
    result = quick_merge("base", ["ft0", "ft1"], out="out", localizer=HOW, data=["rows.jsonl"] * 2)
    (note,) = [warning for warning in result.manifest.warnings if "no gradient" in warning]
    assert note.startswith(f"{BIAS}: state that no gradient reaches is not localized by saliency")
    assert torch.equal(load(tmp_path / "out")[BIAS], torch.zeros(4))
    assert BIAS not in load_mask("out", "ft0")
    assert yaml.safe_load(Path("out/locstitch.yaml").read_text())["exclude"] == ["*.e_score_correction_bias"]
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet", "--no-figures"]) == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert weights[0] == weights[1]
    quick_localize("base", "ft0", out="localized", localizer=HOW, data=["rows.jsonl"])
    assert BIAS not in load_localized("localized").shapes


def test_without_data_it_is_localized(folders: list[Path]) -> None:
    plan = plan_merge({"base": "base", "finetuned": ["ft0"]})
    assert BIAS in {info.name for info in plan.mask_tensors} and not any("gradient" in one for one in plan.warnings)


def test_by_its_own_name_it_is_an_error_of_the_user(folders: list[Path]) -> None:
    with pytest.raises(MismatchError, match="e_score_correction_bias is to be localized but is not a parameter"):
        quick_merge("base", ["ft0"], out="out", localizer=HOW, data=["rows.jsonl"], include=[BIAS, "*.gate.weight"])


def test_gradients_are_taken_with_the_bases_routing(folders: list[Path]) -> None:
    names = [name for name in load(folders[0]) if name != BIAS and ".layers." in name]
    grafted, _ = open_grafted((folders[0], folders[2]), CausalLM(), names)
    assert torch.equal(grafted.model.get_buffer(BIAS), torch.zeros(4))
