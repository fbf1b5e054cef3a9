"""Compares merges with mergekit's, element by element, and accounts for every difference.

    python benchmarks/parity.py [--billions 0.02] [--peers DIR] [--work DIR]

Both merge the same made-up checkpoints (see synthetic.py) into float32: the average, task arithmetic with factor .4,
and TIES with the top 20 % of each tensor. Average and task arithmetic must agree to rounding. TIES may differ in two
places only: where a |task vector| equals the threshold (this project keeps such ties evenly, mergekit as torch.topk
has them), and where the kept task vectors cancel to exactly zero (no sign is elected here, as the paper's formula
says; mergekit elects the positive one). Exits with 1 if anything else differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peers import install_peers
from safetensors.torch import load_file
from synthetic import shape_of, write_models

ROUNDING = 1e-6
DENSITY = 0.2
FINETUNED = ("ft1", "ft2", "ft3")
# mergekit's method, its parameters of each model, and the same for this project
CASES = {
    "average": ("linear", {"weight": 1.0}, ["--method", "average"]),
    "task arithmetic": ("task_arithmetic", {"weight": 0.4}, ["--method", "task-arithmetic", "--scale", "0.4"]),
    "TIES": (
        "ties",
        {"weight": 1.0, "density": DENSITY},
        ["--method", "ties", "--scope", "tensor", "--density", str(DENSITY)],
    ),
}

State = Mapping[str, torch.Tensor]


def load(folder: Path) -> State:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merge_with_mergekit(peers: Path, work: Path, method: str, parameters: Mapping[str, float]) -> State:
    """JSON is YAML."""
    recipe = {
        "merge_method": method,
        "models": [{"model": str(work / name), "parameters": dict(parameters)} for name in FINETUNED],
        "dtype": "float32",
    }
    if method != "linear":
        recipe |= {"base_model": str(work / "base"), "parameters": {"normalize": method == "ties"}}
    (work / f"{method}.yaml").write_text(json.dumps(recipe))
    out = work / f"mergekit-{method}"
    program = str(peers / "bin" / "mergekit-yaml")
    subprocess.run([program, str(work / f"{method}.yaml"), str(out), "--quiet"], check=True, capture_output=True)
    return load(out)


def merge_with_ours(work: Path, flags: list[str]) -> State:
    out = work / f"ours-{flags[1]}"
    inputs = ["--base", str(work / "base"), "--ft", *(str(work / name) for name in FINETUNED)]
    command = [sys.executable, "-m", "hf_locstitch", "merge", *inputs, *flags, "--dtype", "float32", "--quiet"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    return load(out)


def excuses(base: torch.Tensor, finetuned: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where some |task vector| equals its threshold, and where those above theirs cancel. Bool, of the base's shape."""
    tied, total = torch.zeros(base.shape, dtype=torch.bool), torch.zeros(base.shape, dtype=torch.float64)
    for values in finetuned:
        task_vector = values.double() - base.double()
        size = task_vector.abs().float()
        kept = int(DENSITY * size.numel())
        threshold = size.flatten().kthvalue(size.numel() - kept + 1).values
        tied |= size == threshold
        total += torch.where(size > threshold, task_vector, 0.0)
    return tied, total == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0.02, help="parameters of each model (default: 0.02)")
    parser.add_argument("--peers", type=Path, help="their virtual environment (default: a new one)")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    args = parser.parse_args()
    unexplained = 0
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        if args.peers is None:
            install_peers(work / "peers")
        shape = shape_of(args.billions)
        write_models(work, shape, len(FINETUNED), 1 << 40)
        base, finetuned = load(work / "base"), [load(work / name) for name in FINETUNED]
        for title, (method, parameters, flags) in CASES.items():
            theirs = merge_with_mergekit(args.peers or work / "peers", work, method, parameters)
            ours = merge_with_ours(work, flags)
            assert theirs.keys() == ours.keys() == base.keys()
            largest = max(float((theirs[name] - ours[name]).abs().max()) for name in base)
            counts = {"differ": 0, "tied": 0, "cancelled": 0}
            for name in base:
                differ = (theirs[name] - ours[name]).abs() > ROUNDING
                tied, cancelled = excuses(base[name], [state[name] for state in finetuned])
                counts["differ"] += int(differ.sum())
                counts["tied"] += int((differ & tied).sum())
                counts["cancelled"] += int((differ & ~tied & cancelled).sum())
            excused = counts["tied"] + counts["cancelled"] if method == "ties" else 0
            unexplained += counts["differ"] - excused
            print(
                f"{title:16} of {shape.parameters:,} elements {counts['differ']:,} differ by more than {ROUNDING:g} "
                f"(at most {largest:.2g})"
                + (f": {counts['tied']:,} tied, {counts['cancelled']:,} cancelled" if counts["differ"] else "")
            )
    print(f"{unexplained} differences unexplained")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
