"""The refit without data, end to end: from folders and the Hub, in any number of processes, killed, verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.families import build, family, finetunes
from helpers.launch import launch
from helpers.many_models import MANY
from helpers.models import load, same_bits, save
from helpers.runs import Killed, files_of, quick_merge
from safetensors.torch import save_file

from hf_locstitch import RequestError, load_mask, localize_from_hub
from hf_locstitch.cli.main import main
from hf_locstitch.errors import NonFiniteError, StrictError
from hf_locstitch.stitch.dataless import layers
from hf_locstitch.stitch.fitted_values import FittedWriter
from loopback_hub import LoopbackHub

JOINT: dict[str, Any] = {"localizer": {"method": "joint"}, "stitch": "refit"}


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "locstitch.json").read_text())


def merge(folders: list[Path], out: Path, **asked: Any) -> dict[str, torch.Tensor]:
    quick_merge(folders[0], folders[1:], out=out, **{**JOINT, **asked})
    return load(out)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "clip", "mixtral", "qwen3-moe"])
def test_one_finetune_alone_is_itself_under_a_full_mask(kind: str, tmp_path: Path) -> None:
    folders = family(build(kind, torch.float32), tmp_path)
    out = merge(folders[:2], tmp_path / "out", localizer={"method": "joint", "density": 1})
    base, tuned = load(folders[0]), load(folders[1])
    localized = load_mask(str(tmp_path / "out")).keys()
    assert localized
    for name, values in out.items():
        assert torch.allclose(values, tuned[name] if name in localized else base[name], atol=1e-6), name
    assert not record_of(tmp_path / "out")["stitch"]["kept_plain"]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_outside_the_joint_mask_are_the_bases_bytes(kind: str, tmp_path: Path) -> None:
    folders = family(build(kind, torch.bfloat16), tmp_path)
    out, base = merge(folders, tmp_path / "out"), load(folders[0])
    mask = load_mask(str(tmp_path / "out"), "ft0")
    record = record_of(tmp_path / "out")
    assert sum(int(one.sum()) for one in mask.values()) == record["k"] == record["N"] * 3 // 10
    changed = 0
    for name, values in out.items():
        kept = mask.get(name, torch.zeros(values.shape, dtype=torch.bool))
        assert torch.equal(values[~kept], base[name][~kept]), name
        changed += int((values != base[name]).sum())
    assert changed > 0.9 * record["k"]


def test_one_mask_file_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", **JOINT)
    out, record = tmp_path / "out", record_of(tmp_path / "out")
    assert [file.name for file in (out / "masks").iterdir()] == ["joint.safetensors"]
    assert {mask["file"] for mask in record["masks"].values()} == {"masks/joint.safetensors"}
    masks = [load_mask(str(out), name) for name in ("ft0", "ft1", None, "joint")]
    assert all(torch.equal(mask[name], masks[0][name]) for mask in masks for name in mask)
    assert main(["verify", str(out), "--base", str(folders[0]), "--ft", *map(str, folders[1:])]) == 0
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "30.00 % by 1 masks" in said and "overlap" not in said and "no anomalies" in said
    card = (out / "README.md").read_text()
    assert "one joint mask" in card and "WUDI-Merging" in card and "RegMean" in card and "unlabelled" not in card
    assert "one mask for all finetunes" in card and "Jaccard" not in card


def test_any_order_and_any_number_of_processes(tmp_path: Path) -> None:
    folders = finetunes(tmp_path, count=3)
    first = merge(folders, tmp_path / "out")
    base, one, two, three = folders
    for number, order in enumerate([(three, two, one), (two, three, one)]):
        assert same_bits(first, merge([base, *order], tmp_path / f"out{number}"))
    flags = ["--base", str(folders[0]), "--ft", *map(str, folders[1:]), "--localizer", "joint", "--stitch", "refit"]
    ran = launch(2, tmp_path, *flags, "--out", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    assert same_bits(first, load(tmp_path / "two"))
    assert record_of(tmp_path / "two")["stitch"] == record_of(tmp_path / "out")["stitch"]


@pytest.mark.parametrize("folder", ["dense", "values"])
def test_a_killed_one_goes_on(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    quick_merge(folders[0], folders[1:], out=tmp_path / "due", **JOINT)
    end = FittedWriter.end
    written: list[tuple[str, str]] = []
    kill = True

    def note(self: FittedWriter, name: str) -> None:
        place = self._folder.name
        if kill and place == folder and sum(of == place for of, _ in written) == 5:
            raise Killed
        end(self, name)
        written.append((place, name))

    monkeypatch.setattr(FittedWriter, "end", note)
    with pytest.raises(Killed):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", **JOINT)
    before, kill = set(written), False
    written.clear()
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", **JOINT)
    again = before & set(written)
    assert len(before) >= 5 and len(again) <= 2  # the last layer's, if not all of its tensors were written
    assert files_of(tmp_path / "out") == files_of(tmp_path / "due")


def test_from_the_hub_and_back(tmp_path: Path, home_hub: LoopbackHub) -> None:
    folders = family(build("llama", torch.bfloat16), tmp_path)
    for folder in folders:
        home_hub.add_repo(f"dataless/{folder.name}", {file.name: file for file in folder.iterdir()})
    inputs = ["--base", "dataless/base", "--ft", "dataless/ft0", "dataless/ft1"]
    flags = ["--localizer", "joint", "--stitch", "refit", "--push-to", "demo/dataless", "--no-figures", "--quiet"]
    assert main(["merge", *inputs, *flags]) == 0
    assert main(["verify", "demo/dataless", "--quiet"]) == 0
    assert "masks/joint.safetensors" in home_hub.files("demo/dataless")


def test_masks_of_other_localizers(tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    out = merge(folders, tmp_path / "out", localizer={"method": "magnitude", "density": 0.1})
    quick_merge(folders[0], folders[1:], out=tmp_path / "mean", localizer={"density": 0.1})
    mean, base = load(tmp_path / "mean"), load(folders[0])
    union = {
        name: a | b
        for (name, a), b in zip(
            load_mask(str(tmp_path / "out"), "ft0").items(),
            load_mask(str(tmp_path / "out"), "ft1").values(),
            strict=True,
        )
    }
    assert any(not torch.equal(out[name], mean[name]) for name in union)
    assert all(torch.equal(out[name][~mask], base[name][~mask]) for name, mask in union.items())


def test_what_is_no_linear_layer_keeps_the_mean_and_is_listed(tmp_path: Path) -> None:
    folders = finetunes(tmp_path)
    out = merge(folders, tmp_path / "out", include=["*.layers.*", "*embed_tokens*"])
    kept = record_of(tmp_path / "out")["stitch"]["kept_plain"]
    assert kept == {"model.embed_tokens.weight": "not called as a linear layer"}
    assert (
        "1 matrix keeps the finetuned values, or their mean (for example"
        in (tmp_path / "out" / "README.md").read_text()
    )
    mask = load_mask(str(tmp_path / "out"))["model.embed_tokens.weight"]
    states = [load(folder)["model.embed_tokens.weight"] for folder in folders]
    assert mask.any() and torch.allclose(out["model.embed_tokens.weight"][mask], (states[1] + states[2])[mask] / 2)


def test_scale(tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    whole, half = merge(folders, tmp_path / "out"), merge(folders, tmp_path / "half", scale=0.5)
    base = load(folders[0])
    for name, values in whole.items():
        assert torch.allclose(half[name] - base[name], (values - base[name]) / 2, atol=1e-6), name


def test_updates_of_low_rank_stay_near_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    base = load(folders[0])
    for number, folder in enumerate(folders[1:]):
        generator = torch.Generator().manual_seed(number)
        state = {}
        for name, values in base.items():
            low = [torch.randn(side, 2, generator=generator) for side in values.shape] if values.dim() == 2 else []
            state[name] = values + 0.01 * low[0] @ low[1].T if low and ".layers." in name else values.clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    merge(folders, tmp_path / "out")
    record = record_of(tmp_path / "out")["stitch"]
    assert record["low_rank"] and record["ridge"] == 10
    card = (tmp_path / "out" / "README.md").read_text()
    assert "low rank" in card and "64 unlabelled inputs" in card


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"localizer": {"method": "joint"}}, "needs a refit"),
    ({**JOINT, "cache": False}, "no-cache"),
    ({**JOINT, "stitch": {"method": "refit", "lambdas": [1]}}, "a refit without data has no lambdas"),
    ({**JOINT, "method": "ties"}, "ties"),
    ({**JOINT, "localizer": {"method": "joint", "density": 0}}, r"density: .*greater than 0 \(got 0\)"),
    (
        {**JOINT, "localizer": {"method": "joint", "density": 30}},
        r"density is a share of the weights, at most 1, not 30: 30 % is 0\.3",
    ),
    ({"localizer": {"density": 5}}, r"5 % is 0\.05"),
    ({"method": {"name": "dare", "density": 20}}, r"20 % is 0\.2"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_refused(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    with pytest.raises(RequestError, match=said):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_single_finetune_has_no_joint_mask(tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    with pytest.raises(RequestError, match="belongs to several finetunes"):
        localize_from_hub(folders[0], folders[1], out=tmp_path / "out", localizer={"method": "joint"})


def test_a_model_that_transformers_does_not_know_is_refused_with_a_way_out(tmp_path: Path) -> None:
    states = [{"layers.0.w": torch.randn(8, 8)} for _ in range(3)]
    folders = [save(tmp_path / f"m{number}", state) for number, state in enumerate(states)]
    with pytest.raises(RequestError, match="model type"):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(name: str, value: float, tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    state = load(folders[2])
    state[name].view(-1)[5] = value
    save_file(state, folders[2] / "model.safetensors", metadata={"format": "pt"})
    for asked in (JOINT, {"stitch": "refit", "localizer": {"density": 1}}):
        with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
            quick_merge(folders[0], folders[1:], out=tmp_path / "out", **asked)
        assert not (tmp_path / "out").exists()


def test_a_task_vector_beyond_float32_is_an_error(tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    state = load(folders[2])
    state["model.layers.1.mlp.up_proj.weight"] *= 1e25
    save_file(state, folders[2] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="up_proj"):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", **JOINT)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("hf_locstitch.stitch.dataless.shared_inputs.made_up_inputs", lambda _: iter([{}]))
    layers._layers.cache_clear()
    yield
    layers._layers.cache_clear()


@pytest.mark.usefixtures("nothing_runs")
def test_a_model_that_cannot_be_run_is_warned_of_before_the_work(tmp_path: Path) -> None:
    folders = family(build("mixtral", torch.float32), tmp_path)
    with pytest.raises(StrictError, match=r"could not be run on a made-up input \(ValueError: You must"):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", strict=True, **JOINT)
    assert not list(tmp_path.glob("*out*"))
    merge(folders, tmp_path / "out")
    record = record_of(tmp_path / "out")
    (warning,) = record["warnings"]
    kept = record["stitch"]["kept_plain"]
    assert set(kept) == {name for name in load(folders[0]) if "block_sparse_moe" in name}
    assert f"each is solved for by itself, and {len(kept)} of them keep the mean" in warning
    assert all(why.startswith("the model could not be run: ValueError: You must") for why in kept.values())
    assert "could not be run" in (tmp_path / "out" / "README.md").read_text()
    assert "model.layers.0.self_attn.q_proj.weight" in record["stitch"]["refitted"]


@pytest.mark.parametrize("kind", ["segformer", "resnet", "patchtst", "qwen2.5-vl"])
def test_one_finetune_of_many_architectures_is_itself_under_a_full_mask(kind: str, tmp_path: Path) -> None:
    name, config_class, fields = MANY[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config_class)(**fields)).eval()
    folders = family(model, tmp_path)
    out = merge(folders[:2], tmp_path / "out", localizer={"method": "joint", "density": 1})
    record, base, tuned = record_of(tmp_path / "out"), load(folders[0]), load(folders[1])
    assert not any("could not be run" in warning for warning in record["warnings"])
    localized = load_mask(str(tmp_path / "out")).keys()
    matrices = {name for name in localized if base[name].dim() > 1}
    assert matrices and matrices - record["stitch"]["kept_plain"].keys() <= set(record["stitch"]["refitted"])
    for name, values in out.items():
        assert torch.allclose(values, tuned[name] if name in localized else base[name], atol=1e-5), name


def test_a_density_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    inputs = ["--base", str(folders[0]), "--ft", *map(str, folders[1:])]
    assert main(["merge", *inputs, "--density", "0", "--out", str(tmp_path / "out")]) == 2
    assert "--density 0 keeps no weight" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_card_says_how_the_values_were_found(tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    for name, asked in {"joint": JOINT, "own": {"stitch": "refit"}}.items():
        quick_merge(folders[0], folders[1:], out=tmp_path / name, **asked)
    joint, own = (" ".join((tmp_path / name / "README.md").read_text().split()) for name in ("joint", "own"))
    assert "to values solved for from the finetunes' task vectors alone" in joint
    assert "what the finetuned models compute" not in joint + own
    assert "the finetunes' skills together" in joint and "each finetune's skill" in own
    assert joint.count("(masks/joint.safetensors)") == 1 and "Each mask" not in joint and "Each mask keeps" in own


def test_a_joint_mask_over_weights_that_did_not_change_says_why_it_is_smaller(tmp_path: Path) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    base = load(folders[0])
    for folder in folders[1:]:
        state = {name: values if "q_proj" in name else base[name] for name, values in load(folder).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    merge(folders, tmp_path / "out")
    (warning,) = [one for one in record_of(tmp_path / "out")["warnings"] if "asked for" in one]
    assert warning.startswith("the joint mask keeps 2,048 of the")
    assert "no more of the localized weights are changed by any finetune" in warning
    card = (tmp_path / "out" / "README.md").read_text()
    assert "it holds every localized weight that any finetune changes" in card
