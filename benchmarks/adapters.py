"""A merge of adapters beside one of as many full finetunes: time, memory, and what there is to read and to download.

    python benchmarks/adapters.py [--billions 0.4] [--adapters 3] [--rank 16] [--density 0.1] [--repeat 3]
                                  [--source memory|disk|hub] [--work DIR] [--json FILE]

A Llama of made-up bfloat16 weights (see synthetic.py), full finetunes of it, and LoRAs over all linear layers. Both
merges run in turn, each in a process of its own from start to exit, watched from outside as in speed.py. All inputs
are in the page cache (memory), or none are (disk), or they are fetched from a Hub on loopback into an empty cache
(hub), which takes turns with the merge on the same processors. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

import beside  # noqa: F401
import numpy as np
from safetensors.numpy import save_file
from speed import Usage, measure, table, warm
from synthetic import Shape, shape_of, write_models

from loopback_hub import LoopbackHub

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TIMEOUT = 3600  # seconds, of one merge
SHARD = 2_000_000_000  # bytes


def write_lora(folder: Path, shape: Shape, rank: int, seed: int) -> None:
    """A LoRA over all linear layers, as PEFT saves it."""
    folder.mkdir(parents=True)
    random, tensors = np.random.default_rng(seed), {}
    for name, size in shape.tensors.items():
        if len(size) == 2 and name.split(".")[-2] in LINEAR:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = random.standard_normal((rank, size[1]), dtype=np.float32) * 0.02
            tensors[f"{stem}.lora_B.weight"] = random.standard_normal((size[0], rank), dtype=np.float32) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
                "target_modules": list(LINEAR), "base_model_name_or_path": "base"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def inputs(models: Path, names: list[str]) -> list[Path]:
    return [file for name in names for file in sorted((models / name).glob("*.safetensors"))]


def publish(models: Path, folder: Path) -> LoopbackHub:
    """A started Hub that holds every model."""
    hub = LoopbackHub(folder).start()
    for model in models.iterdir():
        hub.add_repo(f"demo/{model.name}", {file.name: file for file in model.iterdir()})
    return hub


def cool(files: list[Path]) -> None:
    """Drop files from the page cache, so that they come from the disk."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merge(models: Path, names: list[str], density: float, work: Path, hub: LoopbackHub | None) -> Usage:
    """One merge in a process of its own. hub: where the models are fetched from; else they are read from folders."""
    with tempfile.TemporaryDirectory(dir=work, prefix="run-") as folder:
        refs = [f"demo/{name}" if hub else str(models / name) for name in names]
        online = ["env", "HF_HUB_OFFLINE=0", "HF_HUB_DISABLE_XET=1", f"HF_ENDPOINT={hub.endpoint}"] if hub else []
        command = [*online, sys.executable, "-m", "hf_locstitch", "merge", "--base", refs[0], "--ft", *refs[1:],
                   "--density", str(density), "--no-figures", "--quiet", "--out", f"{folder}/out"]  # fmt: skip
        return measure(command, Path(folder), TIMEOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description="A merge of adapters beside one of as many full finetunes.")
    parser.add_argument("--billions", type=float, default=0.4, help="of parameters, about (default: 0.4)")
    parser.add_argument("--adapters", type=int, default=3, metavar="N")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--source", choices=["memory", "disk", "hub"], default="memory", help="of all inputs")
    parser.add_argument("--work", type=Path, metavar="DIR", help="write models here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="adapters-") as folder:
        work, shape = Path(folder).resolve(), shape_of(args.billions)
        models = work / "models"
        write_models(models, shape, args.adapters, SHARD)
        for number in range(args.adapters):
            write_lora(models / f"lora{number + 1}", shape, args.rank, number)
        kinds = {kind: ["base", *(f"{kind}{i + 1}" for i in range(args.adapters))] for kind in ("ft", "lora")}
        runs: dict[str, list[Usage]] = {kind: [] for kind in kinds}
        hub = publish(models, work / "hub") if args.source == "hub" else None
        for _ in range(args.repeat):
            for kind, names in kinds.items():
                (cool if args.source == "disk" else warm)(inputs(models, names))
                runs[kind].append(merge(models, names, args.density, work, hub))
                if error := runs[kind][-1].error:
                    sys.exit(f"adapters.py: the merge of {', '.join(names)} failed: {error}")
        sizes = {kind: sum(f.stat().st_size for f in inputs(models, names[1:])) for kind, names in kinds.items()}
    if args.json:
        args.json.write_text(json.dumps({kind: [asdict(run) for run in ran] for kind, ran in runs.items()}, indent=2))
    print(f"{shape.parameters:,} parameters, {args.adapters} of each, rank {args.rank}, density {args.density},")
    print(f"inputs from {args.source}\n")
    print(report(runs, sizes, args.adapters))


def report(runs: dict[str, list[Usage]], sizes: dict[str, int], count: int) -> str:
    """Medians over the rounds."""
    called = {"ft": f"{count} full finetunes", "lora": f"{count} LoRAs"}
    head = ["", "wall, s", "processor, s", "peak anonymous, MB", "peak resident, MB", "finetunes on disk, MB"]
    rows = [
        [
            called[kind],
            f"{median(run.wall for run in ran):.1f}",
            f"{median(run.cpu for run in ran):.1f}",
            f"{median(run.peak_anonymous for run in ran) / 1e6:.0f}",
            f"{median(run.peak_rss for run in ran) / 1e6:.0f}",
            f"{sizes[kind] / 1e6:,.0f}",
        ]
        for kind, ran in runs.items()
    ]
    return table(head, rows)


if __name__ == "__main__":
    main()
