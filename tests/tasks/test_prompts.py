"""Prompts with label words: token for token those of the paper's authors, and images' prompt ensembles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.data import write_rows
from helpers.families import build
from helpers.grafted import IMAGES, FakeProcessor
from helpers.protocols import TEXTS, roberta_tokenizer
from torch.nn.functional import normalize

from hf_locstitch.tasks.evaluation_sets import EvaluationSet
from hf_locstitch.tasks.named_tasks import named_tasks, with_named_task
from hf_locstitch.tasks.objectives import OBJECTIVES
from hf_locstitch.tasks.objectives.clip_zero_shot import ClipZeroShot
from hf_locstitch.tasks.sets import LocalizationSet, open_set, read_rows

# What stands between special tokens, and limits of length, as in the authors' language/args.py: A and B are the texts,
# an apostrophe says that the last character goes, small b that the first letter is lower case.
PIECES = {
    "sst2": ("A| It was|<mask>|.", None),
    "mr": ("A| It was|<mask>|.", 110),
    "cr": ("A| It was|<mask>|.", 110),
    "mpqa": ("A| It was|<mask>|.", 110),
    "subj": ("A| This is|<mask>|.", 110),
    "trec": ("<mask>|:| A", 110),
    "mnli": ("A'|?|<mask>|,| b", 110),
    "snli": ("A'|?|<mask>|,| b", None),
    "qnli": ("A'|?|<mask>|,| b", None),
    "rte": ("A'|?|<mask>|,| b", 240),
    "mrpc": ("A|<mask>|,| b", None),
    "qqp": ("A|<mask>|,| b", None),
}
FIRST, SECOND = TEXTS


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return roberta_tokenizer(tmp_path_factory.mktemp("roberta"))


def by_pieces(task: str, first: str, second: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt whose pieces are tokenized one by one; too long a prompt loses its start."""
    pieces, limit = PIECES[task]
    ids = [tokenizer.cls_token_id]
    for piece in pieces.split("|"):
        texts = {"A": first, " A": " " + first, "A'": first[:-1], " b": " " + second[:1].lower() + second[1:]}
        found = tokenizer(texts.get(piece, piece), add_special_tokens=False)["input_ids"]
        ids += found[:limit] if "A" in piece else found
    return [*ids, tokenizer.sep_token_id][-256:]


@pytest.mark.parametrize("times", [1, 20, 60], ids=["short", "long", "too long"])
@pytest.mark.parametrize("task", PIECES)
def test_prompts_are_those_of_the_authors(task: str, times: int, roberta: Any) -> None:
    first = " ".join([FIRST] * times)
    row = {"text": first, "text_b": SECOND, "label": 1}
    if "b" not in PIECES[task][0]:
        del row["text_b"]
    objective = OBJECTIVES.find("masked-lm").model_validate(named_tasks()[task]["objective"])
    ((ids, label),) = objective.prepare([row], roberta, None).examples
    assert ids == by_pieces(task, first, SECOND, roberta) and label == 1
    assert len(ids) <= 256


def test_a_cut_text_ends_with_a_whole_token(roberta: Any) -> None:
    fields = {"template": "{mask}{text}", "label_words": ["great", "terrible"]}
    objective = OBJECTIVES.find("masked-lm").model_validate({**fields, "text_tokens": 3})
    for text in ("", "é", "🙂🙂", FIRST):
        ((ids, _),) = objective.prepare([{"text": text, "label": 0}], roberta, None).examples
        assert len(ids) <= 3 + 3 + 3  # an emoji that is cut through stays whole


def test_prompts_are_averaged_into_one_head() -> None:
    model, processor = build("clip"), FakeProcessor()
    processor.tokenizer.padding_side = "right"  # as CLIP's: what a text is padded with then changes nothing
    classes, prompts = ("abc", "def", "0123"), ("{}", "{}=", "=a{}")
    task = ClipZeroShot(classes=classes, prompt=prompts).prepare(IMAGES, processor, model)
    texts = [[prompt.format(name) for prompt in prompts] for name in classes]
    with torch.no_grad():
        heads = []
        for group in texts:
            tokens = processor.tokenizer(group, padding=True, return_tensors="pt")
            heads.append(normalize(normalize(model.get_text_features(**tokens).pooler_output, dim=-1).mean(0), dim=0))
        pixels = torch.stack([image for image, _ in task.examples]).double()
        seen = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        expected = seen @ torch.stack(heads).T * model.logit_scale.exp()
        torch.testing.assert_close(task.outputs(model, task.examples), expected)
    with pytest.raises(ValueError, match="a prompt needs"):
        ClipZeroShot(classes=classes, prompt=("{}", "a photo"))


def test_named_tasks_are_sets() -> None:
    tasks = named_tasks()
    assert len(tasks) == 20
    for name, task in tasks.items():
        asked = LocalizationSet(ref=name)
        assert asked.ref == task["ref"] and asked.role == "finetuning" and task["test"]
        assert (
            asked.objective is not None
            and asked.objective.model_dump(mode="json").items()
            >= {key: value for key, value in task["objective"].items()}.items()
        )
    counts = {name: len(task["objective"].get("classes", ())) for name, task in tasks.items()}
    assert {name: count for name, count in counts.items() if count} == {
        "sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47,
    }  # fmt: skip


def test_what_is_given_wins_over_a_named_task() -> None:
    asked = LocalizationSet.model_validate({"ref": "rte@abc", "number": 16, "objective": {"kind": "causal-lm"}})
    assert (asked.ref, asked.config, asked.number) == ("nyu-mll/glue@abc", "rte", 16)
    assert asked.objective is not None and asked.objective.kind == "causal-lm"
    assert LocalizationSet(ref="dtd").limit == 1024
    test = LocalizationSet(ref="dtd", split="test")
    assert (test.limit, test.role) == (None, None)  # they are of the split that finetunes are trained on
    assert LocalizationSet(ref="org/sst2").objective is None
    assert LocalizationSet.model_validate(asked.dump()) == asked


def test_the_set_that_a_task_is_judged_on() -> None:
    fields = with_named_task({"ref": "mnli", "number": 5}, judged=True)
    assert fields.keys() == {"ref", "config", "columns", "objective", "split", "number"}
    assert (fields["split"], fields["ref"]) == ("validation_matched", "nyu-mll/glue")
    assert "limit" not in with_named_task({"ref": "dtd"}, judged=True)
    assert with_named_task({"ref": "mnli", "split": "train"}, judged=True)["split"] == "train"
    assert [EvaluationSet(ref=name).metrics for name in ("mrpc", "qqp", "sst2")] == [("f1", "accuracy")] * 2 + [()]
    assert "metrics" not in with_named_task({"ref": "mrpc"})


def test_a_set_may_be_limited_in_all(tmp_path: Any) -> None:
    rows = [{"text": str(number), "label": number % 3} for number in range(24)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    fields = {"ref": str(path), "where": {"label": [0, 1]}, "labels": {0: "yes", "1": 7}, "number": 4, "limit": 5}
    found = read_rows(open_set(LocalizationSet.model_validate(fields)))
    assert len(found) == 5 and {row["label"] for row in found} == {"yes", 7}
