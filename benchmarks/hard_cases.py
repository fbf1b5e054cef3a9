"""Sets of finetunes that are hard to merge, on the vision transformers: does solving for the values still pay?

    python benchmarks/hard_cases.py [--case NAME ...] [--seed 0] [--json FILE] [--work DIR]

two, five, eight    so many tasks
bf16                base and experts in bfloat16, finetuned at a third of the rate: small updates beside coarse weights
long                one expert of five finetuned at thirty times the rate: its task vector is the longest by far
large               all five finetuned at ten times the rate
twice               one expert of five given a second time

What the rows are says quality.py; the length of task vectors beside that of the base's blocks is printed for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import vision
from quality import (
    JOINT,
    WEIGHTS,
    BenchmarkError,
    Method,
    Result,
    add_places,
    as_json,
    compare,
    format_table,
    format_times,
    loopback_hub,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

ROWS = [
    Method("average", ("--density", "1")),
    Method("ties 20%", ("--method", "ties", "--density", "0.2")),
    Method("wudi, solved for", ("--method", "wudi")),
    Method("magnitude 10%", ("--density", "0.1")),
    Method("magnitude 10%, refit without data", ("--density", "0.1", "--stitch", "refit")),
    Method("joint 30%, refit without data", JOINT),
    Method("joint 100%, refit without data", (*JOINT, "--density", "1")),
]
MAKING = vision.Making()


def faster(times: float) -> vision.Making:
    """Experts finetuned at so many times the rate."""
    rate = times * MAKING.finetuning.learning_rate
    return replace(MAKING, finetuning=replace(MAKING.finetuning, learning_rate=rate))


def of_tasks(count: int) -> Callable[[Path, int], dict[str, Tensor]]:
    return lambda folder, seed: vision.make_models(folder, MAKING, seed, tuple(vision.TASKS)[:count])


def bf16(folder: Path, seed: int) -> dict[str, Tensor]:
    heads = vision.make_models(folder, faster(0.3), seed)
    for name in ("base", *heads):
        file = folder / name / WEIGHTS
        tensors = {tensor: values.to(torch.bfloat16) for tensor, values in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return heads


def long(folder: Path, seed: int) -> dict[str, Tensor]:
    heads, other = vision.make_models(folder, MAKING, seed), folder / "other"
    vision.make_models(other, faster(30), seed, ("turned",))
    shutil.copytree(other / "turned", folder / "turned", dirs_exist_ok=True)
    return heads


def large(folder: Path, seed: int) -> dict[str, Tensor]:
    return vision.make_models(folder, faster(10), seed)


def twice(folder: Path, seed: int) -> dict[str, Tensor]:
    heads = vision.make_models(folder, MAKING, seed)
    shutil.copytree(folder / "turned", folder / AGAIN, dirs_exist_ok=True)
    return {**heads, AGAIN: heads["turned"]}


AGAIN = "turned-again"
CASES: Mapping[str, Callable[[Path, int], dict[str, Tensor]]] = {
    "two": of_tasks(2),
    "five": of_tasks(5),
    "eight": of_tasks(8),
    "bf16": bf16,
    "long": long,
    "large": large,
    "twice": twice,
}


class Tasks(vision.Digits):
    """The testbed; a task given twice is judged twice."""

    def accuracy(self, model: object, task: str, split: str) -> float:
        return super().accuracy(model, task.removesuffix("-again"), split)


def lengths(folder: Path, tasks: list[str]) -> str:
    """Of each task vector, as a share of the base's length, over the blocks."""
    base = load_file(folder / "base" / WEIGHTS)
    blocks = [name for name in base if vision.BLOCKS.search(name)]
    whole = sum(base[name].double().square().sum() for name in blocks).sqrt()
    shares = []
    for task in tasks:
        tuned = load_file(folder / task / WEIGHTS)
        moved = sum((tuned[name].double() - base[name].double()).square().sum() for name in blocks).sqrt()
        shares.append(f"{task} {moved / whole:.3f}")
    return "task vector / base: " + ", ".join(shares)


def run(case: str, seeds: list[int], work: Path) -> list[Result]:
    """The rows of one case. A Hub must be up."""
    results = []
    for seed in seeds:
        folder = work / f"{case}-{seed}"
        began = time.perf_counter()
        heads = CASES[case](folder, seed)
        result = Result(seed, {name: {split: [count] for split, count in vision.COUNTS.items()} for name in heads})
        result.seconds["train"] = time.perf_counter() - began
        print(f"{case}, seed {seed}: {lengths(folder, list(heads))}", flush=True)
        compare(Tasks(heads, seed, folder), [vision.without_heads(row) for row in ROWS], False, folder, result)
        results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Merges of finetunes that are hard to merge.")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    add_places(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, written = time.perf_counter(), {}
    try:
        with contextlib.ExitStack() as stack:
            work = (args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hard-")))).resolve()
            stack.enter_context(loopback_hub(work))
            for case in args.case:
                results = run(case, args.seed, work / "models")
                print(format_table(results))
                print(format_times(results, time.perf_counter() - began), flush=True)
                written[case] = as_json(ROWS, results)
                if args.json:
                    args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    except BenchmarkError as error:
        print(f"hard_cases: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
