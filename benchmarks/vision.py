"""Localize-and-Stitch on small vision transformers and real handwritten digits: are experts that interfere still good?

    python benchmarks/vision.py [--seed 0] [--densities 0.01 0.05 0.1 0.2] [--grafts] [--rivals]
        [--with-data saliency mask ...] [--refits 0.1 ...] [--json FILE] [--work DIR]

1. An image is four of the 1797 handwritten digits that come with scikit-learn, two by two, 16 by 16 pixels. Digits are
   split into training, validation and test once: no model has seen one that it is judged on.
2. The base, a ViT of 141 thousand weights, learns from nothing to name all four digits. A task shows what it never
   met (digits turned, mirrored, negative or striped) and asks for one corner's digit, or asks what it was never asked
   (which corner has the largest).
3. A task's head is what the base makes of each class in the mean, and stays as it is (as CLIP's text head in the
   paper's vision protocol); an expert is the base with its blocks finetuned on one task under that head.
4. Base and experts are pushed to a Hub on loopback with the real client, merged by the real command, which pushes the
   result, and loaded back from there. Every model is judged with every task's head.

Hidden sizes 64 and 96, 200 to 400 steps of finetuning at 1e-4 to 1e-3 and, as tasks, the last figure of a sum and of a
difference (which experts did not learn) were tried on seed 0; this is where experts are good and a plain average is
not. The figures of the plain average and of multiples of the summed task vectors were seen when it was chosen, no
others. quality.py says what the rows are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from quality import (
    BenchmarkError,
    Method,
    Result,
    add_options,
    as_json,
    asked_rows,
    compare,
    format_table,
    format_times,
    loopback_hub,
)
from torch import Tensor

# transformers reads HF_* at import, so it is imported in functions, once the Hub is up.

BLOCKS = re.compile(r"(^|\.)layers?\.\d+\.")
DIGIT, CLASSES, CORNERS = 8, 10, 4
DIGITS = {"train": 1000, "validation": 300, "test": 497}  # how many of the 1797 a split draws from
COUNTS = {"train": 640, "validation": 300, "test": 1000}  # images of a task that are drawn from them
SEEDS = {"train": 11, "validation": 12, "test": 1}


@dataclass(frozen=True)
class Task:
    """look: of digits, [..., 8, 8] in 0…255. answer: from the digits' names [images, 4], rows first, to a class."""

    look: Callable[[Tensor], Tensor]
    answer: Callable[[Tensor], Tensor]
    classes: int = CLASSES


def striped(digits: Tensor) -> Tensor:
    """Every other row negative."""
    return torch.where(torch.arange(DIGIT).view(-1, 1) % 2 == 0, digits, 255 - digits)


TASKS: Mapping[str, Task] = {
    "largest": Task(lambda digits: digits, lambda names: names.argmax(1), classes=CORNERS),
    "turned": Task(lambda digits: digits.rot90(1, (-2, -1)), lambda names: names[:, 0]),
    "negative": Task(lambda digits: 255 - digits, lambda names: names[:, 1]),
    "striped": Task(striped, lambda names: names[:, 2]),
    "mirrored": Task(lambda digits: digits.flip(-1), lambda names: names[:, 3]),
    "smallest": Task(lambda digits: digits, lambda names: names.argmin(1), classes=CORNERS),
    "overturned": Task(lambda digits: digits.rot90(2, (-2, -1)), lambda names: names[:, 1]),
    "barred": Task(lambda digits: striped(digits.mT).mT, lambda names: names[:, 0]),
}
FIVE = tuple(TASKS)[:5]  # of the tables; the others are for cases of more


@dataclass(frozen=True)
class Training:
    """AdamW; the learning rate rises over the first tenth of the steps and falls in a straight line to nothing."""

    steps: int
    learning_rate: float
    batch: int


@dataclass(frozen=True)
class Making:
    """The size of the models, and how they are trained."""

    hidden: int = 64
    layers: int = 4
    pretraining: Training = Training(steps=800, learning_rate=2e-3, batch=128)
    finetuning: Training = Training(steps=400, learning_rate=1e-4, batch=64)


# ---- images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """pixels: uint8 [images, 16, 16]. names: of the four digits, int64 [images, 4]."""

    pixels: Tensor
    names: Tensor


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """uint8 [1797, 8, 8] in 0…255 and int64 [1797], in an order that is always the same."""
    from sklearn import datasets

    found: Any = datasets.load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    grey = torch.from_numpy(found.images) * 255 / 16
    return grey.round().to(torch.uint8)[order], torch.from_numpy(found.target).long()[order]


def draw(split: str, count: int, generator: torch.Generator, look: Callable[[Tensor], Tensor]) -> Images:
    """Images of four digits of a split."""
    digits, names = load_digits()
    start = sum(DIGITS[before] for before in list(DIGITS)[: list(DIGITS).index(split)])
    chosen = start + torch.randint(0, DIGITS[split], (count, CORNERS), generator=generator)
    corners = look(digits[chosen]).view(count, 2, 2, DIGIT, DIGIT)
    return Images(corners.transpose(2, 3).reshape(count, 2 * DIGIT, 2 * DIGIT), names[chosen])


def examples(task: str, split: str, seed: int) -> tuple[Tensor, Tensor]:
    """The images of a task's split, uint8 [images, 16, 16], and their classes, int64 [images]."""
    generator = torch.Generator().manual_seed(1000 * seed + SEEDS[split])
    images = draw(split, COUNTS[split], generator, TASKS[task].look)
    return images.pixels, TASKS[task].answer(images.names)


def to_input(pixels: Tensor) -> Tensor:
    """As the processor does: float32 [images, 3, 16, 16] in −1…1."""
    return (pixels.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


# ---- models -----------------------------------------------------------------------------------------------------


def make_model(how: Making, seed: int) -> Any:
    """An untrained ViT whose head has a logit for each digit in each corner."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=2 * DIGIT,
        patch_size=4,
        num_channels=3,
        hidden_size=how.hidden,
        intermediate_size=2 * how.hidden,
        num_hidden_layers=how.layers,
        num_attention_heads=how.hidden // 16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CORNERS * CLASSES,
    )
    torch.manual_seed(seed)
    return ViTForImageClassification(config)


def load_model(ref: str | Path, revision: str = "main") -> Any:
    """In float32, in evaluation mode."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(ref, revision=revision, dtype=torch.float32).eval()


@torch.no_grad()
def embed(model: Any, pixels: Tensor) -> Tensor:
    """What a head sees of each image: float32 [images, hidden]."""
    return torch.cat([_seen(model, some) for some in pixels.split(250)])


def _seen(model: Any, pixels: Tensor) -> Tensor:
    return model.base_model(pixel_values=to_input(pixels)).last_hidden_state[:, 0]


def class_head(base: Any, classes: int, pixels: Tensor, labels: Tensor) -> Tensor:
    """The base's mean of each class less the mean of all, length 1. Returns float32 [classes, hidden]."""
    seen = embed(base, pixels)
    means = torch.stack([seen[labels == number].mean(0) for number in range(classes)])
    return F.normalize(means - means.mean(0), dim=-1)


def train(weights: Sequence[Any], how: Training, loss: Callable[[], Tensor]) -> None:
    """Change the weights in place. loss: of the next batch."""
    optimizer = torch.optim.AdamW(weights, lr=how.learning_rate, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (how.steps / 10), 1 - step / how.steps)
    )
    for _ in range(how.steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()


def pretrain(how: Making, seed: int) -> Any:
    """The base."""
    model, generator = make_model(how, seed).train(), torch.Generator().manual_seed(1000 * seed)

    def loss() -> Tensor:
        images = draw("train", how.pretraining.batch, generator, lambda digits: digits)
        logits = model(pixel_values=to_input(images.pixels)).logits  # [images, corners · classes]
        return F.cross_entropy(logits.view(-1, CLASSES), images.names.flatten())

    train(list(model.parameters()), how.pretraining, loss)
    return model.eval()


def finetune(base: Any, head: Tensor, task: Task, how: Training, seed: int) -> Any:
    """A copy of the base under a fixed head, with its blocks trained."""
    model, generator = copy.deepcopy(base).train(), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(BLOCKS.search(name)))

    def loss() -> Tensor:
        images = draw("train", how.batch, generator, task.look)
        return F.cross_entropy(_seen(model, images.pixels) @ head.T, task.answer(images.names))

    train([parameter for parameter in model.parameters() if parameter.requires_grad], how, loss)
    return with_head(model.requires_grad_(True).eval(), head)


def with_head(model: Any, head: Tensor) -> Any:
    """The model with another head, in place."""
    model.classifier = torch.nn.Linear(head.shape[1], head.shape[0])
    with torch.no_grad():
        model.classifier.weight.copy_(head)
        model.classifier.bias.zero_()
    model.config.id2label = {number: f"{number}" for number in range(len(head))}
    model.config.label2id = {f"{number}": number for number in range(len(head))}
    return model


def save(model: Any, folder: Path) -> None:
    """A checkpoint as people publish them: weights, config and image processor."""
    from transformers import ViTImageProcessor

    grey = [0.5, 0.5, 0.5]
    model.save_pretrained(folder)
    ViTImageProcessor(do_resize=False, image_mean=grey, image_std=grey).save_pretrained(folder)


def make_models(folder: Path, how: Making, seed: int, tasks: Sequence[str] = FIVE) -> dict[str, Tensor]:
    """Write base and experts under the folder, unless they lie there and were made in the same way.

    Returns the tasks' heads.
    """
    made_by = {"seed": seed, "threads": torch.get_num_threads(), "torch": torch.__version__, **asdict(how)}
    made_by |= {} if tasks == FIVE else {"tasks": [*tasks]}
    record, content = folder / "made_by.json", json.dumps(made_by, indent=2)
    known = record.exists() and record.read_text(encoding="utf-8") == content
    if not known:
        save(pretrain(how, seed), folder / "base")
    base = load_model(folder / "base")
    heads = {name: class_head(base, TASKS[name].classes, *examples(name, "train", seed)) for name in tasks}
    if not known:
        for number, name in ((list(TASKS).index(name) + 1, name) for name in tasks):
            save(finetune(base, heads[name], TASKS[name], how.finetuning, 1000 * seed + 100 * number), folder / name)
        record.write_text(content, encoding="utf-8")
    return heads


# ---- the benchmark ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """The testbed. heads: of each task, float32 [classes, hidden]. folder: for images that a recipe names.

    training: of an expert.
    """

    heads: Mapping[str, Tensor]
    seed: int
    folder: Path
    split: str = "test"
    training: Training = Making.finetuning

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.heads)

    def load(self, ref: str, revision: str) -> Any:
        return load_model(ref, revision)

    def accuracy(self, model: Any, task: str, split: str) -> float:
        pixels, labels = examples(task, split, self.seed)
        return (embed(model, pixels) @ self.heads[task].T).argmax(1).eq(labels).float().mean().item()

    def localization_set(
        self, task: str, split: str, count: int | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        from PIL import Image

        del count  # there are as many as there are
        pixels, labels = examples(task, split, self.seed)
        images = Path("images", f"{task}.{split}")
        (self.folder / images).mkdir(parents=True, exist_ok=True)
        rows = []
        for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            Image.fromarray(image.numpy()).save(self.folder / images / f"{number}.png")
            rows.append({"image": f"{images.as_posix()}/{number}.png", "label": label})
        return rows, {}

    def finetune(self, model: Any, sets: Mapping[str, Sequence[dict[str, Any]]], epochs: int) -> None:
        """A batch is of one task."""
        shuffle, batch = torch.Generator().manual_seed(0), self.training.batch
        drawn = []
        for task, rows in sets.items():
            pixels = torch.stack([self._read(row["image"]) for row in rows])
            labels = torch.tensor([row["label"] for row in rows])
            for _ in range(epochs):
                order = torch.randperm(len(rows), generator=shuffle)
                drawn += [(self.heads[task], pixels[places], labels[places]) for places in order.split(batch)]
        batches = iter([drawn[place] for place in torch.randperm(len(drawn), generator=shuffle).tolist()])

        def loss() -> Tensor:
            head, images, answers = next(batches)
            return F.cross_entropy(_seen(model, images) @ head.T, answers)

        train(list(model.train().parameters()), replace(self.training, steps=len(drawn)), loss)
        model.eval()

    def _read(self, image: str) -> Tensor:
        from PIL import Image

        return torch.from_numpy(np.array(Image.open(self.folder / image)))


def without_heads(row: Method) -> Method:
    """Methods that merge whole models would merge heads, too, and tasks have heads of their own."""
    return replace(row, flags=(*row.flags, "--exclude", "classifier.*")) if "--method" in row.flags else row


def run_seed(rows: Sequence[Method], grafts: bool, how: Making, work: Path, seed: int) -> Result:
    """Experts, merges and their accuracies for one seed. A Hub must be up."""
    folder = work / f"seed-{seed}"
    result = Result(seed, {name: {split: [count] for split, count in COUNTS.items()} for name in FIVE})
    with result.phase("train", "base and experts"):
        heads = make_models(folder, how, seed)
    compare(Digits(heads, seed, folder, training=how.finetuning), rows, grafts, folder, result)
    return result


def run(args: argparse.Namespace, work: Path, how: Making) -> str:
    """The benchmark in a work folder. Returns the report."""
    began, rows = time.perf_counter(), [without_heads(row) for row in asked_rows(args)]
    with loopback_hub(work):
        results = [run_seed(rows, args.grafts, how, work, seed) for seed in args.seed]
    if args.json:
        content = as_json(rows, results, made=asdict(how))
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    seeds = ", ".join(map(str, args.seed))
    error = 0.5 / COUNTS["test"] ** 0.5
    title = f"Accuracy on test, seed {seeds} (standard error of one: at most {error:.3f})"
    return "\n".join([title, format_table(results), "", format_times(results, time.perf_counter() - began)])


def main(argv: Sequence[str] | None = None, how: Making | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="Localize-and-Stitch on small vision transformers and real digits.")
    add_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as stack:
            work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vision-")))
            print(run(args, work.resolve(), how or Making()))
    except BenchmarkError as error:
        print(f"vision: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
