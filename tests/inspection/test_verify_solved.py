"""`verify` solves for values of a refit without data once more, notices others, and says what it did not look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import edit_manifest, replace_tensor
from helpers.families import build, family, finetunes
from helpers.models import load
from helpers.runs import quick_localize, quick_merge
from safetensors.torch import save_file

from hf_locstitch import VerifyReport, load_mask, verify
from hf_locstitch.inspection.verification import refit_layers, refits, solved

HIT = "model.layers.0.self_attn.q_proj.weight"
VECTOR = "model.layers.1.post_attention_layernorm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
KINDS = {
    "linear": HIT,
    "router": "model.layers.0.block_sparse_moe.gate.weight",
    "vector": VECTOR,
    "expert": EXPERT,
    "expert's way out": "model.layers.0.block_sparse_moe.experts.3.w2.weight",
    "embedding": "model.embed_tokens.weight",
}
JOINT: dict[str, Any] = {"localizer": {"method": "joint"}, "stitch": "refit"}


def shorten(folders: list[Path], factor: float) -> list[Path]:
    """The finetunes so many times as far from the base."""
    base = load(folders[0])
    for folder in folders[1:]:
        state = {name: base[name] + factor * (tensor - base[name]) for name, tensor in load(folder).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


@pytest.fixture(scope="module", params=["short", "cut back"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A mixture of experts, three finetunes, and their merge: of updates that are short, or so long that the solution
    is cut back."""
    root = tmp_path_factory.mktemp("made")
    folders = shorten(finetunes(root, "mixtral", count=3), 0.03 if request.param == "short" else 1.0)
    quick_merge(folders[0], folders[1:], out=root / "out", **JOINT)
    return [root / "out", *folders]


@pytest.fixture
def merge(made: list[Path], tmp_path: Path) -> list[Path]:
    """The same, with a copy of the merge to damage."""
    shutil.copytree(made[0], tmp_path / "out")
    return [tmp_path / "out", *made[1:]]


def check(merge: list[Path], tensors: Any = "all") -> VerifyReport:
    return verify(merge[0], base=merge[1], finetuned=merge[2:], tensors=tensors)


def test_a_good_merge_holds_and_every_value_was_looked_at(merge: list[Path]) -> None:
    report = check(merge)
    assert report.ok and report.findings == (), report.describe()
    assert report.refitted is not None and not report.refitted.sampled and not report.refitted.hashed
    mask = load_mask(str(merge[0]))
    due = {name: int(part.sum()) for name, part in mask.items() if part.any()}
    assert set(report.refitted.recomputed) == due.keys() and report.refitted.values == sum(due.values())
    assert f"refitted   {sum(due.values()):,} values recomputed; all of {len(due)} tensors" in report.describe()
    assert [skipped.what for skipped in report.skipped] == ["top k"]
    total = sum(part.numel() for part in mask.values())
    assert report.checked.masks == 1 and f"masks      one joint mask over N = {total:,} elements" in report.describe()


CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "a thousand": lambda values, _: torch.full_like(values, 1e3),
    "twenty times": lambda values, _: 20 * values,
    "not a number": lambda values, _: torch.full_like(values, torch.nan),
    "the base": lambda _, base: base,
    "half way": lambda values, base: (values + base) / 2,
}


@pytest.mark.parametrize(
    ("kind", "change"), [*((kind, "half way") for kind in KINDS), *(("linear", change) for change in CHANGES),
                         ("vector", "not a number"), ("expert", "twenty times"), ("embedding", "a thousand")]
)  # fmt: skip
def test_other_values_behind_an_adjusted_hash(merge: list[Path], kind: str, change: str) -> None:
    name = KINDS[kind]
    mask, base = load_mask(str(merge[0])).get(name), load(merge[1])[name]
    if mask is None:
        mask, base = torch.ones_like(base, dtype=torch.bool), base + 1
    replace_tensor(merge[0], name, lambda tensor: torch.where(mask, CHANGES[change](tensor, base), tensor))
    found = check(merge).findings
    assert {finding.part for finding in found} == {"values"}
    assert all(name == finding.where or "experts" in finding.where for finding in found) and found


@pytest.mark.parametrize("kind", ["linear", "vector", "expert"])
def test_one_value_of_small_tensors(merge: list[Path], kind: str) -> None:
    name = KINDS[kind]
    at = load_mask(str(merge[0]))[name].flatten().nonzero()[-1]
    replace_tensor(merge[0], name, lambda tensor: tensor.flatten().index_add(0, at, torch.ones(1)).view_as(tensor))
    found = check(merge).findings
    assert {finding.where for finding in found} <= {name, "model.layers.1.mlp.experts.gate_up_proj[2]"}
    assert any("1 are wrong" in finding.what or "as a norm" in finding.what for finding in found)


@pytest.mark.parametrize("kind", ["linear", "expert"])
def test_a_solution_as_long_as_is_allowed_and_of_another_direction(merge: list[Path], kind: str) -> None:
    """Whether a layer was cut back is not taken from its length alone."""
    name, base = KINDS[kind], load(merge[1])[KINDS[kind]]
    mask = load_mask(str(merge[0]))[name]
    most = max(0.3 * base.norm(), *((load(folder)[name] - base).norm() for folder in merge[2:]))
    change = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)) * mask
    replace_tensor(merge[0], name, lambda _: base + change * (most / change.norm()))
    assert any(finding.where == name and "a refitted value" in finding.what for finding in check(merge).findings)


@pytest.mark.parametrize("kind", ["linear", "expert"])
def test_a_solution_stretched_to_what_is_allowed(merge: list[Path], kind: str) -> None:
    name, base = KINDS[kind], load(merge[1])[KINDS[kind]]
    most = max(0.3 * base.norm(), *((load(folder)[name] - base).norm() for folder in merge[2:]))
    length = (load(merge[0])[name] - base).norm()
    factor = most / length if length < 0.9 * most else 0.7  # or made shorter where it was cut back
    replace_tensor(merge[0], name, lambda tensor: base + factor * (tensor - base))
    assert any(finding.where == name and "a refitted value" in finding.what for finding in check(merge).findings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("localizer", [{"method": "joint"}, {"method": "joint", "density": 1}, {"density": 0.1}])
def test_solved_values_are_checked(dtype: torch.dtype, localizer: dict[str, object], tmp_path: Path) -> None:
    folders = family(build("llama", dtype), tmp_path)
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", localizer=localizer, stitch="refit", scale=0.8)
    report = check([tmp_path / "out", *folders])
    assert report.ok, report.describe()
    mask = load_mask(str(tmp_path / "out"), "ft0")[HIT]
    start, tuned = load(folders[0])[HIT], load(folders[1])[HIT]
    replace_tensor(tmp_path / "out", HIT, lambda tensor: torch.where(mask, start + 0.4 * (tuned - start), tensor))
    found = check([tmp_path / "out", *folders]).findings
    assert any("a refitted value" in finding.what and finding.where == HIT for finding in found)


def test_one_full_mask_of_several_that_share_an_input(tmp_path: Path) -> None:
    """The solver goes on from a dense solution inside a full mask, too, if another layer's is not full."""
    folders = finetunes(tmp_path)
    base = load(folders[0])
    for folder in folders[1:]:  # all of q_proj changes more than anything else
        state = load(folder)
        state[HIT] = base[HIT] + 100 * (state[HIT] - base[HIT])
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", stitch="refit", localizer={"density": 0.3})
    masks = load_mask(str(tmp_path / "out"), "ft")
    assert masks[HIT].float().mean() > 0.95 and not masks[HIT.replace("q_proj", "v_proj")].all()
    assert check([tmp_path / "out", *folders]).ok


def test_a_sample_says_what_it_left_out(merge: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    report = check(merge, tensors=3)
    assert report.ok and report.refitted is not None and len(report.refitted.hashed) == 2  # of four vectors
    assert f"by hash only 2 tensors ({', '.join(report.refitted.hashed)})" in report.describe()
    assert "values under the masks of 2 refitted tensors" in report.verdict
    monkeypatch.setattr(refits, "WORK", 0)
    report = check(merge, tensors=3)
    assert report.refitted is not None and len(report.refitted.recomputed) == 2 and len(report.refitted.hashed) > 30
    monkeypatch.undo()
    monkeypatch.setattr(solved, "WORK", 0)
    monkeypatch.setattr(refit_layers, "EXPERTS", 1)
    report = check(merge)
    assert report.ok and report.refitted is not None
    assert HIT in report.refitted.sampled and "some rows of" in report.describe()
    experts = [name for name in report.refitted.hashed if "experts" in name]
    assert len(experts) == 2 * 3 * 3  # layers, matrices, all experts but one
    assert report.as_json()["refitted"]["hashed"] == report.refitted.hashed


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 10**9, "stitch.steps is 1000000000"),
        ("ridge", "much", "stitch.ridge is much"),
        ("ridge", 5.0, "a refitted value"),
        ("low_rank", True, "stitch.low_rank is True, expected False"),
        ("refitted", None, "values are wrong"),
    ],
)
def test_what_a_manifest_says_of_it(merge: list[Path], field: str, value: Any, words: str) -> None:
    edit_manifest(merge[0], lambda record: record["stitch"].update({field: value}))
    report = check(merge)
    assert not report.ok and words in "\n".join(map(str, report.findings))


def test_localized_values_that_were_solved_for(tmp_path: Path) -> None:
    folders = [tmp_path / "l", *finetunes(tmp_path, count=1)]
    quick_localize(folders[1], folders[2], out=folders[0], stitch="refit", localizer={"density": 0.2})
    report = check(folders)
    assert report.ok and report.refitted is not None and not report.skipped
    mask = load_mask(str(folders[0]))
    assert report.refitted.values == sum(int(part.sum()) for part in mask.values()) > 0
    assert "recomputed from" not in report.describe()  # no value is the finetuned model's own
    file = f"values/{folders[2].name}.safetensors"
    for name in (HIT, VECTOR):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(folders[0], tmp_path / "other")
        replace_tensor(tmp_path / "other", name, lambda values: values * 1.5, file)
        found = check([tmp_path / "other", *folders[1:]]).findings
        assert {finding.where for finding in found} == {name}


def test_what_was_fitted_to_data_is_not(tmp_path: Path) -> None:
    from helpers.data import write_texts

    folders = family(build("llama", torch.float32), tmp_path)
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", 8, seed=seed)) for seed in range(2)]
    stitch = {"inputs": 8, "held_out": 0, "lambdas": [0.1]}
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", stitch=stitch, data=data)
    report = check([tmp_path / "out", *folders], tensors=8)
    assert report.ok and "no value recomputed; by hash only" in report.describe()
    assert "the fit is not repeated" in report.describe()
    stitch = {"inputs": 8, "held_out": 0, "lambdas": ["inf"]}  # so what was found without data is kept
    quick_merge(folders[0], folders[1:], out=tmp_path / "kept", stitch=stitch, data=data)
    report = check([tmp_path / "kept", *folders])
    assert report.ok and report.refitted is not None and report.refitted.recomputed and not report.refitted.hashed


def test_a_router_of_few_experts_over_wide_inputs(tmp_path: Path) -> None:
    """Its system is badly conditioned: ten steps in float32 and in float64 end in other values, and both are honest."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, num_local_experts=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.002 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "ft")
    density = {"density": 0.1, "scope": "tensor"}
    quick_localize(tmp_path / "base", tmp_path / "ft", out=tmp_path / "l", localizer=density, stitch="refit")
    report = verify(tmp_path / "l", base=tmp_path / "base", finetuned=[tmp_path / "ft"])
    assert report.ok, report.describe()
