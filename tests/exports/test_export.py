"""Adapters as PEFT loads them: they compute what the merge computes."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import transformers
from helpers.families import MODELS, finetunes
from helpers.models import load
from helpers.runs import quick_localize, quick_merge
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open

from hf_locstitch import export, load_localized
from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

TOKENS = torch.arange(3, 23)[None]


def model(kind: str, folder: Path | str, dtype: torch.dtype) -> Any:
    return getattr(transformers, MODELS[kind][0]).from_pretrained(folder, dtype=dtype).eval()


def with_adapter(start: Any, folder: Path | str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(start, str(folder), **options).eval()


@torch.no_grad()
def outputs(loaded: Any) -> torch.Tensor:
    return loaded(TOKENS)[0]


def weights_off(one: Any, other: Any) -> int:
    ours, due = one.state_dict(), other.state_dict()
    assert ours.keys() == due.keys()
    return sum(int((ours[name] != due[name]).sum()) for name in due)


@pytest.mark.parametrize(
    ("kind", "dtype", "density"),
    [
        ("llama", torch.bfloat16, 0.03), ("llama", torch.float16, 0.03), ("llama", torch.float32, 0.1),
        ("llama-tied", torch.float32, 0.1), ("bert-classes", torch.bfloat16, 0.1), ("bert-classes", torch.float32, 0.1),
        ("gpt2", torch.bfloat16, 0.1), ("mixtral", torch.bfloat16, 0.03), ("qwen3-moe", torch.float32, 0.03),
    ],
)  # fmt: skip
def test_a_merge_of_three_and_a_localized_checkpoint(
    kind: str, dtype: torch.dtype, density: float, tmp_path: Path
) -> None:
    base, *tuned = finetunes(tmp_path, kind, dtype, count=3)
    quick_localize(base, tuned[0], out=tmp_path / "skill", localizer={"density": density})
    quick_merge(base, tuned[0], out=tmp_path / "of-one", localizer={"density": density})
    quick_merge(base, tuned, out=tmp_path / "of-three", localizer={"density": density})
    for source, merge in (("skill", "of-one"), ("of-three", "of-three")):
        done = export(tmp_path / source, base=base, out=tmp_path / f"{source}-adapter")
        due = model(kind, tmp_path / merge, dtype)
        tuned_model = with_adapter(model(kind, base, dtype), done.out)  # type: ignore[arg-type]
        if done.facts["inexact"] == 0:
            assert torch.equal(outputs(tuned_model), outputs(due))
        assert dtype == torch.float32 or done.facts["inexact"] == 0
        torch.testing.assert_close(outputs(tuned_model), outputs(due), rtol=1e-5, atol=1e-5)
        if done.facts["mergeable"]:
            assert weights_off(tuned_model.merge_and_unload(), due) == done.facts["inexact"]
        assert done.facts["sparse"] or kind in ("gpt2", "bert-classes")
        assert done.facts["mergeable"] == (kind not in ("mixtral", "qwen3-moe"))


def test_the_count_of_rounded_weights_is_that_of_peft(tmp_path: Path) -> None:
    base, *tuned = finetunes(tmp_path, "llama", torch.float32, count=3)
    quick_merge(base, tuned, out=tmp_path / "merged", localizer={"density": 0.1})
    done = export(tmp_path / "merged", base=base, out=tmp_path / "adapter")
    merged = with_adapter(model("llama", base, torch.float32), tmp_path / "adapter").merge_and_unload()
    off = weights_off(merged, model("llama", tmp_path / "merged", torch.float32))
    assert off == done.facts["inexact"] > 0
    assert f"all weights but {off}" in done.describe()
    assert f"all weights but {off}" in (tmp_path / "adapter" / "README.md").read_text()


def test_embeddings_that_are_tied_are_stored_for_both(tmp_path: Path) -> None:
    base, *tuned = finetunes(tmp_path, "llama-tied", torch.bfloat16, count=2)
    quick_merge(base, tuned, out=tmp_path / "merged", localizer={"density": 0.02}, include=["*"])
    done = export(tmp_path / "merged", base=base, out=tmp_path / "adapter")
    assert "model.embed_tokens" in done.facts["whole"] and "lm_head" in [*done.facts["whole"], *done.facts["sparse"]]
    start = model("llama-tied", base, torch.bfloat16)
    due = outputs(model("llama-tied", tmp_path / "merged", torch.bfloat16))
    assert torch.equal(outputs(with_adapter(start, tmp_path / "adapter")), due)


def test_biases_and_norms_cost_their_modules(tmp_path: Path) -> None:
    base, tuned = finetunes(tmp_path, "bert-classes", torch.float32, count=1)
    quick_localize(base, tuned, out=tmp_path / "all", localizer={"density": 0.05})
    quick_localize(base, tuned, out=tmp_path / "few", localizer={"density": 0.05}, exclude=["*.bias", "*LayerNorm*"])
    all_, few = (export(tmp_path / name, base=base, out=tmp_path / f"{name}-adapter") for name in ("all", "few"))
    assert "with a changed bias" in all_.facts["whole"].values() and "of type LayerNorm" in all_.facts["whole"].values()
    assert few.facts["whole"] == {} and len(few.facts["sparse"]) == 12
    assert few.facts["bytes"] < all_.facts["bytes"] / 1.5


def test_modules_whose_names_end_alike(tmp_path: Path) -> None:
    """PEFT takes pre_classifier for classifier."""
    config = transformers.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
    start = transformers.DistilBertForSequenceClassification(config)
    start.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in start.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    start.save_pretrained(tmp_path / "ft")
    include = ["classifier.weight", "*.lin1.weight"]
    quick_merge(
        tmp_path / "base", tmp_path / "ft", out=tmp_path / "merged", include=include, localizer={"density": 0.5}
    )
    done = export(tmp_path / "merged", base=tmp_path / "base", out=tmp_path / "adapter")
    assert {"classifier", "pre_classifier"} <= done.facts["whole"].keys()
    kind = transformers.AutoModelForSequenceClassification
    loaded = with_adapter(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), outputs(kind.from_pretrained(tmp_path / "merged")))


def test_the_files(tmp_path: Path) -> None:
    base, *tuned = finetunes(tmp_path, "llama", torch.float32, count=2)
    quick_merge(base, tuned, out=tmp_path / "merged", localizer={"density": 0.05})
    for name in ("one", "other"):
        export(tmp_path / "merged", base=base, out=tmp_path / name)
    found = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert found.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    config = json.loads(found["adapter_config.json"])
    assert (config["peft_type"], config["task_type"], config["base_model_name_or_path"]) == ("SHIRA", "CAUSAL_LM", None)
    sizes = (32, 48)
    with safe_open(tmp_path / "one" / "adapter_model.safetensors", "pt") as file:
        for name in config["target_modules"]:
            indices, values = (
                file.get_tensor(f"base_model.model.{name}.shira_{part}") for part in ("indices", "weight")
            )
            assert (
                indices.dtype == torch.int16 and indices.shape == (2, len(values)) and int(indices.max()) < max(sizes)
            )
            assert len(values) % config["r"] == 0 and values.dtype == torch.float32
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_it_can_be_merged_again(tmp_path: Path) -> None:
    """The adapter is one among other finetunes, as if it were the merge."""
    base, *tuned = finetunes(tmp_path, "llama", torch.bfloat16, count=3)
    quick_merge(base, tuned[:2], out=tmp_path / "both", localizer={"density": 0.02})
    export(tmp_path / "both", base=base, out=tmp_path / "adapter" / "both")
    for name in ("both", "adapter/both"):
        quick_merge(base, [tmp_path / name, tuned[2]], out=tmp_path / f"again-{name[:4]}", localizer={"density": 0.02})
    one, other = load(tmp_path / "again-both"), load(tmp_path / "again-adap")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_from_the_hub_and_back(home_hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the card says is run; of its own accord transformers does not load such an adapter."""
    run = f"demo/{uuid4().hex[:8]}"
    base, *tuned = finetunes(tmp_path, "llama", torch.bfloat16, count=3)
    for name, folder in zip(("base", "a", "b", "c"), (base, *tuned), strict=True):
        files: dict[str, Any] = {file.name: file for file in folder.iterdir()}
        home_hub.add_repo(f"{run}-{name}", {**files, "README.md": "---\nlicense: mit\n---\n"})
    quick_merge(
        f"{run}-base", [f"{run}-{name}" for name in "abc"], push_to=f"{run}-merged", localizer={"density": 0.03}
    )
    commits = len(home_hub.commits(f"{run}-base"))
    assert main(["export", f"{run}-merged", "--as", "peft", "--push-to", f"{run}-adapter", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["commit"] == home_hub.head(f"{run}-adapter") and done["inexact"] == 0 and done["out"] is None
    config = json.loads(home_hub.read(f"{run}-adapter", "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == (f"{run}-base", home_hub.head(f"{run}-base"))
    card = home_hub.read(f"{run}-adapter", "README.md").decode()
    head = card.split("---")[1]
    for line in (f"base_model: {run}-base", "library_name: peft", "license: mit", "base_model_relation: adapter"):
        assert line in head
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    due = outputs(model("llama", f"{run}-merged", torch.bfloat16))

    def load_adapter(adapter: str) -> Any:
        loaded = model("llama", f"{run}-base", torch.bfloat16)
        loaded.load_adapter(adapter)
        return loaded

    assert torch.equal(outputs(names["model"].eval()), due)
    automatic = AutoPeftModelForCausalLM.from_pretrained(f"{run}-adapter", dtype=torch.bfloat16)
    assert torch.equal(outputs(automatic.eval()), due)
    for load_plainly in (load_adapter, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises((KeyError, ImportError)):  # and not other weights than those; ImportError with an old PEFT
            outputs(load_plainly(f"{run}-adapter"))
    assert main(["export", f"{run}-merged", "--push-to", f"{run}-base"]) == 2
    assert "is an input of this export (base)" in capsys.readouterr().err
    assert len(home_hub.commits(f"{run}-base")) == commits


def test_a_skill_from_the_hub_to_a_folder_and_the_hub(home_hub: LoopbackHub, tmp_path: Path) -> None:
    run = f"demo/{uuid4().hex[:8]}"
    for name, folder in zip(("base", "ft"), finetunes(tmp_path, "llama", torch.bfloat16, count=1), strict=True):
        home_hub.add_repo(f"{run}-{name}", {file.name: file for file in folder.iterdir()})
    quick_localize(f"{run}-base", f"{run}-ft", push_to=f"{run}-skill", localizer={"density": 0.03})
    done = export(f"{run}-skill", out=tmp_path / "adapter", push_to=f"{run}-adapter")
    assert done.commit == home_hub.head(f"{run}-adapter")
    due = model("llama", f"{run}-base", torch.bfloat16)
    load_localized(f"{run}-skill").apply(due)
    for where in (tmp_path / "adapter", f"{run}-adapter"):
        loaded = with_adapter(model("llama", f"{run}-base", torch.bfloat16), where)
        assert torch.equal(outputs(loaded), outputs(due))
