"""The testbeds with base and experts on disk, and what the base itself could do before it was finetuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import beside  # noqa: F401
import decoder
import minilm
import minilm_tasks
import torch
import vision
from quality import Testbed

TEST = 60  # examples a class, of the MiniLM: half as many as elsewhere, for judging it takes most of the time


@dataclass(frozen=True)
class Ability:
    """What nobody was finetuned on. measure: of a loaded model. better: 1 if more is better, −1 if less is."""

    what: str
    measure: Callable[[Any], float]
    better: int = 1


@dataclass(frozen=True)
class Bed:
    """One testbed and seed. tasks: with an expert each. main: as many of them as most tables merge.

    heads: globs of tensors that tasks have of their own, which no method merges.
    """

    bed: Testbed
    folder: Path
    tasks: Sequence[str]
    main: int
    ability: Ability
    heads: Sequence[str] = ()


def open_minilm(folder: Path, seed: int) -> Bed:
    """Experts for all eight tasks; those that the main merges leave out are what the base could do already."""
    tasks = tuple(minilm_tasks.TASKS)
    settings = minilm.Settings(tasks, (), False, "test", minilm.Training(), folder)
    packages = minilm_tasks.load_packages()
    judge = minilm.make_judge(settings, packages, seed, TEST)
    minilm.make_experts(folder, judge, settings.training, seed, minilm_tasks.fingerprint(packages))
    main = len(minilm.DEFAULT_TASKS)
    others = tasks[main:]

    def zero_shot(model: Any) -> float:
        return sum(judge.accuracy(model, task, "test") for task in others) / len(others)

    ability = Ability(f"zero-shot accuracy at {len(others)} tasks that are not merged", zero_shot)
    return Bed(judge, folder, tasks, main, ability)


def open_decoders(folder: Path, seed: int) -> Bed:
    decoder.make_experts(folder, seed)
    bed = decoder.Decoders()
    ability = Ability("loss on held-out exercises of the fifteen kinds that the base knows", pretraining_loss, -1)
    return Bed(bed, folder, bed.names, len(bed.names), ability)


@torch.no_grad()
def pretraining_loss(model: Any, count: int = 1500) -> float:
    """Mean cross entropy of the answers, in nats a token, on exercises of COMMON with words never trained on."""
    from demo.skills import COMMON, examples, make_tokenizer
    from demo.train import encode

    drawn = islice(examples(COMMON, seed=2, split="heldout"), count)
    tokens, labels = encode(make_tokenizer(), list(drawn))
    return model(input_ids=tokens, labels=labels).loss.item()


def open_vision(folder: Path, seed: int, how: vision.Making | None = None, tasks: Sequence[str] = ()) -> Bed:
    tasks = tuple(tasks or vision.TASKS)
    heads = vision.make_models(folder, how or vision.Making(), seed, tasks)
    named = partial(digits_named, head=vision.load_model(folder / "base").classifier, seed=seed)
    ability = Ability("accuracy at naming all four digits as they were", named)
    main = min(len(vision.FIVE), len(tasks))
    return Bed(vision.Digits(heads, seed, folder), folder, tasks, main, ability, heads=["classifier.*"])


@torch.no_grad()
def digits_named(model: Any, head: Any, seed: int) -> float:
    """Share of the digits of test images, shown as in pretraining, that the base's own head names."""
    generator = torch.Generator().manual_seed(1000 * seed + vision.SEEDS["test"])
    images = vision.draw("test", vision.COUNTS["test"], generator, lambda digits: digits)
    logits = head(vision.embed(model, images.pixels))  # [images, corners · classes]
    named = logits.view(-1, vision.CORNERS, vision.CLASSES).argmax(-1)
    return named.eq(images.names).float().mean().item()


# Title -> a testbed of one seed; making its experts takes most of the time.
OPENERS: Mapping[str, Callable[[Path, int], Bed]] = {
    "MiniLM": open_minilm,
    "decoders": open_decoders,
    "vision": open_vision,
}
