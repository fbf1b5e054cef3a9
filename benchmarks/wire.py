"""How long a merge from the Hub takes on a link that gives each connection only so much, beside the least it can take.

    python benchmarks/wire.py [--speed 3] [--latency 0.05] [--shards 4] [--megabytes 91] [--repeat 3]
                              [--requests 20] [--window 60] [--connections 4] [--only NAME...]
                              [--work DIR] [--json FILE]

A Hub on loopback, in a process of its own, serves a base and two finetunes of made-up weights over a link of `speed`
MB/s and `latency` seconds a connection. In turn, each as a whole process with an empty cache:

floor      the same bytes over as many connections as a merge has, thrown away
merge      hf-locstitch merge, into the cache
passing    hf-locstitch merge --no-cache
snapshots  snapshot_download of the three repos, then hf-locstitch merge of the folders
two        hf-locstitch merge in two processes under torchrun
xet        hf-locstitch merge of repos in Xet, through hf_xet

and once each under a limit of requests, and of connections. Every merge must give the same bytes, and the Hub's log
tells how often each byte of a weight file went over the wire.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import beside  # noqa: F401
from synthetic import shape_of, write_models

from hf_locstitch.checkpoints.read_ahead import IN_ALL
from loopback_hub import Link, LoopbackHub, RateLimit

MB = 1e6
PROGRAM = ["hf_locstitch", "merge", "--density", "0.1", "--no-figures", "--quiet"]
MERGE = [sys.executable, "-m", *PROGRAM]
FLOOR = """
import sys, threading, urllib.request
url_sizes, connections = eval(sys.argv[1]), int(sys.argv[2])
whole = sum(size for _, size in url_sizes)
piece = max(whole // (connections * 4), 1 << 20)
left = [(url, at, min(at + piece, size)) for url, size in url_sizes for at in range(0, size, piece)]
def work():
    while left:
        try:
            url, start, stop = left.pop()
        except IndexError:
            return
        ask = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}"})
        with urllib.request.urlopen(ask) as answer:
            while answer.read(1 << 18):
                pass
threads = [threading.Thread(target=work) for _ in range(connections)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
SNAPSHOTS = """
import sys
from huggingface_hub import snapshot_download
print(*(snapshot_download(repo) for repo in sys.argv[1:]), sep="\\n")
"""


def serve(root: str, end: Connection) -> None:
    """A Hub in a process of its own, which does what it is told."""
    with LoopbackHub(Path(root)) as hub:
        end.send(hub.endpoint)
        while (told := end.recv()) is not None:
            name, value = told
            if name == "add":
                end.send(hub.add_repo(value[0], {path.name: path for path in Path(value[1]).iterdir()}))
            elif name == "log":
                end.send([(one.method, one.path, one.range, one.status, one.sent) for one in hub.requests])
            elif name == "clear":
                hub.requests.clear()
                end.send(None)
            else:
                setattr(hub, name, value)
                end.send(None)


class Remote:
    """The Hub of another process."""

    def __init__(self, root: Path) -> None:
        context = get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=serve, args=(str(root), other), daemon=True)
        self._process.start()
        self.endpoint: str = self._end.recv()

    def tell(self, name: str, value: Any = None) -> Any:
        self._end.send((name, value))
        return self._end.recv()

    def close(self) -> None:
        self._end.send(None)
        self._process.join(5)
        self._process.terminate()


@contextmanager
def served(root: Path) -> Iterator[Remote]:
    hub = Remote(root)
    try:
        yield hub
    finally:
        hub.close()


class Bench:
    """The repos, and the ways to merge them."""

    def __init__(self, hub: Remote, work: Path, models: Path, label: str) -> None:
        self.hub, self.work = hub, work
        self.repos = [f"demo/{label}-{folder.name}" for folder in sorted(models.iterdir())]
        self.sizes: dict[str, int] = {}
        for repo, folder in zip(self.repos, sorted(models.iterdir()), strict=True):
            commit = hub.tell("add", (repo, str(folder)))
            for path in folder.glob("*.safetensors"):
                self.sizes[f"{hub.endpoint}/{repo}/resolve/{commit}/{path.name}"] = path.stat().st_size
        self.hashes: set[str] = set()

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def floor(self, connections: int) -> float:
        return self._timed([sys.executable, "-c", FLOOR, repr(list(self.sizes.items())), str(connections)])

    def merge(self, *flags: str) -> float:
        out = self.work / "out"
        took = self._timed([*MERGE, "--base", self.repos[0], "--ft", *self.repos[1:], "--out", str(out), *flags])
        return self._checked(out, took)

    def xet(self) -> float:
        self.hub.tell("xet", True)
        try:
            return self.merge()
        finally:
            self.hub.tell("xet", False)

    def two(self) -> float:
        out = self.work / "out"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        flags = ["--base", self.repos[0], "--ft", *self.repos[1:], "--out", str(out)]
        return self._checked(out, self._timed([*launch, *PROGRAM, *flags]))

    def snapshots(self) -> float:
        out, began = self.work / "out", time.monotonic()
        folders = self._run([sys.executable, "-c", SNAPSHOTS, *self.repos]).split()
        self._run([*MERGE, "--base", folders[0], "--ft", *folders[1:], "--out", str(out)])
        return self._checked(out, time.monotonic() - began)

    def twice(self) -> int:
        """Bytes of weights that went over the wire beyond the first time, since the log was cleared."""
        sent: Counter[str] = Counter()
        for method, path, _, status, count in self.hub.tell("log"):
            if method == "GET" and status in (0, 200, 206):
                sent[self.hub.endpoint + path] += count
        return sum(max(0, sent[url] - size) for url, size in self.sizes.items())

    def _timed(self, command: list[str]) -> float:
        self.hub.tell("clear")
        began = time.monotonic()
        self._run(command)
        return time.monotonic() - began

    def _run(self, command: list[str]) -> str:
        home = self.work / "home"
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        variables |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_loopback"}
        variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
        return done.stdout

    def _checked(self, out: Path, took: float) -> float:
        """The time, once the merge was seen to have the bytes of the others."""
        weights = sorted(out.glob("*.safetensors"))
        found = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in weights)).hexdigest()
        self.hashes.add(found)
        if len(self.hashes) > 1:
            raise SystemExit("two merges of the same models differ")
        shutil.rmtree(out)
        return took

    def forget(self) -> None:
        shutil.rmtree(self.work / "home", ignore_errors=True)


def rounds(bench: Bench, ways: Mapping[str, Callable[[], float]], repeat: int) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat):
        for name, way in ways.items():
            bench.forget()
            took[name].append(way())
            more = f", {bench.twice():,} bytes again" if name in ("merge", "passing", "two") else ""
            print(f"{name:<10} {took[name][-1]:6.1f} s{more}", flush=True)
    bench.forget()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=float, default=3.0, help="MB/s of a connection")
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--megabytes", type=float, default=91.0, help="of one model")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="of floor, merge, passing, snapshots, two, xet, limited, few")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="wire-") as folder, served(Path(folder) / "hub") as hub:
        work = Path(folder)
        shape = shape_of(args.megabytes * MB / 2e9)
        write_models(work / "models", shape, 2, int(2.05 * shape.parameters / args.shards))
        bench = Bench(hub, work, work / "models", "wire")
        hub.tell("link", Link(args.speed * MB, args.latency))
        ways: dict[str, Callable[[], float]] = {
            "floor": lambda: bench.floor(IN_ALL),
            "merge": bench.merge,
            "passing": lambda: bench.merge("--no-cache"),
            "snapshots": bench.snapshots,
            "two": bench.two,
            "xet": bench.xet,
        }
        chosen = {name: way for name, way in ways.items() if args.only is None or name in args.only}
        print(f"{bench.nbytes / MB:.0f} MB in {len(bench.sizes)} files, {args.speed} MB/s and {args.latency} s each")
        took = rounds(bench, chosen, args.repeat)
        report: dict[str, Any] = {"seconds": took, "bytes": bench.nbytes, "files": len(bench.sizes)}
        for name in took:
            if name != "floor" and "floor" in took:
                ratio = median(one / least for one, least in zip(took[name], took["floor"], strict=True))
                report[f"{name} / floor"] = ratio
                print(f"{name:<10} {ratio:5.2f} x the floor")
        if args.only is None or "limited" in args.only:
            hub.tell("rate_limit", RateLimit(args.requests, args.window))
            report["limited"] = rounds(bench, {"limited": bench.merge}, 1)["limited"]
            hub.tell("rate_limit", None)
        if args.only is None or "few" in args.only:
            hub.tell("link", Link(args.speed * MB, args.latency, args.connections))
            report["few"] = rounds(bench, {"few": bench.merge}, 1)["few"]
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
