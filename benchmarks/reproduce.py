"""The claims of the paper, each measured on three testbeds and at least three seeds, and written down with its verdict.

    python benchmarks/reproduce.py [--seed N ...] [--testbeds MiniLM decoders vision] [--jobs 2] [--work DIR]
        [--page docs/reproduction.md]

Base and experts are those of minilm.py, decoder.py and vision.py. What was measured of a seed is kept in DIR, so that
a run that was stopped goes on; the page, its figures and the numbers that both are made of are written from it at the
end; testbeds that were not asked for keep the numbers that the page has. Nothing on it is written by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import beside
import torch
from minilm_tasks import DataError
from quality import WEIGHTS, BenchmarkError
from reproduction.beds import OPENERS
from reproduction.measure import Seed
from reproduction.page import ASSETS, NUMBERS, write_page
from reproduction.record import Record
from reproduction.rows import Grid

from hf_locstitch import __version__
from hf_locstitch.artifacts.manifest import weights_sha256
from hf_locstitch.checkpoints.source import file_sha256

SEEDS = {"MiniLM": range(3), "decoders": range(5), "vision": range(3)}  # more where they are cheap
PAGE = beside.ROOT / "docs" / "reproduction.md"


def run_seed(work: Path, grid: Grid, testbed: str, seed: int) -> dict[str, Any]:
    """All that is measured of one seed. Runs in a process of its own."""
    from transformers.utils import logging  # reads HF_* at import

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    began, folder = time.process_time(), work / testbed / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    bed = OPENERS[testbed](folder, seed)
    models = weights_sha256({name: file_sha256(folder / name / WEIGHTS) for name in ("base", *bed.tasks)})
    facts = {"testbed": testbed, "seed": seed, "models": models, "hf_locstitch": __version__, "grid": asdict(grid)}
    made = folder / models[:16]
    made.mkdir(exist_ok=True)
    record = Record(made / "record.json", facts, began)
    Seed(bed, grid, made, record, partial(say, f"{testbed} {seed}")).measure()
    return record.content


def say(where: str, line: str) -> None:
    print(f"{where}: {line}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Every seed of every testbed, the long ones first, several at once."""
    units = [(testbed, seed) for testbed in args.testbeds for seed in args.seed or SEEDS[testbed]]
    if args.jobs == 1:
        return [run_seed(work, Grid(), *unit) for unit in units]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        return [future.result() for future in [pool.submit(run_seed, work, Grid(), *unit) for unit in units]]


def with_others(results: Sequence[dict[str, Any]], page: Path, grid: Grid) -> list[dict[str, Any]]:
    """Also the testbeds that were not measured now, as the page has them, if on the same grid."""
    file, plain = page.parent / ASSETS / NUMBERS, json.loads(json.dumps(asdict(grid)))
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    measured = {content["facts"]["testbed"] for content in results}
    others = [
        content
        for content in before
        if content["facts"]["testbed"] not in measured and content["facts"]["grid"] == plain
    ]
    return sorted([*others, *results], key=lambda content: list(OPENERS).index(content["facts"]["testbed"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="The claims of the paper, measured.")
    parser.add_argument("--seed", type=int, nargs="+", help="the same for every testbed (default: SEEDS)")
    parser.add_argument("--testbeds", nargs="+", choices=OPENERS, default=list(OPENERS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="seeds measured at once, a core each (default: 2)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep models and numbers here, and go on from them")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="what is written (default: the docs')")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reproduce-")))
            results = run(args, work.resolve())
    except (BenchmarkError, DataError) as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        return 1
    write_page(with_others(results, args.page, Grid()), args.page, Grid())
    print(f"{args.page}, in {(time.perf_counter() - began) / 60:.0f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
