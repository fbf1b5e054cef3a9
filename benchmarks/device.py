"""Where the time of localizing with data and of refits goes on a device, and the memory there beside the plan's.

    python benchmarks/device.py [--device auto] [--billions 0.1] [--examples 16] [--tokens 64] [--micro-batch 8]
        [--kinds saliency mask refit] [--work DIR] [--json FILE]

First how fast bytes come to the device: from a mapped file, as the package reads weights; from pinned memory; and from
a mapped file through two pinned buffers, one filled while the other is on its way. Then merges of made-up Llamas
(synthetic.py), in this process, with clocks around the functions that move weights to the device and around those that
work on gradients: what faster copies could save is at most the column of copies. Clocks wait for the device at every
turn, so that a merge takes a little longer than without them. The CPU stands in for a device that is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import beside  # noqa: F401
import torch
from speed import table
from synthetic import shape_of, write_models

from hf_locstitch import plan_merge
from hf_locstitch.engine.execute import make
from hf_locstitch.localize import learn, passes, score
from hf_locstitch.localize.grafted_model import MaskedParameter
from hf_locstitch.plan.cost import fit_cost, localizing_cost
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.stitch.refit.weights import Weights
from hf_locstitch.tasks.loading import find_device

BLOCK = 1 << 24  # bytes of a buffer
COPIED = 1 << 29  # bytes copied to see how fast
DENSITY = 0.1
KINDS: Mapping[str, Mapping[str, Any]] = {
    "saliency": {"localizer": {"method": "saliency"}},
    "mask": {"localizer": {"method": "mask", "epochs": 2}},
    "refit": {"localizer": {"method": "magnitude"}, "stitch": {"method": "refit", "lambdas": [1.0], "held_out": 0.0}},
}
CLOCKS = {
    "loading": [(score, "open_grafted_model")],
    "copies": [(MaskedParameter, "graft"), (Weights, "_load")],
    "gradients": [(learn, "_step"), (learn.Sizes, "add"), (passes, "add_rounding")],
}


@dataclass(frozen=True)
class Measured:
    """seconds: within each kind of function, and in all. peak: bytes on the device at most, 0 where torch does not
    count them; planned: the same from headers alone, and for a refit the process's memory with it."""

    kind: str
    seconds: Mapping[str, float]
    total: float
    peak: int
    planned: int


@dataclass
class Clocks:
    """Seconds within functions; what an inner one takes does not count in the outer one."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLOCKS, 0.0))
    inner: list[float] = field(default_factory=lambda: [0.0])

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = self.now() - began
                self.seconds[name] += took - self.inner.pop()
                self.inner[-1] += took

        return call

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def of_memory(device: torch.device, name: str) -> int:
    """What torch says of the device's memory; 0 where it says nothing."""
    function = getattr(torch.get_device_module(device), name, None)
    return 0 if device.type == "cpu" or function is None else int(function(device) or 0)


def copy_through_two_buffers(source: torch.Tensor, into: torch.Tensor) -> None:
    stream = torch.Stream(into.device)
    buffers = [torch.empty(BLOCK, dtype=source.dtype, pin_memory=True) for _ in range(2)]
    sent: list[torch.Event | None] = [None, None]
    for number, (block, target) in enumerate(zip(source.split(BLOCK), into.split(BLOCK), strict=True)):
        if (event := sent[number % 2]) is not None:
            event.synchronize()
        buffer = buffers[number % 2][: len(block)].copy_(block)
        with stream:
            target.copy_(buffer, non_blocking=True)
            sent[number % 2] = stream.record_event()
    stream.synchronize()


def speeds(device: torch.device, folder: Path) -> dict[str, float]:
    """Bytes a second of each way to the device. The file is in the page cache."""
    file = folder / "copied"
    file.write_bytes(b"\1" * COPIED)
    mapped = torch.from_file(str(file), shared=False, size=COPIED, dtype=torch.uint8)
    into = torch.empty(COPIED, dtype=torch.uint8, device=device)
    ways: dict[str, Callable[[], object]] = {"mapped file": partial(into.copy_, mapped)}
    if device.type != "cpu":
        pinned = mapped.clone().pin_memory()
        ways["pinned memory"] = partial(into.copy_, pinned)
        ways["mapped file, two pinned buffers"] = partial(copy_through_two_buffers, mapped, into)
    found = {}
    for name, copy in ways.items():
        copy()
        into.zero_()
        synchronize(device)
        began = time.perf_counter()
        copy()
        synchronize(device)
        found[name] = COPIED / (time.perf_counter() - began)
        if not bool((into == 1).all()):
            raise SystemExit(f"{name}: other bytes have come to {device}")
    file.unlink()
    return found


def write_data(work: Path, args: argparse.Namespace) -> Path:
    """Examples of as many tokens as asked for, in the made-up words of the models."""
    half = args.tokens // 2
    rows = []
    for number in range(args.examples):
        words = [f"word{(number * args.tokens + at) % 8000}" for at in range(args.tokens)]
        rows.append({"prompt": " ".join(words[:half]) + " ", "completion": " ".join(words[half:])})
    file = work / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def measure(kind: str, work: Path, device: torch.device, args: argparse.Namespace) -> Measured:
    """A merge of one finetune."""
    fields = {name: dict(part) for name, part in KINDS[kind].items()}
    fields["localizer"]["density"] = DENSITY
    if kind == "refit":
        fields["stitch"] |= {"inputs": args.examples, "tokens": args.tokens, "batch": args.micro_batch}
    else:
        fields["localizer"]["micro_batch"] = args.micro_batch
    models, data = work / "models", [str(write_data(work, args))]
    asked = {"base": str(models / "base"), "finetuned": [str(models / "ft1")], "data": data, "figures": False, **fields}
    plan = plan_merge(asked, device=str(device))
    cost: Any = fit_cost(plan) if kind == "refit" else localizing_cost(plan)
    clocks = Clocks(device)
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(dir=work) as out:
        for clock, functions in CLOCKS.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, clocks.around(clock, getattr(owner, name))))
        of_memory(device, "reset_peak_memory_stats")
        began = clocks.now()
        make(plan, Path(out) / "merged", Progress(False))
        total = clocks.now() - began
    return Measured(kind, clocks.seconds, total, of_memory(device, "max_memory_allocated"), cost.peak)


def report(device: torch.device, copies: Mapping[str, float], found: Sequence[Measured]) -> str:
    head = [
        "merge",
        *(f"{clock} s" for clock in CLOCKS),
        "passes and the rest s",
        "in all s",
        "device MB",
        "planned MB",
    ]
    rows = [
        [
            one.kind,
            *(f"{one.seconds[clock]:.2f}" for clock in CLOCKS),
            f"{one.total - sum(one.seconds.values()):.2f}",
            f"{one.total:.2f}",
            f"{one.peak / 1e6:.0f}" if one.peak else "",
            f"{one.planned / 1e6:.0f}",
        ]
        for one in found
    ]
    fast = table([f"to {device}", "GB/s"], [[name, f"{speed / 1e9:.1f}"] for name, speed in copies.items()])
    return f"{fast}\n\n{table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of merges on a device.")
    parser.add_argument("--device", default="auto", help="as torch names it (default: an accelerator, if there is one)")
    parser.add_argument("--billions", type=float, default=0.1, help="of parameters, about (default: 0.1)")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each example (default: 64)")
    parser.add_argument("--micro-batch", type=int, default=8, help="examples that pass together (default: 8)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here and reuse them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args()
    device = find_device(args.device)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="device-")))
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "models").exists():
            write_models(work / "models", shape_of(args.billions), 1, 2_000_000_000)
        copies = speeds(device, work)
        found = [measure(kind, work, device, args) for kind in args.kinds]
    print(report(device, copies, found))
    if args.json:
        content = {"device": str(device), "bytes per second": copies, "merges": [asdict(one) for one in found]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
