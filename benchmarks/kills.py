"""Kills merges with SIGKILL at random moments, starts the same command again, and compares the bytes in the end.

    python benchmarks/kills.py [--kills 50] [--billions 0.03] [--seed 0] [--work DIR]

Base and finetunes of made-up weights (see synthetic.py) lie on a loopback Hub. Three ways of merging take turns: into
a folder and to the Hub from downloads that are kept, to the Hub alone without the cache, and into a folder from
folders. A merge is started and killed until it was allowed to end; then its files must be those of an undisturbed one,
and the Hub must hold one commit of it. Prints in which stages the kills struck.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import beside  # noqa: F401
from huggingface_hub import HfApi
from synthetic import shape_of, write_models

from loopback_hub import LoopbackHub

NOT_COMPARED = {"locstitch.json", ".gitattributes"}  # the first tells the time


@dataclass
class Way:
    """One way of merging. inputs: refs, the base first. target: where it is pushed to, if it is."""

    name: str
    inputs: Sequence[str]
    flags: Sequence[str]
    out: Path | None
    target: str | None
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)


class Campaign:
    def __init__(self, work: Path, billions: float, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        self.hub = LoopbackHub(work / "hub").start()
        models = work / "models"
        shape = shape_of(billions)
        write_models(models, shape, 2, shape.parameters * 2 // 3)
        names = ["base", "ft1", "ft2"]
        for name in names:
            self.hub.add_repo(f"demo/{name}", {path.name: path for path in (models / name).iterdir()})
        refs, folders = [f"demo/{name}" for name in names], [str(models / name) for name in names]
        shards = ["--shard-size", str(shape.parameters * 2 // 4)]
        self.ways = [
            Way("kept downloads, folder and Hub", refs, shards, work / "out1", "demo/merged1"),
            Way("no cache, Hub alone", refs, ["--no-cache", *shards], None, "demo/merged2"),
            Way("folders, folder", folders, shards, work / "out3", None),
        ]

    def start(self, way: Way) -> subprocess.Popen[bytes]:
        where = ["--out", str(way.out)] if way.out else []
        where += ["--push-to", str(way.target)] if way.target else []
        env = os.environ | self.hub.environment(self.work / "home")
        base, *finetuned = way.inputs
        merge = ["merge", "--base", base, "--ft", *finetuned, "--names", "a", "b", "--density", "0.1", "--quiet"]
        command = [sys.executable, "-m", "hf_locstitch", *merge, *way.flags, *where]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE)

    def finish(self, process: subprocess.Popen[bytes], way: Way) -> None:
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"{way.name}: the merge failed: {said.decode()}")

    def results(self, way: Way) -> dict[str, str]:
        """SHA-256 of every file of the merge, in the folder and in the repo."""
        found = {}
        if way.out:
            for path in (path for path in way.out.rglob("*") if path.is_file()):
                found[f"folder {path.relative_to(way.out)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        if way.target:
            for file in self.hub.files(way.target):
                found[f"repo {file}"] = hashlib.sha256(self.hub.read(way.target, file)).hexdigest()
            found["commits"] = str(len(self.hub.commits(way.target)))
        return {name: digest for name, digest in found.items() if name.split(" ")[-1] not in NOT_COMPARED}

    def clear(self, way: Way) -> None:
        """As if the merge had never been made; what is in the cache goes as well."""
        for folder in (way.out, self.work / "home"):
            shutil.rmtree(folder or "", ignore_errors=True)
        if way.target:
            HfApi(self.hub.endpoint, token="hf_loopback").delete_repo(way.target, missing_ok=True)

    def undisturbed(self, way: Way) -> None:
        began = time.monotonic()
        self.finish(self.start(way), way)
        way.seconds = time.monotonic() - began
        way.expected = self.results(way)
        self.clear(way)

    def stage(self, way: Way) -> str:
        """How far the merge had come, told from what it left."""
        places = [*self.work.glob(".out*.partial"), *(self.work / "home").glob("hf-locstitch/*/.merged*.partial")]
        if way.out and way.out.exists():
            return "uploading, folder complete"
        if not places:
            return "before the first byte"
        out = places[0] / "out"
        if (out / "README.md").exists():
            return "uploading, stage complete"
        if list(places[0].glob("*.done")) or list(out.glob("*.safetensors")):
            return "writing shards"
        if (out / "masks").exists() or list((places[0] / "spill").glob("*.mask*")):
            return "writing masks"
        return "downloading and localizing" if list((places[0] / "spill").iterdir()) else "downloading"

    def trial(self, way: Way, kills: Counter[str]) -> None:
        while self.random.random() < 0.75:
            process = self.start(way)
            try:
                process.wait(self.random.uniform(0.3, 1.0) * way.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills[self.stage(way)] += 1
                continue
            self.finish(process, way)
            break
        else:
            self.finish(self.start(way), way)
        found = self.results(way)
        if found != way.expected:
            wrong = sorted(n for n in {*found, *way.expected} if found.get(n) != way.expected.get(n))
            raise SystemExit(f"{way.name}: other bytes after {sum(kills.values())} kills: {', '.join(wrong)}")
        left = [*self.work.glob(".out*"), *(self.work / "home").glob("hf-locstitch/*")]
        if left:
            raise SystemExit(f"{way.name}: left behind: {left}")
        self.clear(way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--billions", type=float, default=0.03, help="parameters of each model (default: 0.03)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        campaign = Campaign(Path(folder), args.billions, args.seed)
        for way in campaign.ways:
            campaign.undisturbed(way)
            print(f"undisturbed: {way.seconds:.1f} s  {way.name}", flush=True)
        kills: Counter[str] = Counter()
        merges = 0
        while sum(kills.values()) < args.kills:
            campaign.trial(campaign.ways[merges % len(campaign.ways)], kills)
            merges += 1
    print(f"{sum(kills.values())} kills in {merges} merges; every merge ended in the bytes of an undisturbed one")
    for stage, count in kills.most_common():
        print(f"{count:4} {stage}")


if __name__ == "__main__":
    main()
