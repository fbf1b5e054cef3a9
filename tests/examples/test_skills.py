"""The demo's exercises, tokenizer and marking, and that its training does what its docstring says."""

from itertools import islice
from pathlib import Path
from typing import Literal

import pytest
import torch
from demo import train as training
from demo.main import _table
from demo.skills import (
    COMMON,
    LENGTH,
    OPERATIONS,
    PRETRAINING,
    SKILLS,
    Split,
    Task,
    accuracy,
    examples,
    is_heldout,
    make_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

TOKENIZER = make_tokenizer()


def take(count: int, tasks: list[Task] | tuple[Task, ...], *, seed: int = 0, split: Split = "train") -> list[str]:
    return [example.text for example in islice(examples(tasks, seed=seed, split=split), count)]


class Oracle:
    """Answers every prompt right, then goes on with padding, as `generate` does."""

    def generate(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        prompts = TOKENIZER.batch_decode(input_ids, skip_special_tokens=True)
        answers = [OPERATIONS[(prompt := text[:-1]).split()[0]](prompt.split()[1]) for text in prompts]
        tokens = TOKENIZER([f"{answer}</s><pad>" for answer in answers], add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, torch.tensor(tokens)], dim=1)


def pico(seed: int = 0) -> LlamaForCausalLM:
    return training.make_model(TOKENIZER, seed, hidden=32, layers=1)


@pytest.mark.parametrize(
    ("name", "word", "answer"),
    [
        ("copy", "abcde", "abcde"),
        ("reverse", "40718", "81704"),
        ("rotate", "abcde", "bcdea"),
        ("swap", "ABCDE", "BADCE"),
        ("ends", "abcde", "ebcda"),
        ("next", "ALBCD", "BACDE"),
    ],
)
def test_operations(name: str, word: str, answer: str) -> None:
    assert OPERATIONS[name](word) == answer


def test_examples_depend_on_the_seed_alone() -> None:
    assert take(50, PRETRAINING, seed=3) == take(50, PRETRAINING, seed=3)
    assert take(50, PRETRAINING, seed=3) != take(50, PRETRAINING, seed=4)


def test_no_word_is_in_both_splits() -> None:
    words = {split: {text[-LENGTH:] for text in take(2000, COMMON[:3], split=split)} for split in ("train", "heldout")}
    assert words["train"] and words["heldout"]
    copied = [Task("copy", task.alphabet) for task in SKILLS.values()]
    assert not any(is_heldout(text[-LENGTH:]) for text in take(2000, copied))
    assert all(is_heldout(text[-LENGTH:]) for text in take(2000, copied, split="heldout"))


def test_the_base_is_taught_everything_but_the_skills() -> None:
    assert len(PRETRAINING) == len({(task.operation, task.alphabet) for task in PRETRAINING}) == 18
    assert not set(PRETRAINING) & set(SKILLS.values())
    assert {(task.operation, task.alphabet) for task in PRETRAINING if not task.known} == {
        (skill.operation, skill.alphabet) for skill in SKILLS.values()
    }
    assert Task("swap", "AB", known=False).example("ABBAA").text == "swap ABBAA=?"


def test_the_tokenizer_gives_back_every_text(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    for tokenizer in (TOKENIZER, AutoTokenizer.from_pretrained(tmp_path)):
        for text in take(200, [*PRETRAINING, *SKILLS.values()]):
            tokens = tokenizer(text)["input_ids"]
            assert len(tokens) == 3 + LENGTH + len(text.split("=")[1])  # <s>, operation, word, =, answer
            assert tokenizer.unk_token_id not in tokens
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_only_the_answer_is_learned() -> None:
    batch = list(islice(examples(PRETRAINING, seed=0, split="train"), 20))
    tokens, labels = training.encode(TOKENIZER, batch)
    assert tokens.shape == labels.shape == (20, 2 * LENGTH + 4)
    assert {len(example.answer) for example in batch} == {1, LENGTH}
    for example, row in zip(batch, labels, strict=True):
        assert TOKENIZER.decode(row[row != training.IGNORED]) == example.answer + "</s>"


@pytest.mark.parametrize("skill", SKILLS)
def test_accuracy_of_an_oracle_and_of_a_model_that_knows_nothing(skill: str) -> None:
    assert accuracy(Oracle(), TOKENIZER, skill, examples=40) == 1.0
    assert accuracy(pico(), TOKENIZER, skill, examples=40) <= 0.05


def test_models_are_saved_whole_finetunes_change_blocks_only_and_the_seed_decides(
    tmp_path: Path,
) -> None:
    pretrain = training.Schedule("adamw", lr=1e-3, steps=2, batch=4)
    finetune = training.Schedule("sgd", lr=1e-1, steps=2, batch=4)
    config = training.TrainingConfig(hidden=32, layers=1, pretrain=pretrain, finetune=finetune)
    lines: list[str] = []
    folders = training.train_models(tmp_path / "one", config=config, progress=lines.append)
    again = training.train_models(tmp_path / "two", config=config)
    assert list(folders) == ["base", *SKILLS] and len(lines) == 4

    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    assert base.dtype == torch.bfloat16 and base.generation_config.eos_token_id == TOKENIZER.eos_token_id
    for name in SKILLS:
        weights = AutoModelForCausalLM.from_pretrained(folders[name]).state_dict()
        changed = {key for key, value in base.state_dict().items() if not torch.equal(value, weights[key])}
        assert changed and all(key.startswith("model.layers.") for key in changed)
    for name, folder in folders.items():
        assert (folder / "model.safetensors").read_bytes() == (again[name] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("sgd", 1e-1)])
def test_training_learns(optimizer: Literal["adamw", "sgd"], lr: float) -> None:
    model = pico()
    losses: list[str] = []
    for _ in range(2):
        schedule = training.Schedule(optimizer, lr=lr, steps=10, batch=16)
        training.train(model, TOKENIZER, [Task("copy", "01")], schedule, seed=0, progress=losses.append)
    first, last = (float(line.rsplit(" ", 1)[1]) for line in losses)
    assert last < first


def test_table() -> None:
    skills = dict.fromkeys(SKILLS, 0.5)
    scores = {repo: skills for repo in ("demo/base", *(f"demo/{skill}" for skill in SKILLS))}
    lines = _table({**scores, "demo/m": dict.fromkeys(SKILLS, 1.0)}, {"base": "demo/base", "merged": "demo/m"})
    assert lines.splitlines()[0].split() == ["base", "own", "finetune", "merged"]
    assert lines.splitlines()[-1].split() == ["mean", "50", "%", "50", "%", "100", "%"]
