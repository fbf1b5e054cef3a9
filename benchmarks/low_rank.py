"""Merges of LoRA experts: what serves where updates are of low rank.

    python benchmarks/low_rank.py [--bed decoder vision] [--seed 0] [--rank 4 16] [--rate 1e-3] [--same-start]
        [--json FILE] [--work DIR]

The testbeds of decoder.py and vision.py with experts made by PEFT: LoRA on every linear of the blocks, trained with
AdamW on the same data, merged into the base and saved as full finetunes. --same-start: all adapters begin at the same
random A, as where one seed is set for all. Rows as in quality.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import beside  # noqa: F401
import decoder
import torch
import torch.nn.functional as F
import vision
from quality import (
    JOINT,
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

ROWS = [
    Method("average", ("--density", "1")),
    Method("magnitude 10%", ("--density", "0.1")),
    Method("tsv-m", ("--method", "tsv-m")),
    Method("magnitude 10%, refit without data", ("--density", "0.1", "--stitch", "refit")),
    Method("joint 30%, refit without data", JOINT),
    Method("joint 100%, refit without data", (*JOINT, "--density", "1")),
    Method("joint 30%, refit, 64 inputs", JOINT, data="train", stitch={"inputs": 64}, inputs=64),
]


@dataclass(frozen=True)
class Lora:
    """rate: of AdamW, of both kinds of models. steps: of training an expert."""

    rank: int
    rate: float
    same_start: bool
    steps: int = 300


def with_adapter(base: Any, how: Lora, seed: int) -> Any:
    """A copy of the base with a fresh adapter on every linear of its blocks, alone trainable."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0 if how.same_start else seed)
    linears = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and vision.BLOCKS.search(f"{name}.")
    ]
    config = LoraConfig(r=how.rank, lora_alpha=2 * how.rank, target_modules=linears, lora_dropout=0.0)
    return get_peft_model(copy.deepcopy(base), config)


def make_decoders(folder: Path, how: Lora, seed: int) -> decoder.Decoders:
    from demo.skills import COMMON, SKILLS, examples, make_tokenizer
    from demo.train import Schedule, fit, save
    from transformers import AutoModelForCausalLM

    decoder.make_experts(folder.parent / f"decoder-{seed}", seed)
    tokenizer, source = make_tokenizer(), folder.parent / f"decoder-{seed}" / "base"
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    save(copy.deepcopy(base), tokenizer, folder / "base")
    schedule = Schedule("adamw", lr=how.rate, steps=how.steps)
    for number, (name, skill) in enumerate(SKILLS.items(), start=1):
        model = with_adapter(base, how, 100 * seed + number)
        stream = examples([*COMMON, *[skill] * len(COMMON)], seed=4 * seed + number, split="train")
        fit(model, tokenizer, (list(islice(stream, schedule.batch)) for _ in range(schedule.steps)), schedule)
        save(model.merge_and_unload(), tokenizer, folder / name)
    return decoder.Decoders()


def make_vision(folder: Path, how: Lora, seed: int) -> vision.Digits:
    making = vision.Making()
    heads = vision.make_models(folder.parent / f"vision-{seed}", making, seed)
    base = vision.load_model(folder.parent / f"vision-{seed}" / "base")
    vision.save(copy.deepcopy(base), folder / "base")
    training = replace(making.finetuning, steps=how.steps, learning_rate=how.rate)
    for number, name in enumerate(vision.FIVE, start=1):
        task = vision.TASKS[name]
        model, head = with_adapter(base, how, 100 * seed + number).train(), heads[name]
        generator = torch.Generator().manual_seed(1000 * seed + 100 * number)

        def loss(model: Any = model, head: Any = head, task: vision.Task = task, generator: Any = generator) -> Any:
            images = vision.draw("train", training.batch, generator, task.look)
            seen = model.base_model.model.base_model(pixel_values=vision.to_input(images.pixels)).last_hidden_state
            return F.cross_entropy(seen[:, 0] @ head.T, task.answer(images.names))

        vision.train([weight for weight in model.parameters() if weight.requires_grad], training, loss)
        vision.save(vision.with_head(model.merge_and_unload().eval(), head), folder / name)
    return vision.Digits(heads, seed, folder)


BEDS: Mapping[str, Any] = {"decoder": make_decoders, "vision": make_vision}


def run(bed: str, seeds: list[int], how: Lora, work: Path) -> list[Result]:
    """The rows of one testbed. A Hub must be up."""
    results = []
    counts = decoder.COUNTS if bed == "decoder" else vision.COUNTS
    rows = [vision.without_heads(row) for row in ROWS] if bed == "vision" else ROWS
    for seed in seeds:
        folder = work / f"{bed}-rank{how.rank}-{'same' if how.same_start else 'own'}-{seed}"
        names = decoder.SKILLS if bed == "decoder" else vision.FIVE
        result = Result(seed, {name: {split: [count] for split, count in counts.items()} for name in names})
        with result.phase("train", f"{bed}, rank {how.rank}"):
            made = BEDS[bed](folder, how, seed)
        compare(made, rows, False, folder, result)
        results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Merges of LoRA experts.")
    parser.add_argument("--bed", nargs="+", choices=BEDS, default=list(BEDS))
    add_places(parser)
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--same-start", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, written = time.perf_counter(), {}
    try:
        with contextlib.ExitStack() as stack:
            work = (args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="low-rank-")))).resolve()
            stack.enter_context(loopback_hub(work))  # one for all: its client reads where it is but once
            for bed in args.bed:
                for rank in args.rank:
                    how = Lora(rank, args.rate, args.same_start)
                    results = run(bed, args.seed, how, work)
                    print(f"{bed}, rank {rank}, {args.rate:g}, {'one start' if args.same_start else 'own starts'}")
                    print(format_table(results))
                    print(format_times(results, time.perf_counter() - began), flush=True)
                    written[f"{bed}, rank {rank}"] = as_json(ROWS, results, rate=args.rate)
    except BenchmarkError as error:
        print(f"low_rank: error: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
