"""Compares merges with mergekit's, element by element, and accounts for every difference.

    python benchmarks/parity.py [--billions 0.02] [--peers DIR] [--work DIR] [--only CASE...]

Both programs are given the same configs of mergekit, over the same made-up checkpoints (see synthetic.py), and write
float32. They must agree to 1e-6, and to 1e-5 where mergekit takes angles between tensors in float32 (SLERP, Karcher
mean). Where entries are kept by rank (TIES, Breadcrumbs) or signs are elected they may differ in two places only: where
a |task vector| equals a threshold (this project keeps such ties evenly or by place, mergekit as torch sorts them), and
where the kept task vectors cancel to zero (no sign is elected here, as the paper's formula says; mergekit elects the
positive one). DARE and DELLA draw at random: they are compared where they drop nothing. Exits with 1 if anything else
differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peers import install_peers
from safetensors.torch import load_file
from synthetic import shape_of, write_models

ROUNDING = 1e-6
OF_ANGLES = {"slerp": 1e-5, "karcher": 1e-5}  # angles that float32 knows to five digits
FINETUNED = ("ft1", "ft2", "ft3")
BY_PART = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.2]},
    {"value": 0.5},
]

State = Mapping[str, torch.Tensor]
Config = dict[str, Any]


def _of_all(method: str, parameters: Config, base: str | None = "base", **shared: Any) -> Config:
    """A config with the same parameters for each finetune."""
    models = [{"model": name, "parameters": parameters} for name in FINETUNED]
    return {"merge_method": method, "models": models, "parameters": shared} | ({"base_model": base} if base else {})


def _weighted(method: str, weights: list[Any], base: str | None = "base", **shared: Any) -> Config:
    models = [{"model": name, "parameters": {"weight": one}} for name, one in zip(FINETUNED, weights, strict=True)]
    return {"merge_method": method, "models": models, "parameters": shared} | ({"base_model": base} if base else {})


CASES: Mapping[str, Config] = {
    "linear": _of_all("linear", {"weight": 1.0}, base=None),
    "linear, weights": _weighted("linear", [0.7, 0.2, [0.1, 0.9]], base=None),
    "task_arithmetic": _of_all("task_arithmetic", {"weight": 0.4}),
    "task_arithmetic, by layer": _weighted("task_arithmetic", [BY_PART, 0.3, [0, 1]], **{"lambda": 0.8}),
    "ties": _of_all("ties", {"weight": 1.0, "density": 0.2}),
    "ties, weights": _weighted("ties", [0.5, 0.3, 0.7], density=0.2, normalize=False, int8_mask=True),
    "ties, densities": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": name, "parameters": {"weight": weight, "density": density}}
            for name, weight, density in zip(FINETUNED, (0.5, 0.3, 0.7), (0.2, 0.5, 0.33), strict=True)
        ],
        "parameters": {},
    },
    "breadcrumbs": _of_all("breadcrumbs", {"weight": 0.5, "density": 0.3, "gamma": 0.05}),
    "breadcrumbs_ties": _of_all("breadcrumbs_ties", {"weight": 0.5, "density": 0.3, "gamma": 0.05}, normalize=True),
    "dare_ties, all kept": _weighted("dare_ties", [0.5, 0.3, 0.7], density=1.0),
    "della, all kept": _weighted("della", [0.5, 0.3, 0.7], density=1.0, **{"lambda": 1.1}),
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": [{"model": m} for m in FINETUNED]},
    "karcher": {"merge_method": "karcher", "models": [{"model": m} for m in FINETUNED]},
    "slerp": {
        "merge_method": "slerp",
        "base_model": "ft1",
        "slices": [{"sources": [{"model": m, "layer_range": "all"} for m in ("ft2", "ft1")]}],
        "parameters": {"t": BY_PART},
    },
}


def load(folder: Path) -> State:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_config(work: Path, case: Config, layers: int) -> Path:
    """As YAML, with the models' folders in place of their names. JSON is YAML."""
    text = json.dumps({**case, "dtype": "float32"}).replace('"all"', f"[0, {layers}]")
    for name in ("base", *FINETUNED):
        text = text.replace(f'"{name}"', json.dumps(str(work / name)))
    path = work / "mergekit.yaml"
    path.write_text(text)
    return path


def merge_with(command: list[str], config: Path, out: Path) -> State:
    done = subprocess.run([*command, str(config), *([] if "mergekit-yaml" in command[0] else ["--out"]), str(out),
                           "--quiet"], capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return load(out)


def borders(case: Config, model: Config, n: int) -> Iterator[int]:
    """The ranks, from the smallest |task vector| of a tensor, of the first and last that are kept."""
    given = {**case["parameters"], **model["parameters"]}
    if case["merge_method"] == "ties":
        yield n - int(given["density"] * n)
    elif case["merge_method"].startswith("breadcrumbs"):
        largest = int(given["gamma"] * n)
        yield from (n - largest - int(given["density"] * n), n - largest - 1)


def excuses(case: Config, base: torch.Tensor, finetuned: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where some |task vector| equals a threshold, and where those between theirs cancel. Bool, of the base's shape."""
    tied = torch.zeros(base.shape, dtype=torch.bool)
    total, sizes = torch.zeros(base.shape, dtype=torch.float64), torch.zeros(base.shape, dtype=torch.float64)
    for values, model in zip(finetuned, case["models"], strict=True):
        task_vector = values.double() - base.double()
        size = task_vector.abs()
        found = size.flatten().sort().values
        bounds = [found[rank] for rank in borders(case, model, len(found))]
        for bound in bounds:
            tied |= size == bound
        low, high = (bounds[0], bounds[-1] if len(bounds) > 1 else found[-1] + 1) if bounds else (-1.0, found[-1] + 1)
        weighted = model["parameters"]["weight"] * torch.where((size > low) & (size < high), task_vector, 0.0)
        total, sizes = total + weighted, sizes + weighted.abs()
    return tied, total.abs() <= ROUNDING * sizes


def compare(title: str, case: Config, theirs: State, ours: State, base: State, finetuned: list[State]) -> int:
    """Print a line, and return how many differences are unexplained."""
    assert theirs.keys() == ours.keys() == base.keys()
    largest = max(float((theirs[name] - ours[name]).abs().max()) for name in base)
    rounding = OF_ANGLES.get(case["merge_method"], ROUNDING)
    counts = {"differ": 0, "tied": 0, "cancelled": 0}
    signs = case["merge_method"].endswith(("ties", "della"))
    ranked = case["merge_method"].startswith(("ties", "breadcrumbs"))
    for name in base:
        differ = (theirs[name] - ours[name]).abs() > rounding
        if differ.any() and (signs or ranked):
            tied, cancelled = excuses(case, base[name], [state[name] for state in finetuned])
            counts["tied"] += int((differ & tied).sum())
            counts["cancelled"] += int((differ & ~tied & cancelled & signs).sum())
        counts["differ"] += int(differ.sum())
    elements = sum(tensor.numel() for tensor in base.values())
    why = f": {counts['tied']:,} tied, {counts['cancelled']:,} cancelled" if counts["differ"] else ""
    differing = f"{counts['differ']:,} differ by more than {rounding:g} (at most {largest:.2g})"
    print(f"{title:26} of {elements:,} elements {differing}{why}", flush=True)
    return counts["differ"] - counts["tied"] - counts["cancelled"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0.02, help="parameters of each model (default: 0.02)")
    parser.add_argument("--peers", type=Path, help="their virtual environment (default: a new one)")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    args = parser.parse_args()
    unexplained = 0
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        if args.peers is None:
            install_peers(work / "peers")
        program = str((args.peers or work / "peers") / "bin" / "mergekit-yaml")
        shape = shape_of(args.billions)
        write_models(work, shape, len(FINETUNED), 1 << 40)
        base, finetuned = load(work / "base"), [load(work / name) for name in FINETUNED]
        for number, (title, case) in enumerate(CASES.items()):
            if args.only and title not in args.only:
                continue
            config = write_config(work, case, shape.layers)
            theirs = merge_with([program], config, work / f"mergekit-{number}")
            ours = merge_with([sys.executable, "-m", "hf_locstitch", "merge"], config, work / f"ours-{number}")
            unexplained += compare(title, case, theirs, ours, base, finetuned)
    print(f"{unexplained} differences unexplained")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
