"""Commands of every kind, to be stopped and started again: what kills.py and damage.py share.

Two families of models, each a base and two finetunes, lie in folders and on a loopback Hub: `weights`, of made-up
weights (see synthetic.py), and `model`, tiny Llamas that transformers runs, with their heads in shards of their own.
Each command has a process of its own, forked from one that has the libraries imported: else that would take most of the
time, and most of the kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import beside  # noqa: F401
from demo.skills import SKILLS, examples, make_tokenizer
from huggingface_hub import HfApi
from synthetic import shape_of, write_models

from hf_locstitch.cli.main import main
from loopback_hub import Link, LoopbackHub

NAMES = ("base", "ft1", "ft2")
HOME = "home"  # of the Hub's cache
TICK = 0.005  # seconds
IMPORTED = [
    "datasets", "transformers", "transformers.models.llama.modeling_llama", "hf_locstitch.engine.localize_run",
    "hf_locstitch.engine.model_run", "hf_locstitch.localize.search_with_data", "hf_locstitch.plan.planning",
    "hf_locstitch.report.figures.draw", "hf_locstitch.report.publish", "hf_locstitch.stitch.refit.lambda_search",
    "hf_locstitch.stitch.refit.regression_mean", "hf_locstitch.tasks.objectives.causal_lm", "stopping",
]  # fmt: skip
INCOMPLETE = "hub/**/*.locstitch-incomplete"


@dataclass(frozen=True)
class Way:
    """A command without where its result goes: into a folder, to the Hub, or both; in one process or several."""

    name: str
    command: str
    folder: bool = True
    hub: bool = False
    processes: int = 1


_WEIGHTS = "--base weights/base --ft weights/ft1 weights/ft2 --density 0.1 --shard-size {shards}"
_MODEL = "--base model/base --ft model/ft1 model/ft2 --data {work}/ft1.jsonl {work}/ft2.jsonl --no-figures"
WAYS = [
    Way("merge", f"merge {_WEIGHTS}", hub=True),
    Way("merge of folders", f"merge {_WEIGHTS} --no-figures".replace("weights/", "{work}/weights/")),
    Way("merge --no-cache", f"merge {_WEIGHTS} --no-figures --no-cache", folder=False, hub=True),
    Way("merge --no-cache in two processes", f"merge {_WEIGHTS} --no-figures --no-cache", hub=True, processes=2),
    Way("localize", "localize --base weights/base --ft weights/ft1 --density 0.1 --no-figures"),
    Way(
        "stitch",
        "stitch --base weights/base --localized {work}/localized/ft1 {work}/localized/ft2 --shard-size {shards} "
        "--no-figures",
    ),
    Way("saliency", f"merge {_MODEL} --localizer saliency --density 0.1"),
    Way("mask", f"merge {_MODEL} --localizer mask --density 0.1", hub=True),
    Way("refit", f"merge {_MODEL} --stitch refit --density 0.1", hub=True),
    Way("regmean", f"merge {_MODEL} --method regmean"),
]


@dataclass(frozen=True)
class Command:
    """One that runs, in one process or several. said: the file that holds what it says."""

    processes: Sequence[Any]
    said: Path

    def ends_within(self, seconds: float) -> bool:
        """As a launcher does, the first process that fails ends the others."""
        until = time.monotonic() + seconds
        while (running := [one for one in self.processes if one.exitcode is None]) and time.monotonic() < until:
            multiprocessing.connection.wait([one.sentinel for one in running], max(0, until - time.monotonic()))
            if any(one.exitcode for one in self.processes):
                self.kill()
        return not running

    def kill(self) -> None:
        for one in self.processes:
            one.kill()
        for one in self.processes:
            one.join()

    def end(self) -> tuple[int, str]:
        """Its exit status and what it said, once it has ended."""
        while not self.ends_within(60):
            pass
        return max(abs(one.exitcode) for one in self.processes), self.said.read_text().strip()


def _run(words: Sequence[str], said: Path, environment: Mapping[str, str]) -> None:
    """In a process of its own."""
    os.environ.update(environment)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.exit(main(words))


def _launched(count: int) -> list[dict[str, str]]:
    """What a launcher sets in the environment of each of so many processes; nothing for one alone."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    counts = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**place, **counts, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@dataclass
class Undisturbed:
    """What a command makes when nothing disturbs it, and when (in seconds) it begins to write and ends."""

    results: dict[str, str]
    began: float
    ended: float


@dataclass
class Bench:
    """Models, their Hub, and a place for results. shards: bytes of each of the outputs', of `weights`."""

    work: Path
    hub: LoopbackHub
    random: random.Random
    shards: int
    undisturbed: dict[str, Undisturbed] = field(default_factory=dict)
    server: Any = field(default_factory=lambda: multiprocessing.get_context("forkserver"))
    numbers: Iterator[int] = field(default_factory=count)
    pace: float = 1.0  # time that things take now, by what they took undisturbed

    def start(self, way: Way) -> Command:
        words = way.command.format(work=self.work, shards=self.shards).split()
        words += ["--out", str(self._out(way))] if way.folder else []
        words += ["--push-to", _target(way)] if way.hub else []
        return self.run([*words, "--quiet"], way.processes)

    def run(self, words: Sequence[str], processes: int = 1) -> Command:
        said = self.work / f"said-{next(self.numbers)}"
        started = [self.server.Process(target=_run, args=(words, said, place)) for place in _launched(processes)]
        for process in started:
            process.start()
        return Command(started, said)

    def _out(self, way: Way) -> Path:
        return self.work / f"out-{_slug(way)}"

    def results(self, way: Way) -> dict[str, str]:
        """SHA-256 of every file of the result, in the folder and in the repo; of the manifest without its time."""
        found, out = {}, self._out(way)
        for path in (path for path in out.rglob("*") if path.is_file()):
            found[f"folder: {path.relative_to(out)}"] = _digest(path.name, path.read_bytes())
        if way.hub:
            for file in self.hub.files(_target(way)):
                found[f"repo: {file}"] = _digest(file, self.hub.read(_target(way), file))
            found["commits"] = str(len(self.hub.commits(_target(way))))
        return found

    def left(self, way: Way) -> list[Path]:
        """The files of unfinished work."""
        partial = self._partial(way)
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()] if partial else []
        return [path for path in files if not path.is_symlink()] + sorted((self.work / HOME).glob(INCOMPLETE))

    def _partial(self, way: Way) -> Path | None:
        scratch = f"hf-locstitch/{_target(way).replace('/', '--')}/.merged.*.partial"
        found = [*self.work.glob(f".{self._out(way).name}.*.partial"), *(self.work / HOME).glob(scratch)]
        return found[0] if found else None

    def stage(self, way: Way) -> str:
        """How far a stopped command had come, told from what it left."""
        partial = self._partial(way)
        if partial is None:
            return "complete" if self._out(way).exists() else "not begun"
        out, spill = partial / "out", partial / "spill"
        if (out / "README.md").exists():
            return "finishing"
        if list(partial.glob("*.done")) or list(out.glob("*.safetensors")):
            return "writing"
        if (spill / "fit").exists():
            return "fitting"
        return "localizing"

    def clear(self, way: Way) -> None:
        """As if the command had never been given; what is in the cache goes as well."""
        for folder in (self._out(way), self._partial(way), self.work / HOME):
            shutil.rmtree(folder or "", ignore_errors=True)
        if way.hub:
            HfApi(self.hub.endpoint, token="hf_loopback").delete_repo(_target(way), missing_ok=True)

    def measure(self, way: Way) -> None:
        """Carry it out undisturbed."""
        start, began = time.monotonic(), 0.0
        command = self.start(way)
        while not command.ends_within(TICK):
            if not began and self._partial(way):
                began = time.monotonic() - start
        ended = time.monotonic() - start
        finish(command, way.name)
        self.undisturbed[way.name] = Undisturbed(self.results(way), began, ended)
        self.clear(way)

    def run_and_kill(self, way: Way) -> bool:
        """Start it and kill it at a random moment, mostly of its work; False if it came to its end before."""
        known, first = self.undisturbed[way.name], self._partial(way) is None
        moment = self.random.uniform(0.8 * known.began, known.ended)
        start = time.monotonic()
        command = self.start(way)
        if first and moment > known.began:  # see how fast the machine is just now
            while self._partial(way) is None and not command.ends_within(TICK):
                pass
            self.pace = (time.monotonic() - start) / known.began
        if not command.ends_within(max(0, start + moment * self.pace - time.monotonic())):
            command.kill()
            return True
        finish(command, way.name)
        return False

    def differing(self, way: Way) -> list[str]:
        """Files that are not as when undisturbed, and what is left behind."""
        found, due = self.results(way), self.undisturbed[way.name].results
        wrong = sorted(name for name in found.keys() | due.keys() if found.get(name) != due.get(name))
        return wrong + [f"left behind: {path}" for path in (*self.left(way), self._partial(way)) if path]


def finish(command: Command, name: str) -> None:
    """Wait for its end, which is to be a success."""
    status, said = command.end()
    if status:
        raise SystemExit(f"{name}: exit status {status}: {said}")


@contextmanager
def bench_of(arguments: argparse.Namespace) -> Iterator[tuple[Bench, list[Way]]]:
    """The bench and the ways that the command line asks for, all carried out once undisturbed."""
    ways = [way for way in WAYS if way.name in arguments.ways]
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder, LoopbackHub(Path(folder) / "hub") as hub:
        work = Path(folder)
        shape = shape_of(arguments.billions)
        write_models(work / "weights", shape, 2, shape.parameters * 2 // 3)
        write_runnable(work)
        for family in ("weights", "model"):
            for name in NAMES:
                hub.add_repo(f"{family}/{name}", {path.name: path for path in (work / family / name).iterdir()})
        for name in ("HF_TOKEN", "HF_HUB_CACHE"):
            os.environ.pop(name, None)
        os.environ.update(hub.environment(work / HOME))
        os.environ["NUMBA_CACHE_DIR"] = str(work / "loops")  # not in HOME, which is cleared: else each command compiles
        multiprocessing.set_forkserver_preload(IMPORTED)
        hub.link = Link(arguments.speed * 1e6)
        bench = Bench(work, hub, random.Random(arguments.seed), shape.parameters * 2 // 4)
        for name in NAMES[1:]:  # for stitch
            words = ["localize", "--base", "weights/base", "--ft", f"weights/{name}", "--no-figures", "--quiet"]
            finish(bench.run([*words, "--out", f"{work}/localized/{name}"]), "localize")
        for way in ways:
            bench.measure(way)
            known = bench.undisturbed[way.name]
            print(f"undisturbed: {known.ended:.1f} s, work from {known.began:.1f} s  {way.name}", flush=True)
        yield bench, ways


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0.01, help="parameters of made-up weights (default: 0.01)")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], default=[way.name for way in WAYS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", type=float, default=0.0, help="MB/s of a connection to the Hub (default: no limit)")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    return parser


def print_table(counts: Counter[tuple[str, str]], ways: Sequence[Way], columns: Sequence[str]) -> None:
    """counts: by name of the way and column."""
    print("| way | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
    for way in ways:
        print(f"| {way.name} | " + " | ".join(str(counts[way.name, column]) for column in columns) + " |")


def write_runnable(work: Path) -> None:
    """A tiny Llama and two finetunes of it, that differ everywhere, and a file of exercises for each finetune."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    for number, name in enumerate(NAMES):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(work / "model" / name)
        tokenizer.save_pretrained(work / "model" / name)
        _set_apart(work / "model" / name, "lm_head.weight")
    for seed, (name, skill) in enumerate(zip(NAMES[1:], SKILLS.values(), strict=False)):
        rows = [
            {"prompt": example.prompt, "completion": example.answer}
            for example in islice(examples([skill], seed=seed, split="train"), 48)
        ]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _set_apart(folder: Path, name: str) -> None:
    """Move a tensor to a shard of its own."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{1 + (key == name)}-of-00002.safetensors" for key in state}
    for file in set(where.values()):
        part = {key: tensor for key, tensor in state.items() if where[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _digest(name: str, content: bytes) -> str:
    if name == "locstitch.json":
        content = json.dumps({**json.loads(content), "seconds": 0}).encode()
    return hashlib.sha256(content).hexdigest()


def _target(way: Way) -> str:
    return f"demo/{_slug(way)}"  # where its token may write


def _slug(way: Way) -> str:
    return way.name.replace(" --", "-").replace(" ", "-")
