"""Who takes part in speed.py: this project, the floor, and the peers from the package index in an environment of
their own.

The peers' methods are those nearest to Localize-and-Stitch, not the same: mergekit and sd-mecha trim each tensor for
itself, all tensors included; this project takes the top k over the whole model.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("mergekit", "sd-mecha")
VERSIONS_OF = ("mergekit", "sd-mecha", "torch", "transformers", "safetensors", "numpy")
DENSITY = 0.05
FLOOR = "floor"
HASHED = f"{FLOOR}, hashed"
OURS = "hf-locstitch"
RIVAL = "mergekit ties"  # what everything is compared with

READY = """
import hf_locstitch.engine.model_run
from hf_locstitch.engine.rehearsal import rehearse
from hf_locstitch.runtime.bus_error import explain_bus_errors
explain_bus_errors()
rehearse(("BF16", "BF16", "BF16"))
"""

# sd-mecha 1.1.8's own add_difference_ties fails on these models, so its parts are put together here.
SD_MECHA_TIES = """
import sys, torch, sd_mecha
from sd_mecha.extensions.builtin.merge_methods import linear
out, base, *finetuned = sys.argv[1:]
base = sd_mecha.model(base)
deltas = [sd_mecha.subtract(sd_mecha.model(path), base) for path in finetuned]
merged = linear.add_difference(base, sd_mecha.ties_sum(*deltas, k={density}), alpha=1.0)
sd_mecha.merge(merged, output=out, output_dtype=torch.bfloat16)
"""


@dataclass(frozen=True)
class Job:
    """One merge. out: a folder to write into, empty or missing. scratch: an empty folder, for a recipe."""

    base: Path
    finetuned: tuple[Path, ...]
    out: Path
    scratch: Path

    @property
    def inputs(self) -> list[Path]:
        """The weights of all models, in order."""
        return [file for model in (self.base, *self.finetuned) for file in weights(model)]


@dataclass(frozen=True)
class Contender:
    """command: what merges a job. warm_up: what loads the same program and does nothing. needs_out: wants job.out made
    before it starts."""

    name: str
    command: Callable[[Job], list[str]]
    warm_up: tuple[str, ...]
    needs_out: bool = False


def weights(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def ours() -> list[Contender]:
    """This project's methods, without figures, as peers draw none; and Localize-and-Stitch with them, and where its
    loops are not compiled yet."""
    program = (sys.executable, "-m", "hf_locstitch", "merge")
    trimmed = ("--density", f"{DENSITY}")
    wanted = {"locstitch": trimmed, "ties": trimmed, "task-arithmetic": (), "average": ()}
    plain = {method: ("--method", method, *flags, "--no-figures") for method, flags in wanted.items()}
    return [
        *(_ours(_name(method), program, flags) for method, flags in plain.items()),
        _ours(f"{OURS}, figures", program, trimmed),
        _ours(f"{OURS}, first run", program, plain["locstitch"], compiled=False),
    ]


def _name(method: str) -> str:
    return OURS if method == "locstitch" else f"{OURS} {method}"


def _ours(name: str, program: Sequence[str], flags: Sequence[str], *, compiled: bool = True) -> Contender:
    def command(job: Job) -> list[str]:
        empty = [] if compiled else ["env", f"NUMBA_CACHE_DIR={job.scratch / 'loops'}"]
        models = ["--base", str(job.base), "--ft", *map(str, job.finetuned)]
        return [*empty, *program, *models, *flags, "--out", str(job.out), "--quiet"]

    return Contender(name, command, (sys.executable, "-c", READY))


def floors() -> list[Contender]:
    """The least that a merge can do, in plain Python: the output left to the page cache, or on the disk, or with the
    hash of every file that is read or written."""
    return [_floor(FLOOR), _floor(f"{FLOOR}, synced", sync=True), _floor(HASHED, hashed=True)]


def _floor(name: str, *, sync: bool = False, hashed: bool = False) -> Contender:
    source = inspect.getsource(copy_through)

    def command(job: Job) -> list[str]:
        ones = len(weights(job.base))
        out = str(job.out / "model.safetensors")
        call = f"copy_through({[str(file) for file in job.inputs]!r}, {ones}, {out!r}, {sync}, {hashed})"
        return [sys.executable, "-I", "-S", "-c", f"{source}\n{call}"]

    return Contender(name, command, (sys.executable, "-I", "-S", "-c", "pass"), needs_out=True)


def copy_through(sources: list[str], copied: int, out: str, sync: bool, hashed: bool) -> None:
    """Read all files once; write the first `copied` of them to `out`. sync: wait until the disk has it. hashed: take
    the SHA-256 of all that is read, and of all that is written.

    Its text runs by itself, in a process that imports nothing else.
    """
    import hashlib
    import os

    buffer = memoryview(bytearray(1 << 22))
    written = hashlib.sha256()
    with open(out, "wb", buffering=0) as target:
        for number, source in enumerate(sources):
            read = hashlib.sha256()
            with open(source, "rb", buffering=0) as handle:
                while count := handle.readinto(buffer):
                    if hashed:
                        read.update(buffer[:count])
                    if number < copied:
                        target.write(buffer[:count])
                        if hashed:
                            written.update(buffer[:count])
        if sync:
            os.fsync(target.fileno())


def peers(environment: Path) -> list[Contender]:
    """mergekit's and sd-mecha's methods, as installed in a virtual environment."""
    trimmed = {"density": DENSITY, "weight": 1.0}
    return [
        _mergekit(environment, RIVAL, "ties", trimmed),
        _mergekit(environment, f"{RIVAL} -j 1", "ties", trimmed, "-j", "1"),  # torch's threads may hinder each other
        _mergekit(environment, "mergekit task_arithmetic", "task_arithmetic", {"weight": 1.0}),
        _mergekit(environment, "mergekit linear", "linear", {"weight": 1.0}),
        _sd_mecha(environment),
    ]


def _mergekit(environment: Path, name: str, method: str, parameters: dict[str, float], *flags: str) -> Contender:
    program = str(environment / "bin" / "mergekit-yaml")

    def command(job: Job) -> list[str]:
        recipe = {
            "merge_method": method,
            "models": [{"model": str(model), "parameters": parameters} for model in job.finetuned],
            "dtype": "bfloat16",
            **({} if method == "linear" else {"base_model": str(job.base)}),
        }
        path = job.scratch / "mergekit.yaml"
        path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML
        return [program, str(path), str(job.out), "--quiet", *flags]

    return Contender(name, command, (program, "--help"))


def _sd_mecha(environment: Path) -> Contender:
    python = str(environment / "bin" / "python")

    def command(job: Job) -> list[str]:
        # It takes one file a model: of sharded models it gets the first name only, and says that it does not exist.
        models = [str(model / "model.safetensors") for model in (job.base, *job.finetuned)]
        return [python, "-c", SD_MECHA_TIES.format(density=DENSITY), str(job.out / "model.safetensors"), *models]

    return Contender("sd-mecha ties", command, (python, "-c", "import sd_mecha"), needs_out=True)


def install_peers(folder: Path) -> None:
    """Make a virtual environment in `folder` with the peers and the torch that this project uses (the same build).

    Where that build is not on the default index, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS says where it is.
    """
    torch = f"torch=={version('torch')}"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{torch}\n", encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(constraints), torch, *PACKAGES], check=True, stdout=sys.stderr)


def versions(python: str, packages: Iterable[str] = VERSIONS_OF) -> dict[str, str]:
    """Versions of installed packages, for the interpreter `python`; those that are missing are left out."""
    code = (
        "import json, sys\nfrom importlib.metadata import distributions\n"
        "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version for d in distributions()}))"
    )
    output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    found = json.loads(output)
    return {name: found[name] for name in packages if name in found}
