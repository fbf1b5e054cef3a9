"""Localize-and-Stitch on tiny decoders that interfere: is the merge of three finetunes still good at all three skills?

    python benchmarks/decoder.py [--seed 0] [--densities 0.01 0.05 0.1 0.2] [--grafts] [--rivals]
        [--with-data saliency mask ...] [--refits 0.1 1] [--judges loss accuracy] [--inputs 16 64 256 512] [--regmean]
        [--finetune 3 10] [--json FILE] [--work DIR]

Base, skills and training are the demo's (hf_locstitch/demo), in float32 and smaller: with hidden size 64 the Llama has
166 thousand weights, a ninth of the demo's. Hidden sizes 64 and 96, 2 and 3 layers, SGD with 40 and 80 steps and AdamW
at 1e-4, 3e-4 and 1e-3 were tried; this is where finetunes answer all of their skill on seeds 0, 1 and 2, and where the
plain average and the best multiple of the summed task vectors lose most. The figures of magnitude were seen when it
was chosen, those of saliency and mask were not.

Base and finetunes are pushed to a Hub on loopback with the real client, merged by the real command, which pushes the
result, and loaded back from there. Every model is judged on 500 exercises a skill with words that no model was
trained on; scales are tuned on 200 others, drawn anew from the same words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import beside  # noqa: F401
import torch
from demo.skills import SKILLS, Example, accuracy, examples, make_tokenizer
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

HIDDEN, PRETRAIN_STEPS, FINETUNE_STEPS = 64, 800, 80
SCALES = (0.3, 0.4, 0.5, 0.7, 0.85, 1.0, 1.2)
COUNTS = {"train": 64, "validation": 200, "test": 500}
SEEDS = {"train": 11, "validation": 12, "test": 1}  # of the exercises that are drawn


@dataclass(frozen=True)
class Decoders:
    """The testbed: the demo's skills."""

    names: Sequence[str] = tuple(SKILLS)
    split: str = "test"

    def load(self, ref: str, revision: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(ref, revision=revision, dtype=torch.float32).eval()

    def accuracy(self, model: Any, task: str, split: str) -> float:
        return accuracy(model, make_tokenizer(), task, examples=COUNTS[split], seed=SEEDS[split])

    def localization_set(
        self, task: str, split: str, count: int | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        side = "train" if split == "train" else "heldout"
        drawn = islice(examples([SKILLS[task]], seed=SEEDS[split], split=side), count or COUNTS["train"])
        return [{"prompt": one.prompt, "completion": one.answer} for one in drawn], {}

    def finetune(self, model: Any, sets: Mapping[str, Sequence[dict[str, Any]]], epochs: int) -> None:
        from demo.train import FINETUNE, fit

        rows = [Example(row["prompt"], row["completion"]) for own in sets.values() for row in own]
        shuffle = torch.Generator().manual_seed(0)
        batches = [
            [rows[place] for place in places.tolist()]
            for _ in range(epochs)
            for places in torch.randperm(len(rows), generator=shuffle).split(FINETUNE.batch)
        ]
        fit(model, make_tokenizer(), batches, replace(FINETUNE, steps=len(batches)))


def make_experts(folder: Path, seed: int) -> None:
    """Write base and experts under the folder, unless they lie there and were made in the same way."""
    from demo.train import FINETUNE, Schedule, TrainingConfig, train_models

    config = TrainingConfig(
        hidden=HIDDEN,
        pretrain=Schedule("adamw", lr=2e-3, steps=PRETRAIN_STEPS),
        finetune=replace(FINETUNE, steps=FINETUNE_STEPS),
        dtype="float32",
    )
    made_by = {"seed": seed, "threads": torch.get_num_threads(), "torch": torch.__version__, **asdict(config)}
    record, content = folder / "made_by.json", json.dumps(made_by, indent=2)
    if not record.exists() or record.read_text(encoding="utf-8") != content:
        train_models(folder, seed=seed, config=config)
        record.write_text(content, encoding="utf-8")


def run_seed(rows: Sequence[Method], grafts: bool, work: Path, seed: int) -> Result:
    """Experts, merges and their accuracies for one seed. A Hub must be up."""
    bed, folder = Decoders(), work / f"seed-{seed}"
    result = Result(seed, {name: {split: [count] for split, count in COUNTS.items()} for name in bed.names})
    with result.phase("train", "base and experts"):
        make_experts(folder, seed)
    compare(bed, rows, grafts, folder, result)
    return result


def run(args: argparse.Namespace, work: Path) -> str:
    """The benchmark in a work folder. Returns the report."""
    began, rows = time.perf_counter(), asked_rows(args, SCALES)
    with loopback_hub(work):
        results = [run_seed(rows, args.grafts, work, seed) for seed in args.seed]
    if args.json:
        args.json.write_text(json.dumps(as_json(rows, results, hidden=HIDDEN), indent=2) + "\n", encoding="utf-8")
    seeds = ", ".join(map(str, args.seed))
    error = 0.5 / COUNTS["test"] ** 0.5
    title = f"Accuracy on test, seed {seeds} (standard error of one: at most {error:.3f})"
    return "\n".join([title, format_table(results), "", format_times(results, time.perf_counter() - began)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="Localize-and-Stitch on tiny decoders that interfere.")
    add_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as stack:
            work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decoder-")))
            print(run(args, work.resolve()))
    except BenchmarkError as error:
        print(f"decoder: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
