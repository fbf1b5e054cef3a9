"""Finetunes: they learn, what is frozen stays, the same seed gives the same bytes, and merges take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import transformers
import yaml
from demo.skills import make_tokenizer
from helpers.data import ROWS, push_rows, write_jsonl, write_rows
from helpers.families import MODELS, build, masked_tokenizer
from helpers.fp8 import fp8_config, quantized, save_fp8
from helpers.models import load, same_bits
from helpers.runs import files_of, quick_merge

from hf_locstitch import RequestError, finetune
from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError
from hf_locstitch.tasks.objectives import OBJECTIVES
from hf_locstitch.tasks.sets import LocalizationSet, open_set, read_rows
from loopback_hub import LoopbackHub

PROMPT = {"kind": "masked-lm", "template": "{text}{mask}", "label_words": ["a", "b"]}
FAST = {"lr": 1e-2, "optimizer": "adamw_torch", "epochs": 6}


def base_of(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    build(kind, dtype).save_pretrained(folder)
    masked_tokenizer().save_pretrained(folder)
    return folder


def separable(path: Path, names: tuple[Any, Any] = (0, 1)) -> Path:
    """Texts of digits or of letters."""
    texts = [("012345"[i % 6] + "0123", names[0]) for i in range(24)] + [
        ("abcdef"[i % 6] + "cde", names[1]) for i in range(24)
    ]
    return write_jsonl(path, [{"text": text, "label": label} for text, label in texts])


def accuracy(kind: str, folder: Path, data: Path, objective: Any) -> float:
    model = getattr(transformers, MODELS[kind][0]).from_pretrained(folder).eval()
    rows = read_rows(open_set(LocalizationSet(ref=str(data))))
    task = objective.prepare(rows, transformers.AutoTokenizer.from_pretrained(folder), model)
    with torch.no_grad():
        found = task.outputs(model, task.examples).argmax(-1)
    assert task.targets is not None
    return (found == torch.tensor(task.targets(task.examples))).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_learned_and_the_rest_keeps_its_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    base, data = base_of("roberta-mlm", tmp_path / "base", dtype), separable(tmp_path / "rows.jsonl")
    asked = {"ref": str(data), "objective": PROMPT}
    done = finetune(base=base, data=asked, out=tmp_path / "ft", device="cpu", **FAST)
    losses = done.facts["losses"]
    assert len(losses) == 6 and losses[-1] < losses[0] and done.facts["steps"] == 72
    objective = OBJECTIVES.find("masked-lm").model_validate(PROMPT)
    assert accuracy("roberta-mlm", tmp_path / "ft", data, objective) == 1.0
    before, after = load(base), load(tmp_path / "ft")
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {dtype}
    changed = {name for name in before if not same_bits({name: before[name]}, {name: after[name]})}
    assert changed and changed <= {name for name in before if BLOCKS.search(name)}
    assert (tmp_path / "ft" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_defaults_of_prompts_are_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_of("roberta-mlm", tmp_path / "base")
    command = ["finetune", "--base", str(tmp_path / "base"), "--data", "sst2", "--dry-run", "--json"]
    with LoopbackHub(tmp_path / "hub", orgs={"demo": ["stanfordnlp"]}) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        patch.setenv("HF_TOKEN", "hf_loopback")
        from huggingface_hub import HfApi

        push_rows("stanfordnlp/sst2", [{"sentence": "s", "label": 0}], tmp_path, None, HfApi(hub.endpoint))
        assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["optimizer"], plan["lr"], plan["batch"], plan["epochs"]) == ("sgd", 2e-5, 4, 10)
    assert plan["data"]["ref"].startswith("stanfordnlp/sst2@") and plan["objective"]["label_words"][1] == "great"


def test_the_same_seed_gives_the_same_bytes_and_its_recipe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_of("roberta-mlm", tmp_path / "base")
    separable(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    asked = {"ref": "rows.jsonl", "number": 8, "objective": PROMPT}
    finetune(base="base", data=asked, out="one", seed=1, **FAST)
    finetune("one/finetune.yaml", out="two")
    finetune("one/finetune.yaml", out="three", seed=2)
    one, two, three = (files_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one["model.safetensors"] != three["model.safetensors"]
    assert str(tmp_path) not in Path("one/finetune.yaml").read_text() + Path("one/README.md").read_text()


@pytest.mark.parametrize("names", [(0, 1), ("digits", "letters")])
def test_a_classifier_gets_its_classes_from_the_data(
    names: tuple[Any, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over a base that has no head; the same head for the same seed."""
    base, data = base_of("bert", tmp_path / "base"), separable(tmp_path / "rows.jsonl", names)
    for out in ("one", "two"):
        finetune(base=base, data=data, objective="sequence-classification", out=tmp_path / out, lr=3e-3, epochs=4)
    assert "MISSING" not in "".join(capfd.readouterr())
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert list(config.get("id2label", {}).values()) == ([] if names == (0, 1) else list(names))  # LABEL_0, LABEL_1
    assert accuracy("bert-classes", tmp_path / "one", data, OBJECTIVES.find("sequence-classification")()) == 1.0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    merged = quick_merge(base, [tmp_path / "one"], out=tmp_path / "merged", localizer={"density": 1.0})
    ones, due = load(tmp_path / "merged"), load(tmp_path / "one")
    assert merged.manifest.masks["one"].ones and all(
        torch.equal(ones[name], due[f"bert.{name}"]) for name in ones if BLOCKS.search(name)
    )


def test_lora_merges_as_any_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", torch.float32).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    done = finetune(base="base", data="./rows.jsonl", out="lora", lora=4, epochs=8, lr=1e-2, batch=1)
    assert done.facts["losses"][-1] < done.facts["losses"][0]
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["r"] == 4 and config["lora_alpha"] == 8
    assert not Path("lora/config.json").exists() and not Path("lora/model.safetensors").exists()
    result = quick_merge("base", ["lora"], out="merged", localizer={"density": 1.0})
    assert all("adapters change only the layers that they adapt" in one for one in result.manifest.warnings)
    due = transformers.AutoModelForCausalLM.from_pretrained("base")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(due, "lora").merge_and_unload().state_dict()
    ours = load(Path("merged"))
    assert all(torch.allclose(ours[name], merged[name], atol=1e-6) for name in ours)
    assert any(not torch.equal(ours[name], load(Path("base"))[name]) for name in ours)


def test_lora_with_a_new_head(tmp_path: Path) -> None:
    base, data = base_of("bert", tmp_path / "base"), separable(tmp_path / "rows.jsonl")
    asked = {"ref": str(data), "objective": {"kind": "sequence-classification"}}
    finetune(base=base, data=asked, out=tmp_path / "lora", lora=4, epochs=6, lr=1e-2)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    result = quick_merge(base, [tmp_path / "lora"], out=tmp_path / "merged", localizer={"density": 0.1})
    assert any("classifier" in warning for warning in result.manifest.warnings)


def test_lora_over_a_base_without_a_pooler(tmp_path: Path) -> None:
    """Which is trained whole, as the head is; the encoder that it is a part of is adapted."""
    base, data = base_of("bert", tmp_path / "base"), separable(tmp_path / "rows.jsonl")
    transformers.BertForMaskedLM(build("bert", torch.float32).config).save_pretrained(base)
    finetune(base=base, data=data, objective="sequence-classification", out=tmp_path / "lora", lora=4, epochs=1)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    assert config["target_modules"] and all(name.startswith("bert.encoder.") for name in config["target_modules"])


def test_a_classifier_over_a_decoder_without_padding(tmp_path: Path) -> None:
    """In a batch it says of a text what it says of it alone."""
    base, data = base_of("llama", tmp_path / "base"), separable(tmp_path / "rows.jsonl", ("digits", "letters"))
    model = build("llama", torch.float32, pad_token_id=None)
    model.save_pretrained(base)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    rows = [
        {"text": row["text"][: 4 + number % 4], "label": row["label"]}
        for number, row in enumerate(read_rows(open_set(LocalizationSet(ref=str(data)))))
    ]
    write_jsonl(data, rows)
    finetune(base=base, data=data, objective="sequence-classification", out=tmp_path / "ft", epochs=1, lr=3e-3)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ft")
    assert tokenizer.eos_token_id is not None and found.config.pad_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        alone = torch.cat([found(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    task = OBJECTIVES.find("sequence-classification")().prepare(rows, tokenizer, found)
    with torch.no_grad():
        assert torch.allclose(task.outputs(found, task.examples), alone, atol=1e-5)


def test_a_base_in_fp8_is_refused(tmp_path: Path) -> None:
    model = build("llama", torch.bfloat16)
    save_fp8(tmp_path / "base", quantized(dict(model.state_dict()), (16, 16)))
    (tmp_path / "base" / "config.json").write_text(fp8_config((16, 16), **model.config.to_diff_dict()))
    with pytest.raises(CheckpointError, match="Use a base in bfloat16"):
        finetune(base=tmp_path / "base", data=write_jsonl(tmp_path / "rows.jsonl", ROWS), out=tmp_path / "ft")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], "needs a label in every example"),
        ([0.5, 1.0], "0.5 is no class beside"),
        ([[0, 1], [1, 0]], "is no class beside"),
        ([0, 10**9], "1000000000 is too large"),
        ([0, -1], "label -1 is not one of the 1 classes"),
    ],
)
def test_labels_that_are_no_classes(labels: list[Any], message: str, tmp_path: Path) -> None:
    base = base_of("bert", tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in labels])
    with pytest.raises(RequestError, match=message):
        finetune(base=base, data=data, objective="sequence-classification", out=tmp_path / "ft", epochs=1)
    assert not (tmp_path / "ft").exists()


def test_freeze_takes_globs_in_place_of_the_default(tmp_path: Path) -> None:
    base, data = base_of("roberta-mlm", tmp_path / "base"), separable(tmp_path / "rows.jsonl")
    asked = {"ref": str(data), "number": 4, "objective": PROMPT}
    frozen = ["*.layer.0.*", "lm_head.*"]
    done = finetune(base=base, data=asked, number=2, out=tmp_path / "ft", freeze=frozen, epochs=1, lr=1e-2)
    assert done.facts["examples"] == 4
    before, after = load(base), load(tmp_path / "ft")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "roberta.embeddings.word_embeddings.weight" in changed
    assert not any(".layer.0." in name or name.startswith("lm_head.") for name in changed)


def test_what_is_refused(tmp_path: Path) -> None:
    base, data = base_of("roberta-mlm", tmp_path / "base"), separable(tmp_path / "rows.jsonl")
    asked = {"ref": str(data), "objective": PROMPT}

    def refuse(match: str, **options: Any) -> None:
        with pytest.raises(RequestError, match=match):
            finetune(**{"base": base, "data": asked, "out": tmp_path / "ft", **options})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "rows.jsonl"]

    refuse("no output given", out=None)
    refuse(r"unknown key 'epoch' \(did you mean 'epochs'\?\)", recipe={"epoch": 3})
    refuse("the objective features has no loss.*causal-lm", data={**asked, "objective": {"kind": "features"}})
    refuse(r"'\*.layer.7.\*' matches no parameter.*did you mean", freeze=["*.layer.7.*"])
    refuse("leaves none of the", freeze=["*"])
    refuse("no linear layer is left for a LoRA", freeze=["*.weight"], lora=2)
    refuse("data.number", data={**asked, "number": 0})
    unlabelled = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abc"}])
    refuse("needs a label in every", data={"ref": str(unlabelled), "objective": {"kind": "sequence-classification"}})
    separable(tmp_path / "rows.jsonl")
    bare = build("bert", torch.float32)
    bare.save_pretrained(base)
    refuse("lacks cls.predictions.*Use a base with its head")


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    base, data = base_of("roberta-mlm", tmp_path / "base"), separable(tmp_path / "rows.jsonl")
    with pytest.raises(Exception, match="Lower the learning rate"):
        finetune(base=base, data={"ref": str(data), "objective": PROMPT}, out=tmp_path / "ft", lr=1e30, epochs=2)
    assert not (tmp_path / "ft").exists()


def test_from_the_hub_and_back(tmp_path: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import HfApi

    unique, api = uuid4().hex[:8], HfApi()
    base_of("roberta-mlm", tmp_path / "base")
    base = f"demo/base-{unique}"
    api.create_repo(base)
    api.upload_folder(repo_id=base, folder_path=tmp_path / "base")
    rows = [json.loads(line) for line in separable(tmp_path / "rows.jsonl").read_text().splitlines()]
    push_rows(f"demo/rows-{unique}", rows, tmp_path, None, api)
    recipe = {"base": base, "data": {"ref": f"demo/rows-{unique}", "objective": PROMPT}, "epochs": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["finetune", str(tmp_path / "recipe.yaml"), "--number", "4", "--push-to", f"demo/ft-{unique}", "--json"]
    assert main([*command, "--private", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 8 and api.model_info(f"demo/ft-{unique}").sha == found["commit"]
    card = api.model_info(f"demo/ft-{unique}").card_data
    assert card is not None and (card.base_model, card.datasets) == (base, [f"demo/rows-{unique}"])
    assert card.base_model_relation == "finetune"
    quick_merge(base, [f"demo/ft-{unique}"], out=tmp_path / "merged", localizer={"density": 0.1})


def test_images_and_clip(tmp_path: Path) -> None:
    """The vision tower alone is trained; the merge takes it."""
    from PIL import Image

    build("clip", torch.float32).save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path / "base")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "base")
    rows = []
    for number in range(8):
        Image.new("RGB", (16, 16), (255 * (number % 2), 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": number % 2})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    objective = {"kind": "clip-zero-shot", "classes": ["abc", "def"], "prompt": ["{}", "a{}"]}
    asked = {"ref": str(data), "objective": objective}
    done = finetune(base=tmp_path / "base", data=asked, out=tmp_path / "ft", lr=1e-3, batch=4, epochs=5)
    assert done.facts["losses"][-1] < done.facts["losses"][0]
    before, after = load(tmp_path / "base"), load(tmp_path / "ft")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("vision_model.") for name in changed)
