"""How fast a merge is and how much memory it takes, beside the peers and beside the least that any merge must do.

    python benchmarks/speed.py [--sizes 0.1 0.4 1.6] [--finetunes 3] [--counts 2 4 8] [--repeat 3]
                               [--peers DIR | --no-peers] [--work DIR] [--json FILE] [--markdown FILE]

1. Checkpoints of made-up weights are written (see synthetic.py), one size after the other.
2. The contenders (see peers.py) merge them in turn, A B C A B C ..., each in a process of its own from start to exit,
   imports included. Before every run all inputs are read once, so that they come from memory and not from the disk.
3. Every process is watched from outside: wall and processor seconds, memory, bytes read and written.

Ratios are taken inside a round, where both processes met about the same machine, and then the median is taken over
the rounds. The floor reads all inputs once and writes one model, in plain Python. Linux only: all comes from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from peers import (
    DENSITY,
    FLOOR,
    HASHED,
    OURS,
    RIVAL,
    Contender,
    Job,
    floors,
    install_peers,
    ours,
    peers,
    versions,
    weights,
)

INTERVAL = 0.02  # seconds between two looks at a process
LOOKS_PER_TREE = 10  # looks at known processes before new children are searched
COLD = 0.01  # share of the inputs that may come from the disk in a run that counts as warm,
PROGRAM = 100_000_000  # and bytes of the program's own files
HERE = Path(__file__).resolve().parent
GB = 1e9


class BenchmarkError(RuntimeError):
    """The benchmark cannot run; the message says what to do."""


@dataclass(frozen=True)
class Case:
    """What is merged. billions: of parameters, as asked for."""

    billions: float
    finetunes: int


@dataclass(frozen=True)
class Run:
    """One process and its children. Times in seconds, all else in bytes.

    peak_rss: with file pages that are mapped. peak_anonymous: without. read, written: through system calls, so reads
    of mapped files do not show. disk_read: what was not in the page cache. output: size of the merged weights.
    load: the machine's load average (1 minute) at the start. error: None if it went well.
    """

    contender: str
    billions: float
    finetunes: int
    round: int
    command: str
    wall: float
    cpu: float
    peak_rss: int
    peak_anonymous: int
    read: int
    written: int
    disk_read: int
    inputs: int
    output: int
    load: float
    error: str | None

    @property
    def case(self) -> Case:
        return Case(self.billions, self.finetunes)

    @property
    def cold(self) -> bool:
        return self.disk_read > COLD * self.inputs + PROGRAM


class Watch:
    """Peaks of the memory of a process and its children, in bytes, from looks at /proc."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._tree = [pid]
        self._looks = 0
        self.peak_rss = self.peak_anonymous = 0

    def look(self) -> None:
        if self._looks % LOOKS_PER_TREE == 0:
            self._tree = list(_tree(self._pid))
        self._looks += 1
        states = [_memory(pid) for pid in self._tree]
        self.peak_anonymous = max(self.peak_anonymous, sum(state.get("RssAnon", 0) for state in states))
        rss = sum(state.get("VmRSS", 0) for state in states)
        self.peak_rss = max(self.peak_rss, rss, *(state.get("VmHWM", 0) for state in states))


def _tree(pid: int) -> Iterator[int]:
    """The process and all its descendants that live."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(children).split():
            yield from _tree(int(child))


def _memory(pid: int) -> dict[str, int]:
    """Fields of /proc/PID/status that are sizes, in bytes."""
    rows = (line.split() for line in _read(Path(f"/proc/{pid}/status")).splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def _io(pid: int) -> dict[str, int]:
    """Fields of /proc/PID/io in bytes, the children that it waited for included."""
    rows = (line.split(": ") for line in _read(Path(f"/proc/{pid}/io")).splitlines())
    return {name: int(value) for name, value in rows}


def _read(path: Path) -> str:
    """The text of a file in /proc; nothing if the process has gone."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True)
class Usage:
    """What a process used; see Run. error: how it ended, if not well."""

    wall: float
    cpu: float
    peak_rss: int
    peak_anonymous: int
    read: int
    written: int
    disk_read: int
    error: str | None


def measure(command: Sequence[str], cwd: Path, timeout: float) -> Usage:
    """Run a command and watch it until it ends. timeout: seconds, after which it is killed."""
    log = cwd / "stderr.txt"
    start = time.perf_counter()
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=cwd, env=_environment(cwd), start_new_session=True
        )
    ended = _End(process.pid)
    watch = Watch(process.pid)
    late = False
    try:
        while not ended.wait(INTERVAL):
            watch.look()
            if not late and time.perf_counter() - start > timeout:
                late = True
                os.killpg(process.pid, signal.SIGKILL)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    io = _io(process.pid)  # before the process is reaped
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(
        wall=ended.at - start,
        cpu=used.ru_utime + used.ru_stime,
        peak_rss=watch.peak_rss,
        peak_anonymous=watch.peak_anonymous,
        read=io.get("rchar", 0),
        written=io.get("wchar", 0),
        disk_read=io.get("read_bytes", 0),
        error=f"stopped after {timeout:.0f} s" if late else _failure(process.returncode, log),
    )


class _End:
    """Waits in a thread for a process to end, to the millisecond, and leaves it to be reaped. at: perf_counter()."""

    def __init__(self, pid: int) -> None:
        self.at = 0.0
        self._pid = pid
        self._event = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        self.at = time.perf_counter()
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended after so many seconds."""
        return self._event.wait(seconds)


def _environment(home: Path) -> dict[str, str]:
    """Without network, with caches that are empty at the start of every run, and with modules compiled as installed."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**own, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}


def _failure(status: int, log: Path) -> str | None:
    """The exit status and the last line on standard error, if it is not 0."""
    if status == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit status {status}: {lines[-1] if lines else 'nothing on standard error'}"


@dataclass(frozen=True)
class Setting:
    """work: everything is written below it. timeout: of one process, seconds. shard: largest input file, bytes."""

    contenders: Sequence[Contender]
    repeat: int
    timeout: float
    shard: float
    work: Path


def run_size(setting: Setting, billions: float, counts: Sequence[int]) -> Iterator[list[Run]]:
    """The runs of every case of one size, on one set of checkpoints."""
    models = setting.work / "models"
    _check_disk(setting.work, billions, max(counts))
    say(f"{billions} B: writing a base and {max(counts)} finetunes")
    with _removed(models):
        command = [sys.executable, str(HERE / "synthetic.py"), str(models), "--billions", str(billions)]
        subprocess.run([*command, "--finetunes", str(max(counts)), "--shard-gb", str(setting.shard / GB)], check=True)
        os.sync()
        for count in counts:
            yield run_case(setting, Case(billions, count), models)


def run_case(setting: Setting, case: Case, models: Path) -> list[Run]:
    """The contenders in turn, round after round. One that fails is left out of the rounds that follow."""
    runs: list[Run] = []
    for turn in range(setting.repeat):
        failed = {run.contender for run in runs if run.error}
        for contender in setting.contenders:
            if contender.name not in failed:
                runs.append(run_once(setting, case, models, contender, turn))
                say(_progress(runs[-1]))
    return runs


def run_once(setting: Setting, case: Case, models: Path, contender: Contender, turn: int) -> Run:
    with tempfile.TemporaryDirectory(dir=setting.work, prefix="run-") as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        finetuned = tuple(models / f"ft{i + 1}" for i in range(case.finetunes))
        job = Job(models / "base", finetuned, Path(folder) / "out", scratch)
        if contender.needs_out:
            job.out.mkdir()
        command = contender.command(job)
        warm(job.inputs)
        load = os.getloadavg()[0]
        usage = measure(command, scratch, setting.timeout)
        output, base = _size(weights(job.out)), _size(weights(job.base))
        missing = f"the output has {output / GB:.3f} GB of weights, the base {base / GB:.3f}"
        error = usage.error or (missing if output < 0.99 * base else None)
        return Run(
            contender=contender.name,
            billions=case.billions,
            finetunes=case.finetunes,
            round=turn,
            command=_shown(command, setting.work),
            inputs=_size(job.inputs),
            output=output,
            load=load,
            **{**asdict(usage), "error": error},
        )


def warm(files: Iterable[Path]) -> None:
    """Read every byte once, so that the page cache has it."""
    buffer = memoryview(bytearray(1 << 22))
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _shown(command: Sequence[str], work: Path) -> str:
    """A command as a person would type it, with folders of this machine left out."""
    words = [Path(word).name if i == 0 or word == sys.executable else word for i, word in enumerate(command)]
    return re.sub(rf"{re.escape(str(work))}/(models|run-\w+)/", "", shlex.join(words))


def _check_disk(work: Path, billions: float, finetunes: int) -> None:
    """Raises BenchmarkError unless the inputs and two outputs fit."""
    needed, free = (finetunes + 3) * 2.1 * billions * 1e9, shutil.disk_usage(work).free
    if free < needed:
        raise BenchmarkError(
            f"{work} has {free / GB:.1f} GB free; {billions} billion parameters and {finetunes} finetunes need "
            f"{needed / GB:.1f}. Name another --work, or smaller --sizes."
        )


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Removes the folder afterwards."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress(run: Run) -> str:
    where = f"{run.billions} B, {run.finetunes} finetunes, round {run.round + 1}: {run.contender:28}"
    if run.error:
        return f"{where} FAILED after {run.wall:.1f} s: {run.error}"
    took = f"{run.wall:7.2f} s, {run.cpu:7.2f} s CPU, {run.peak_anonymous / 1e6:6.0f} MB anonymous"
    return f"{where} {took}, {run.disk_read / 1e6:4.0f} MB from disk, load {run.load:.1f}"


# --- the report -------------------------------------------------------------------------------------------------------


class Results:
    """Runs, looked up by contender and case. Medians are over the rounds."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.contenders = list(dict.fromkeys(run.contender for run in runs))
        self.cases = list(dict.fromkeys(run.case for run in runs))

    def good(self, contender: str, case: Case) -> list[Run]:
        return [run for run in self.runs if (run.contender, run.case, run.error) == (contender, case, None)]

    def failure(self, contender: str, case: Case) -> str | None:
        errors = (run.error for run in self.runs if (run.contender, run.case) == (contender, case))
        return next((error for error in errors if error), None)

    def cell(self, contender: str, case: Case, value: Callable[[Run], float], form: str) -> str:
        """median (min-max) of a value."""
        runs = self.good(contender, case)
        return _spread([value(run) for run in runs], form) if runs else self._no_value(contender, case)

    def ratio(self, of: str, to: str, case: Case, value: Callable[[Run], float]) -> str:
        """value(of) / value(to), taken in every round: median (min-max)."""
        below = {run.round: value(run) for run in self.good(to, case)}
        ratios = [value(run) / below[run.round] for run in self.good(of, case) if below.get(run.round)]
        return _spread(ratios, "{:.2f}") if ratios else "-"

    def _no_value(self, contender: str, case: Case) -> str:
        return "failed" if self.failure(contender, case) else "-"


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))}–{form.format(max(values))})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def case_table(results: Results, case: Case) -> str:
    """All that was measured for one case."""
    head = [
        "",
        "wall s",
        "wall ÷ floor",
        f"{RIVAL} ÷ wall",
        "CPU s",
        f"CPU ÷ {HASHED}",
        f"CPU of {RIVAL} ÷ CPU",
        "peak anonymous MB",
        "peak RSS MB",
        "read() GB",
        "write() GB",
        "from disk MB",
    ]
    rows = [
        [
            name,
            results.cell(name, case, lambda run: run.wall, "{:.2f}"),
            results.ratio(name, FLOOR, case, lambda run: run.wall),
            results.ratio(RIVAL, name, case, lambda run: run.wall),
            results.cell(name, case, lambda run: run.cpu, "{:.2f}"),
            results.ratio(name, HASHED, case, lambda run: run.cpu),
            results.ratio(RIVAL, name, case, lambda run: run.cpu),
            results.cell(name, case, lambda run: run.peak_anonymous / 1e6, "{:.0f}"),
            results.cell(name, case, lambda run: run.peak_rss / 1e6, "{:.0f}"),
            results.cell(name, case, lambda run: run.read / GB, "{:.2f}"),
            results.cell(name, case, lambda run: run.written / GB, "{:.2f}"),
            results.cell(name, case, lambda run: run.disk_read / 1e6, "{:.1f}"),
        ]
        for name in results.contenders
    ]
    return table(head, rows)


def growth_table(results: Results, cases: Sequence[Case], label: Callable[[Case], str]) -> str:
    """Wall time and peak anonymous memory, one column a case."""
    head = ["", *(f"{label(case)}: {what}" for what in ("s", "MB") for case in cases)]
    rows = [
        [
            name,
            *(results.cell(name, case, lambda run: run.wall, "{:.2f}") for case in cases),
            *(results.cell(name, case, lambda run: run.peak_anonymous / 1e6, "{:.0f}") for case in cases),
        ]
        for name in results.contenders
    ]
    return table(head, rows)


def report(results: Results, finetunes: int, facts: dict[str, str]) -> str:
    """The whole report in Markdown."""
    sizes = [case for case in results.cases if case.finetunes == finetunes]
    counts = sorted((case for case in results.cases if case.billions == sizes[0].billions), key=lambda c: c.finetunes)
    parts = [
        "# Speed and memory of a merge",
        table(["", ""], list({**facts, **conditions(results.runs)}.items())),
        NOTES,
    ]
    parts += [
        f"## {case.billions} billion parameters, {finetunes} finetunes\n\n{case_table(results, case)}" for case in sizes
    ]
    if len(sizes) > 1:
        grown = growth_table(results, sizes, lambda case: f"{case.billions} B")
        parts.append(f"## Growth with the size, {finetunes} finetunes\n\n{grown}")
    if len(counts) > 1:
        grown = growth_table(results, counts, lambda case: f"{case.finetunes} ft")
        parts.append(f"## Growth with the number of finetunes, {sizes[0].billions} billion parameters\n\n{grown}")
    failures = [
        f"- {run.contender}, {run.billions} B, {run.finetunes} finetunes: {run.error}"
        for run in results.runs
        if run.error
    ]
    if failures:
        parts.append("## Failures\n\n" + "\n".join(failures))
    commands = "\n".join(first_commands(results))
    parts.append(f"## Commands\n\n```\n{commands}\n```")
    return "\n\n".join(parts) + "\n"


def first_commands(results: Results) -> list[str]:
    """One command a contender. A program given as text is left out of it."""
    commands = {run.contender: run.command for run in reversed(results.runs)}
    return [f"{name}: {commands[name]}" for name in results.contenders if "\n" not in commands[name]]


NOTES = f"""\
Medians over the rounds, and (min–max). Ratios are taken inside a round. *wall ÷ floor*: 1 is the least. Memory is that
of the process and its children, looked at every {INTERVAL * 1000:.0f} ms; *anonymous* is what the program allocates,
RSS also counts pages of mapped files, which the system can take back. *read()* and *write()* count system calls: input
files that are mapped do not show. *from disk* is what the page cache did not have, the program's own files included.

What is trimmed is trimmed to a density of {DENSITY}. {OURS} alone is Localize-and-Stitch, which localizes the
transformer blocks over the whole model and also writes masks; all others take all tensors, and the peers trim each by
itself. mergekit's weights are 1, its output bfloat16, all else its defaults. {OURS} waits until its output is on
the disk (fsync), as does *floor, synced*; the others leave that to the system. It also takes the SHA-256 of every
input and of its output, as does *{HASHED}*: of all the bytes that are read or written, once."""


def facts_of(args: argparse.Namespace, environment: Path | None) -> dict[str, str]:
    """On what, with what, and how the numbers are made."""
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/speed.py", *_public_arguments(args)]),
        "cores": f"{len(os.sched_getaffinity(0))} ({_processor()})",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GB:.1f} GB",
        "Python": platform.python_version(),
        OURS: _listed({"commit": _commit(), **versions(sys.executable, (OURS, "torch", "safetensors", "numpy"))}),
    }
    return facts | ({"peers": _listed(versions(str(environment / "bin" / "python")))} if environment else {})


def conditions(runs: Sequence[Run]) -> dict[str, str]:
    """How quiet the machine was."""
    cold = sum(run.cold for run in runs)
    limit = f"from disk at most {COLD:.0%} of the inputs + {PROGRAM / 1e6:.0f} MB"
    return {
        "load average at the start of a run": _spread([run.load for run in runs], "{:.1f}"),
        "page cache": f"warm in {len(runs) - cold} of {len(runs)} runs ({limit})",
    }


def _public_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments without folders of this machine."""
    lists = ["--sizes", *args.sizes, "--finetunes", args.finetunes, "--counts", *args.counts, "--repeat", args.repeat]
    numbers = ["--timeout", f"{args.timeout:g}", "--shard-gb", f"{args.shard_gb:g}"]
    who = ["--no-peers"] if args.no_peers else []
    return [str(word) for word in [*lists, *numbers, *who, *(["--only", *args.only] if args.only else [])]]


def _listed(named: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def _processor() -> str:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of this tree, and whether it has changes."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a merge, beside the peers and beside the least.")
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=[0.1, 0.4, 1.6],
        metavar="B",
        help="billions of parameters (default: 0.1 0.4 1.6)",
    )
    parser.add_argument("--finetunes", type=int, default=3, metavar="N", help="for all sizes (default: 3)")
    parser.add_argument(
        "--counts",
        type=int,
        nargs="*",
        default=[2, 4, 8],
        metavar="N",
        help="of finetunes, at the first size (default: 2 4 8)",
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="for one process, seconds (default: 600)"
    )
    parser.add_argument("--shard-gb", type=float, default=2.0, metavar="GB", help="largest input file (default: 2)")
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--peers", type=Path, metavar="DIR", help="virtual environment of the peers; made if it is missing"
    )
    who.add_argument("--no-peers", action="store_true", help="only this project and the floor")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders, named as in the report")
    parser.add_argument("--work", type=Path, metavar="DIR", help="write models here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the report, which is printed too")
    args = parser.parse_args()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="speed-") as work:
        try:
            benchmark(args, Path(work).resolve())
        except BenchmarkError as error:
            sys.exit(f"speed.py: {error}")


def benchmark(args: argparse.Namespace, work: Path) -> None:
    if not Path("/proc/self/io").exists():
        raise BenchmarkError("memory and bytes are read from /proc, which this system has not. Run it on Linux.")
    environment = None if args.no_peers else (args.peers or work / "peers").absolute()
    if environment and not (environment / "bin" / "mergekit-yaml").exists():
        say(f"installing the peers into {environment}")
        install_peers(environment)
    everyone = [*floors(), *ours(), *(peers(environment) if environment else [])]
    contenders = [one for one in everyone if not args.only or one.name in args.only]
    if unknown := sorted(set(args.only or ()) - {one.name for one in everyone}):
        raise BenchmarkError(f"no contender is called {unknown}. There are {[one.name for one in everyone]}.")
    os.environ["NUMBA_CACHE_DIR"] = str(work / "loops")  # of all runs; where they are compiled is a contender's own
    for contender in contenders:  # imports from the disk are not what is measured
        subprocess.run(contender.warm_up, stdout=subprocess.DEVNULL, check=True, cwd=work)
    setting = Setting(contenders, args.repeat, args.timeout, args.shard_gb * GB, work)
    facts = facts_of(args, environment)
    runs: list[Run] = []
    for number, billions in enumerate(args.sizes):
        counts = [args.finetunes, *(count for count in args.counts if count != args.finetunes and number == 0)]
        for case in run_size(setting, billions, counts):
            runs += case
            save(args, runs, facts)  # what follows may take hours
    print(report(Results(runs), args.finetunes, facts))


def save(args: argparse.Namespace, runs: Sequence[Run], facts: dict[str, str]) -> None:
    """Write the files that were asked for, with all runs so far."""
    if args.markdown:
        args.markdown.write_text(report(Results(runs), args.finetunes, facts), encoding="utf-8")
    if args.json:
        content = {"facts": facts, "runs": [asdict(run) for run in runs]}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
