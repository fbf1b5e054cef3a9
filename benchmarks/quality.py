"""What the quality benchmarks share: merges by the real command through a loopback Hub, judged, and their table.

    python benchmarks/quality.py FILE.json...

prints one Markdown table of what benchmarks wrote with --json; seeds may be spread over files, and so may the rows of
a seed.

"average" is the merge at density 1: every mask is full, and the mean of the experts is all that is left. A graft is
the base with one mask alone; it says what a mask holds before others interfere. Normalised accuracy is accuracy
divided by the expert's. The time of a finetuned merge is that of the finetuning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

import beside  # noqa: F401
import torch

from hf_locstitch.tasks.sets import choose
from loopback_hub import LoopbackHub

# transformers and huggingface_hub read HF_* at import, so they are imported in functions, once the Hub is up.

DEFAULT_DENSITIES = (0.01, 0.05, 0.1, 0.2)
SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
TIES_SCALES = (0.5, 1.0, 1.5)
DATA_FREE = {"tsv-m": "tsv-m", "iso-c": "iso-c", "wudi, solved for": "wudi", "ace": "ace"}  # rows -> methods
ALPHAS = (0.1, 0.5, 0.9, 1.0)  # of RegMean
# The authors' update with the paper's values, as docs/quality.md has it.
OFFICIAL = {"method": "mask", "preset": "official", "penalty": 1e-5, "batch": 16, "start_density": None}
# Localizers with data: their fields, and the split of a task that they see.
DATA_METHODS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "saliency": ({"method": "saliency"}, "train"),
    "saliency, held out": ({"method": "saliency"}, "validation"),
    "saliency, midpoint": ({"method": "saliency", "at": [0.5]}, "train"),
    "saliency, midpoint, held out": ({"method": "saliency", "at": [0.5]}, "validation"),
    "mask": ({"method": "mask"}, "train"),
    "mask, held out": ({"method": "mask"}, "validation"),
    "mask, paper": ({"method": "mask", "preset": "paper"}, "train"),
    "mask, official": (OFFICIAL, "train"),
}
OWNER = "demo"
WEIGHTS = "model.safetensors"
JOINT = ("--localizer", "joint", "--stitch", "refit")  # flags of a merge that is solved for without data


class BenchmarkError(RuntimeError):
    """Something outside the benchmark is missing or failed; the message says what to do."""


class Testbed(Protocol):
    """Tasks, and how a model is judged at them. split: "train", "validation" or "test"."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tasks; an expert is named after its task."""
        ...

    @property
    def split(self) -> str:
        """What the table is judged on."""
        ...

    def load(self, ref: str, revision: str) -> Any:
        """A model of the Hub, in float32."""
        ...

    def accuracy(self, model: Any, task: str, split: str) -> float:
        """Share of right answers."""
        ...

    def localization_set(
        self, task: str, split: str, count: int | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Examples as rows, and what a recipe says of them. count: at least so many, if there are; the testbed's own
        number by default."""
        ...

    def finetune(self, model: Any, sets: Mapping[str, Sequence[dict[str, Any]]], epochs: int) -> None:
        """Train a loaded model in place, all its weights, on rows of every task, with the experts' optimiser."""
        ...


# ---- rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to merge, as flags of `hf-locstitch merge`.

    localizer: fields of one that looks at data, which no flag sets. data: the split that it, or a refit, looks at.
    stitch: fields of a refit or RegMean. inputs: of each task, for these or for finetuning; the testbed's own number by
    default. scales, alphas: to be tried, the best on validation stands for the method. epochs: of finetuning the
    finished merge on labelled examples of all tasks.
    """

    name: str
    flags: tuple[str, ...] = ()
    localizer: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    scales: tuple[float, ...] = ()
    stitch: Mapping[str, Any] = field(default_factory=dict)
    inputs: int | None = None
    alphas: tuple[float, ...] = ()
    epochs: int = 0

    @property
    def masked(self) -> bool:
        """Whether it leaves masks that can be grafted alone, and are not those of another row."""
        whole = "--method" in self.flags or self.flags[:2] == ("--density", "1") or "joint" in self.flags
        return not (whole or self.inputs)

    @property
    def variants(self) -> list[Method]:
        """One for each scale and alpha to be tried; itself if there is nothing to try."""
        scaled = [replace(self, flags=(*self.flags, "--scale", f"{s:g}"), scales=()) for s in self.scales] or [self]
        return [
            replace(one, stitch={**one.stitch, "alpha": alpha}, alphas=())
            for one in scaled
            for alpha in self.alphas
        ] or scaled  # fmt: skip

    @property
    def slug(self) -> str:
        """The name as part of a repository's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


def methods(densities: Sequence[float]) -> list[Method]:
    """The rows between the experts and the end of the table; none at all without densities."""
    if not densities:
        return []
    average = Method("average", ("--density", "1"))
    return [average, *(Method(f"magnitude {100 * d:g}%", ("--density", f"{d:g}")) for d in densities)]


def rivals(densities: Sequence[float], scales: Sequence[float] = SCALES) -> list[Method]:
    """Other ways to merge, and to localize without data. Whatever else flags of the command can ask for goes here."""
    tensor = [
        Method(f"magnitude {100 * d:g}%, scope tensor", ("--density", f"{d:g}", "--scope", "tensor"))
        for d in densities
        if d in (0.05, 0.1)
    ]
    task_arithmetic = Method("task arithmetic, tuned", ("--method", "task-arithmetic"), scales=tuple(scales))
    ties = Method("ties 20%", ("--method", "ties", "--density", "0.2"))
    tuned = replace(ties, name="ties 20%, tuned", scales=TIES_SCALES)
    return [
        *tensor,
        task_arithmetic,
        ties,
        tuned,
        *(Method(row, ("--method", name)) for row, name in DATA_FREE.items()),
    ]


def without_data(densities: Sequence[float], inputs: Sequence[int]) -> list[Method]:
    """Refits from the task vectors alone, in joint masks; and those that start from one of them, with inputs."""
    if not densities:
        return []
    under = Method("magnitude 10%, refit without data", ("--density", "0.1", "--stitch", "refit"))
    rows = [Method(f"joint {100 * d:g}%, refit without data", (*JOINT, "--density", f"{d:g}")) for d in densities]
    started = [
        Method(f"joint 30%, refit, {n} inputs", JOINT, data="train", stitch={"inputs": n}, inputs=n) for n in inputs
    ]
    return [under, *rows, *started]


def with_data(densities: Sequence[float], kinds: Sequence[str]) -> list[Method]:
    """Localizers that look at data: on the finetuning examples, or on held-out ones."""
    made = []
    for density in (d for d in densities if d <= 0.1):
        for name in kinds:
            fields, split = DATA_METHODS[name]
            made.append(Method(f"{name} {100 * density:g}%", localizer={**fields, "density": density}, data=split))
    return made


def refits(
    densities: Sequence[float], inputs: Sequence[int], judges: Sequence[str], kinds: Sequence[str]
) -> list[Method]:
    """Values under the masks refitted from their mean, without labels, on inputs that the experts were finetuned on.

    inputs: also on so many of each task. judges: also with labels that judge the lambdas. kinds: also under the masks
    of these localizers.
    """
    rows = []
    for density in densities:
        name = "refit of all" if density == 1 else f"magnitude {100 * density:g}%, refit"
        mean = {"start": "mean"}
        row = Method(name, ("--density", f"{density:g}", "--stitch", "refit"), data="train", stitch=mean)
        rows += [row, *(replace(row, name=f"{name}, judged by {by}", stitch={**mean, "judge": by}) for by in judges)]
        rows += [replace(row, name=f"{name}, {n} inputs", stitch={**mean, "inputs": n}, inputs=n) for n in inputs]
    learned = with_data(densities, kinds)
    fitted = {"flags": ("--stitch", "refit"), "stitch": {"start": "mean"}}
    return rows + [replace(row, name=f"{row.name}, refit", **fitted) for row in learned]


def regmeans() -> list[Method]:
    """RegMean on the inputs that the experts were finetuned on."""
    return [Method("regmean, tuned", ("--method", "regmean"), data="train", alphas=ALPHAS)]


def finetunings(epochs: Sequence[int], inputs: Sequence[int]) -> list[Method]:
    """The plain merge finetuned further on the labelled examples whose inputs a refit sees: what labels and gradients
    are worth. inputs: also on so many of each task."""
    rows = []
    for count in epochs:
        name = f"magnitude 10%, finetuned, {count} {'epoch' if count == 1 else 'epochs'}"
        row = Method(name, ("--density", "0.1"), epochs=count)
        rows += [row, *(replace(row, name=f"{name}, {n} inputs", inputs=n) for n in inputs)]
    return rows


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


# ---- the Hub and the command ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """A checkpoint on the Hub."""

    repo: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def name(self) -> str:
        """As a merge calls it."""
        return self.repo.partition("/")[2]


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


def write_set(file: Path, rows: Iterable[dict[str, Any]], split: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write a localization set. fields: what the testbed has a recipe say of it. Returns all that a recipe says."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"ref": str(file), "number": 64, "role": "finetuning" if split == "train" else "held-out", **fields}


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


# ---- the rows of one seed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """One testbed whose base and experts are on the Hub. folder: where they lie, too, and for recipes and examples."""

    bed: Testbed
    base: Pushed
    experts: Mapping[str, Pushed]
    folder: Path

    def own(self, model: Pushed, task: str, split: str | None = None) -> float:
        """Accuracy at one task."""
        return self.bed.accuracy(self.bed.load(model.repo, model.commit), task, split or self.bed.split)

    def accuracies(self, model: Pushed, split: str | None = None) -> dict[str, float]:
        """Accuracy of one model at every task."""
        return self.accuracies_of(self.bed.load(model.repo, model.commit), split)

    def accuracies_of(self, loaded: Any, split: str | None = None) -> dict[str, float]:
        """The same of one in memory."""
        return {task: self.bed.accuracy(loaded, task, split or self.bed.split) for task in self.bed.names}

    def finetuned(self, merged: Pushed, method: Method) -> Any:
        """A merge finetuned further, on the rows that a refit would draw."""
        loaded = self.bed.load(merged.repo, merged.commit)
        sets = {task: self.rows(task, "train", method.inputs)[0] for task in self.bed.names}
        self.bed.finetune(loaded, sets, method.epochs)
        return loaded

    def rows(self, task: str, split: str, count: int | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Examples of a task, `count` of them, drawn as a refit draws its inputs, and what a recipe says of them."""
        rows, fields = self.bed.localization_set(task, split, count)
        if count is None:
            return rows, fields
        labels = [row["label"] for row in rows] if "label" in rows[0] else None
        return [rows[place] for place in choose(labels, len(rows), count, 0)[:count]], fields

    def suffices(self, method: Method) -> bool:
        """Whether the tasks have as many examples as a method asks for."""
        count = method.inputs or 0
        return all(len(self.rows(task, "train", count)[0]) == count for task in self.bed.names) if count else True

    def graft(self, task: str, merged: Pushed | Path) -> Any:
        """The base with one expert's values under its mask in a merge, and nothing of the others.

        Put together as tensors on disk, which is what masks are of; a model's parameters may have other names.
        """
        from safetensors.torch import load_file, save_file

        from hf_locstitch import load_mask

        tensors, values = (load_file(self.folder / name / WEIGHTS) for name in ("base", task))
        for name, kept in load_mask(str(merged), self.experts[task].name).items():
            tensors[name] = torch.where(kept, values[name], tensors[name])
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as grafted:  # the model may hold its files open
            shutil.copytree(self.folder / "base", grafted, dirs_exist_ok=True)
            save_file(tensors, Path(grafted, WEIGHTS), metadata={"format": "pt"})
            return self.bed.load(grafted, "main")

    def merged(self, method: Method, target: str) -> Pushed:
        """The merge, that of the variant that is best on validation where the method has several."""
        variants = method.variants
        if len(variants) == 1:
            return merge(self.base, self.experts.values(), method.flags, target, self.write_recipe(method))
        own = {name: self.own(expert, name, "validation") for name, expert in self.experts.items()}
        tried: list[tuple[float, Pushed]] = []
        for number, one in enumerate(variants):
            made = merge(self.base, self.experts.values(), one.flags, f"{target}-{number}", self.write_recipe(one))
            found = self.accuracies(made, "validation")
            tried.append((mean(found[name] / own[name] for name in found), made))
        return max(tried, key=lambda one: one[0])[1]

    def write_recipe(self, method: Method) -> Path | None:
        """The recipe of a method that looks at data, and its examples; None for one that does not."""
        if method.data is None:
            return None
        sets = {}
        for task, expert in self.experts.items():
            rows, fields = self.rows(task, method.data, method.inputs)
            file = self.folder / f"{task}.{method.data}{method.inputs or ''}.jsonl"
            sets[expert.name] = write_set(file, rows, method.data, fields)
        recipe = self.folder / f"{method.slug}.yaml"
        localizer = {"localizer": {"micro_batch": 32, **method.localizer}} if method.localizer else {}
        fitting = "regmean" if "regmean" in method.flags else "refit"
        stitch = {"stitch": {"method": fitting, **method.stitch}} if method.stitch else {}
        content = {**localizer, **stitch, "data": sets}
        recipe.write_text(json.dumps(content))  # JSON is YAML
        return recipe


def compare(bed: Testbed, rows: Sequence[Method], grafts: bool, folder: Path, result: Result) -> None:
    """Push base and experts that lie in the folder, make every merge, and put their accuracies into the result.

    grafts: also put each mask of the rows on the base alone. A Hub must be up.
    """
    account = f"{OWNER}/seed{result.seed}"
    with result.phase("push", "base and experts"):
        base = push(folder / "base", f"{account}-base")
        experts = {name: push(folder / name, f"{account}-{name}") for name in bed.names}
    bench = Bench(bed, base, experts, folder)
    with result.phase("evaluate", "base and experts"):
        result.accuracy["base"] = bench.accuracies(base)
        result.accuracy["expert"] = {name: bench.own(expert, name) for name, expert in experts.items()}
    for method in rows:
        if not bench.suffices(method):
            print(f"left out: {method.name}, more than there are", file=sys.stderr)
            continue
        began = time.perf_counter()
        with result.phase("merge", method.name):
            merged = bench.merged(method, f"{account}-{method.slug}")
        loaded = bed.load(merged.repo, merged.commit)
        if method.epochs:
            began = time.perf_counter()
            with result.phase("finetune", method.name):
                loaded = bench.finetuned(merged, method)
        result.merge_seconds[method.name] = time.perf_counter() - began
        with result.phase("evaluate", method.name):
            result.accuracy[method.name] = bench.accuracies_of(loaded)
        if grafts and method.masked and not method.epochs:
            with result.phase("evaluate", f"grafts of {method.name}"):
                alone = {name: bed.accuracy(bench.graft(name, merged), name, bed.split) for name in experts}
            result.accuracy[f"graft {method.name}"] = alone


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


def format_times(results: Sequence[Result], elapsed: float) -> str:
    """Seconds of all phases. elapsed: in all."""
    times = {phase: sum(r.seconds[phase] for r in results) for phase in results[0].seconds}
    clock = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in times.items())
    return f"{clock}; in all {elapsed:.0f} s"


def as_json(rows: Sequence[Method], results: Sequence[Result], **made_of: Any) -> dict[str, Any]:
    """All numbers, and what they depend on."""
    return {
        **made_of,
        "methods": {m.name: {key: value for key, value in asdict(m).items() if key != "name"} for m in rows},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "seeds": [{**asdict(r), "normalised": {row: r.normalised(row) for row in r.accuracy}} for r in results],
    }


def read_results(files: Iterable[Path]) -> list[Result]:
    """From JSON of `as_json`; what files tell of one seed is put together, the first one's numbers before others'."""
    found: dict[int, Result] = {}
    for file in files:
        for seed in json.loads(file.read_text(encoding="utf-8"))["seeds"]:
            result = found.setdefault(seed["seed"], Result(seed["seed"], seed["examples"]))
            for row in ("accuracy", "merge_seconds"):
                known = getattr(result, row)
                known |= {name: value for name, value in seed.get(row, {}).items() if name not in known}
    return [found[seed] for seed in sorted(found)]


def markdown(results: Sequence[Result]) -> str:
    """Normalised accuracy of merges and of grafts, as mean and as worst task, over the seeds that have the row.

    Each figure is the mean over seeds ± half the distance between the largest and the smallest.
    """
    rows = list(dict.fromkeys(row for result in results for row in result.accuracy))
    lines = ["| | seeds | merged | worst task | graft | worst task | seconds |", "| --- | --- |" + " ---: |" * 5]
    for row in rows:
        if row == "expert" or row.startswith("graft "):
            continue
        having = [result for result in results if row in result.accuracy]
        grafted = [result for result in having if f"graft {row}" in result.accuracy]
        cells = [", ".join(str(result.seed) for result in having)]
        for name, some in ((row, having), (f"graft {row}", grafted)):
            shares = [list(result.normalised(name).values()) for result in some]
            cells += [_spread(list(map(mean, shares))), _spread(list(map(min, shares)))]
        seconds = [result.merge_seconds[row] for result in having if row in result.merge_seconds]
        lines.append(f"| {row} | {' | '.join(cells)} | {f'{mean(seconds):.0f}' if seconds else ''} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    around = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{around}"


# ---- the commands' common part ----------------------------------------------------------------------------------


def add_places(parser: argparse.ArgumentParser) -> None:
    """Which seeds, and where things are written."""
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep checkpoints here and reuse experts in it")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of quality is told."""
    add_places(parser)
    parser.add_argument(
        "--densities", type=float, nargs="*", default=DEFAULT_DENSITIES, metavar="F", help="one merge each"
    )
    parser.add_argument("--grafts", action="store_true", help="also the base with each mask alone")
    parser.add_argument("--rivals", action="store_true", help="also task arithmetic, TIES and scope tensor")
    parser.add_argument(
        "--with-data", nargs="*", default=[], choices=DATA_METHODS, metavar="NAME",
        help=f"also these localizers: {', '.join(DATA_METHODS)}",
    )  # fmt: skip
    parser.add_argument(
        "--refits", type=float, nargs="*", default=[], metavar="F", help="also refitted merges at these densities"
    )
    parser.add_argument(
        "--inputs", type=int, nargs="*", default=[], metavar="N", help="these also on so many inputs of each task"
    )
    parser.add_argument(
        "--judges", nargs="*", default=[], choices=["loss", "accuracy"], help="these also with lambda judged by labels"
    )
    parser.add_argument(
        "--refit-under", nargs="*", default=[], choices=DATA_METHODS, metavar="NAME",
        help="these also under the masks of these localizers",
    )  # fmt: skip
    parser.add_argument(
        "--without-data", type=float, nargs="*", default=[], metavar="F",
        help="also refits without data in joint masks of these densities; on --inputs N, from the one of 30 %%",
    )  # fmt: skip
    parser.add_argument("--regmean", action="store_true", help="also RegMean, its alpha tuned")
    parser.add_argument(
        "--finetune", type=int, nargs="*", default=[], metavar="EPOCHS",
        help="also the merge at 10 %% finetuned further on labelled examples; on --inputs N, too",
    )  # fmt: skip


def asked_rows(args: argparse.Namespace, scales: Sequence[float] = SCALES) -> list[Method]:
    """The rows that the options of `add_options` ask for. scales: that task arithmetic is tuned over."""
    dataless = [*methods(args.densities), *(rivals(args.densities, scales) if args.rivals else [])]
    fitted = [*refits(args.refits, args.inputs, args.judges, args.refit_under), *(regmeans() if args.regmean else [])]
    finetuned = finetunings(args.finetune, args.inputs)
    fitted = [*without_data(args.without_data, args.inputs), *fitted]
    return [*dataless, *fitted, *finetuned, *with_data(args.densities, args.with_data)]


def main() -> None:
    parser = argparse.ArgumentParser(description="One table of what quality benchmarks wrote with --json.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    print(markdown(read_results(parser.parse_args().files)))


if __name__ == "__main__":
    main()
