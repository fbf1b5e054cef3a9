"""What `evaluate` says of models on labelled sets is what a plain loop over transformers finds on the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.architectures import T5
from helpers.data import write_jsonl
from helpers.families import VOCABULARY, build, masked_tokenizer, noisy
from helpers.launch import launch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from hf_locstitch import evaluate, merge_from_hub
from hf_locstitch.errors import RequestError
from hf_locstitch.evaluation.report import EvaluationReport

SEQ2SEQ = {**T5, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
TEXTS = ["copy cable=", "reverse 40718=81704", "swap CABLE=ACLBE", "abc", "next 12345=2", "0", "LKJ", "rotate c="] * 3


def labelled(path: Path, classes: int) -> Path:
    return write_jsonl(path, [{"text": text, "label": number % classes} for number, text in enumerate(TEXTS)])


def value(report: EvaluationReport, model: str, task: str, metric: str) -> float:
    found = next(one for one in report.models if one.name == model).score(task, metric)
    assert found is not None
    return found.value


def share(predicted: Sequence[int], right: Sequence[int]) -> float:
    assert len(set(predicted)) > 1  # else a model that says the same of everything would do
    return sum(one == other for one, other in zip(predicted, right, strict=True)) / len(right)


def classified(folder: Path, backbone: Path | None = None) -> torch.Tensor:
    """Logits of each text, alone, of a classifier whose encoder is another model's."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    if backbone is not None:
        model.bert.load_state_dict(transformers.BertModel.from_pretrained(backbone).state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def averaged(root: Path, folder: Path) -> Path:
    """The mean of both encoders."""
    one, other = (transformers.BertModel.from_pretrained(root / name) for name in ("three", "two"))
    with torch.no_grad():
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
    one.save_pretrained(folder)
    return folder


def agree(report: EvaluationReport, model: str, task: str, logits: torch.Tensor, classes: int) -> None:
    right = torch.arange(len(logits)) % classes
    assert value(report, model, task, "accuracy") == float((logits.argmax(-1) == right).double().mean())
    loss = float(torch.nn.functional.cross_entropy(logits.double(), right))
    assert value(report, model, task, "loss") == pytest.approx(loss, 1e-5)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, finetunes of it with heads for three classes and two, their merge, and a set for each."""
    root = tmp_path_factory.mktemp("classifiers")
    noisy(build("bert", torch.float32), root / "base", 0)
    for name, labels in {"three": 3, "two": 2}.items():
        noisy(build("bert-classes", torch.float32, num_labels=labels), root / name, labels)
        labelled(root / f"{name}.jsonl", labels)
    merge_from_hub(root / "base", [root / "three", root / "two"], out=root / "merged", figures=False)
    return root


def test_each_set_is_judged_by_the_head_of_its_finetune(classifiers: Path) -> None:
    root = classifiers
    data = {name: str(root / f"{name}.jsonl") for name in ("three", "two")}
    report = evaluate(root / "merged", data=data, base=root / "base", finetuned=[root / "three", root / "two"])
    assert [model.name for model in report.models] == ["base", "three", "two", "merged"]
    for name, labels in {"three": 3, "two": 2}.items():
        for model in ("merged", "base", "three" if name == "two" else "two"):
            agree(report, model, name, classified(root / name, root / model), labels)
        agree(report, name, name, classified(root / name), labels)
    result = report.subject.results[0]
    assert (result.head, result.objective, result.examples) == ("three", "sequence-classification", 24)

    pipeline = transformers.pipeline("text-classification", model=str(root / "two"))
    found = [int(str(one["label"])[-1]) for one in pipeline(TEXTS)]
    assert value(report, "two", "two", "accuracy") == share(found, [number % 2 for number in range(len(TEXTS))])


def test_a_merge_is_judged_by_the_heads_of_what_it_was_made_of(classifiers: Path, tmp_path: Path) -> None:
    """As its recipe asks, beside the average, and under names of its own; then it is as judged afterwards."""
    root, names = classifiers, ["sentiment", "topic"]
    data = {"sentiment": str(root / "three.jsonl"), "topic": str(root / "two.jsonl")}
    done = merge_from_hub(
        root / "base", [root / "three", root / "two"], names=names, out=tmp_path / "merged", figures=False,
        evaluate={"data": data, "average": True},
    )  # fmt: skip
    report = done.evaluation
    assert report is not None and [one.role for one in report.models][-2:] == ["average", "model"]
    for task, name, labels in (("sentiment", "three", 3), ("topic", "two", 2)):
        agree(report, report.subject.name, task, classified(root / name, tmp_path / "merged"), labels)
        agree(report, "average", task, classified(root / name, averaged(root, tmp_path / "average")), labels)
    assert "sentiment**: sequence-classification with the head of sentiment, 24 rows" in (
        tmp_path / "merged" / "README.md"
    ).read_text(encoding="utf-8")


def test_a_head_by_its_name_and_none_at_all(classifiers: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    root = classifiers
    entry = {"ref": str(root / "two.jsonl"), "head": "two"}
    report = evaluate(root / "merged", data={"other": entry}, metrics=["f1"], finetuned=[root / "three", root / "two"])
    predicted = classified(root / "two", root / "merged").argmax(-1).tolist()
    right = [number % 2 for number in range(len(TEXTS))]
    hits = sum(one == other == 1 for one, other in zip(predicted, right, strict=True))
    assert value(report, "merged", "other", "f1") == pytest.approx(2 * hits / (sum(predicted) + sum(right)))
    status, _, err = run("evaluate", root / "merged", "--data", f"other={root / 'two.jsonl'}")
    assert status == 2 and "ForSequenceClassification" not in err and "objective" in err
    asked = ["--data", f"other={root / 'two.jsonl'}", "--objective", "sequence-classification"]
    status, _, err = run("evaluate", root / "merged", *asked)
    assert (
        status == 2 and "BertModel, which has no head for sequence-classification" in err and "--data NAME=REF" in err
    )
    objective, inputs = {"kind": "sequence-classification"}, {"base": root / "base", "finetuned": [root / "two"]}
    with pytest.raises(RequestError, match=r"has no classifier.bias, which the objective needs"):
        evaluate(root / "two", data={"other": {**entry, "head": "base", "objective": objective}}, **inputs)
    entry["head"] = "four"
    with pytest.raises(Exception, match=r"'four', which is no input .choose from base, three, two"):
        evaluate(root / "merged", data={"other": entry})


def test_prompts_with_label_words(tmp_path: Path) -> None:
    folder = noisy(build("roberta-mlm", torch.float32), tmp_path / "model", 1)
    masked_tokenizer().save_pretrained(folder)
    data = labelled(tmp_path / "set.jsonl", 2)
    objective = "{kind: masked-lm, label_words: [a, B], template: '{text}{mask}'}"
    report = evaluate(folder, data=[data], objective=objective)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    words, predicted = [tokenizer.convert_tokens_to_ids(word) for word in ("a", "B")], []
    for text in TEXTS:
        ids = tokenizer(text + "?", return_tensors="pt")
        with torch.no_grad():
            logits = model(**ids).logits[0, ids["input_ids"][0] == tokenizer.mask_token_id][0]
        predicted.append(int(logits[words].argmax()))
    assert value(report, "model", "set", "accuracy") == share(predicted, [n % 2 for n in range(len(TEXTS))])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rows = []
    for number in range(12):
        torch.manual_seed(number)
        pixels = torch.randint(0, 255, (16, 16, 3)) * torch.rand(3)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": number % 3})
    return write_jsonl(tmp_path / "pictures.jsonl", rows)


def test_image_classifiers(pictures: Path, tmp_path: Path) -> None:
    folder = noisy(build("vit", torch.float32), tmp_path / "vit", 2)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    report = evaluate(folder, data=[pictures])
    pipeline = transformers.pipeline("image-classification", model=str(folder))
    files = [str(pictures.parent / f"{number}.png") for number in range(12)]
    found = [int(str(best[0]["label"])[-1]) for best in pipeline(files)]
    assert value(report, "vit", "pictures", "accuracy") == share(found, [number % 3 for number in range(12)])


def test_clip_by_its_own_text_tower_or_the_bases(pictures: Path, tmp_path: Path) -> None:
    classes, folders = ["abc", "def", "0123"], [tmp_path / "base", tmp_path / "ft"]
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for seed, folder in zip((3, 5), folders, strict=True):
        noisy(build("clip", torch.float32), folder, seed, scale=1.0)
        tokenizer = make_tokenizer()
        tokenizer.padding_side = "right"  # as CLIP's own
        transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    objective = {"kind": "clip-zero-shot", "classes": classes, "prompt": "{}"}
    alone = evaluate(folders[1], data=[pictures], objective=objective)
    beside = evaluate(folders[1], data=[pictures], objective=objective, base=folders[0])
    assert (alone.subject.results[0].head, beside.subject.results[0].head) == (None, "base")
    right = [number % 3 for number in range(12)]
    pictured = [Image.open(pictures.parent / f"{number}.png") for number in range(12)]
    pipeline = transformers.pipeline("zero-shot-image-classification", model=str(folders[1]))
    found = [
        classes.index(pipeline(picture, candidate_labels=classes, hypothesis_template="{}")[0]["label"])
        for picture in pictured
    ]
    assert value(alone, "ft", "pictures", "accuracy") == share(found, right)

    start, tuned = (transformers.CLIPModel.from_pretrained(folder).eval() for folder in folders)
    processor = transformers.CLIPProcessor.from_pretrained(folders[0])
    with torch.no_grad():
        texts = start.get_text_features(**processor.tokenizer(classes, padding=True, return_tensors="pt"))
        seen = tuned.get_image_features(**processor.image_processor(pictured, return_tensors="pt"))
    texts, seen = (torch.nn.functional.normalize(getattr(one, "pooler_output", one), dim=-1) for one in (texts, seen))
    agree(beside, "ft", "pictures", (start.logit_scale.exp() * seen @ texts.T).detach(), 3)


def words(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> Iterator[tuple[float, int, bool]]:
    """Of each row: the summed loss of the answer's tokens, their number, and whether greedy decoding gives them."""
    seq2seq = model.config.is_encoder_decoder
    for row in rows:
        start = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if seq2seq:
            answer = [*tokenizer(text_target=row["completion"])["input_ids"], tokenizer.eos_token_id]
        wanted = torch.tensor([answer])
        with torch.no_grad():
            if seq2seq:
                loss = model(input_ids=start, labels=wanted).loss
            else:
                labels = torch.cat([torch.full_like(start, -100), wanted], dim=1)
                loss = model(torch.cat([start, wanted], dim=1), labels=labels).loss
            said = model.generate(start, max_new_tokens=len(answer), do_sample=False, pad_token_id=0)
        said = said[0, 1:] if seq2seq else said[0, start.shape[1] :]
        yield float(loss) * len(answer), len(answer), said.tolist() == answer


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_language_models_by_loss_and_exact_match(kind: str, tmp_path: Path) -> None:
    """Answers of unequal lengths; some are what the model says itself, so that not all are wrong."""
    tokenizer = make_tokenizer()
    if kind == "t5":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SEQ2SEQ)).eval()
    else:
        model = build(kind, torch.float32)
    folder = noisy(model, tmp_path / "model", 3 if kind == "llama" else None, tokenizer=tokenizer)
    rows = [{"prompt": text, "completion": "ab0"[: 1 + number % 3]} for number, text in enumerate(TEXTS[:6])]
    for text in TEXTS[:8]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0]
        said = said[1:] if kind == "t5" else said[ids.shape[1] :]
        rows.append({"prompt": text, "completion": tokenizer.decode(said, skip_special_tokens=True)})
    report = evaluate(folder, data=[write_jsonl(tmp_path / "answers.jsonl", rows)])
    each = list(words(model, tokenizer, rows))
    total = sum(tokens for _, tokens, _ in each)
    assert value(report, "model", "answers", "loss") == pytest.approx(sum(loss for loss, _, _ in each) / total, 1e-5)
    matches = sum(match for _, _, match in each) / len(rows)
    assert value(report, "model", "answers", "exact-match") == matches and 0 < matches < 1


def test_sentence_encoders_by_descriptions_of_the_classes(tmp_path: Path) -> None:
    """The merge's embeddings beside those that the base has of the descriptions, less their mean."""
    folders, classes = [tmp_path / "base", tmp_path / "ft"], ["copy a=", "0123", "LKJIH"]
    for seed, folder in enumerate(folders):
        noisy(build("bert", torch.float32), folder, seed)
    data, objective = labelled(tmp_path / "set.jsonl", 3), {"kind": "text-zero-shot", "classes": classes}
    report = evaluate(folders[1], data=[data], objective=objective, base=folders[0])
    start, tuned = (transformers.AutoModel.from_pretrained(folder) for folder in folders)
    tokenizer = make_tokenizer()

    def embedded(model: Any, text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=-1)

    meant = torch.stack([embedded(start, text) for text in classes])
    head = torch.nn.functional.normalize(meant - meant.mean(0), dim=-1)
    agree(report, "ft", "set", torch.stack([embedded(tuned, text) @ head.T / 0.1 for text in TEXTS]), 3)


def test_processes_share_the_rows(classifiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = classifiers
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    asked = ["two", "--data", "two=two.jsonl", "--json", "--quiet", "--no-cache"]
    done = launch(2, root, *asked, command="evaluate", figures=True)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)["models"][0]["results"][0]
    alone = evaluate(root / "two", data={"two": str(root / "two.jsonl")}, cache=False).models[0].results[0]
    assert shared["examples"] == alone.examples == 24
    assert [one["value"] for one in shared["scores"]] == [pytest.approx(one.value, 1e-6) for one in alone.scores]
