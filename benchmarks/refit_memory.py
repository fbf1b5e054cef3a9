"""Memory and time of a refit, beside what the plan says of them.

    python benchmarks/refit_memory.py [--billions 0.1] [--finetunes 3] [--inputs 32] [--tokens 64] [--lambdas 1]
        [--states-on device disk] [--work DIR] [--json FILE]
    python benchmarks/refit_memory.py --inputs 0 ...     without data, in a joint mask

Made-up Llamas (synthetic.py) and texts of their words; one process by itself for each place of the hidden states.
Memory is what the process has allocated (mapped files do not count, the system can take those back), and on a GPU the
most that torch has allocated there. The weights mean nothing, so neither do the values; all the work is real.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from speed import measure, table
from synthetic import shape_of, write_models

DENSITY = 0.1
# The command, and at its end what torch has had on the GPU at most.
COMMAND = """
import sys, torch
from hf_locstitch.cli.main import main
status = main(sys.argv[1:])
print("on the GPU", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0, file=sys.stderr)
sys.exit(status)
"""


@dataclass(frozen=True)
class Setting:
    """What is asked for. batch: inputs that pass together."""

    billions: float
    finetunes: int
    inputs: int
    tokens: int
    batch: int
    lambdas: tuple[float, ...]
    held_out: float


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds. planned: memory, by the dry run, on the device that it will be. gpu: 0 without one."""

    states_on: str
    planned: int
    peak: int
    gpu: int
    wall: float
    cpu: float


def write_inputs(folder: Path, setting: Setting, vocabulary: int) -> list[str]:
    """A file of texts for each finetune, each text as long as it may be."""
    files = []
    for number in range(1, setting.finetunes + 1):
        words = random.Random(number)
        texts = (
            " ".join(f"word{words.randrange(vocabulary)}" for _ in range(setting.tokens))
            for _ in range(setting.inputs)
        )  # fmt: skip
        file = folder / f"texts{number}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files.append(file.name)
    return files


def write_recipe(folder: Path, setting: Setting, files: Sequence[str], states_on: str) -> Path:
    """JSON is YAML."""
    stitch = {
        "method": "refit",
        "start": "mean",
        "inputs": setting.inputs,
        "tokens": setting.tokens,
        "batch": setting.batch,
        "lambdas": setting.lambdas,
        "held_out": setting.held_out,
        "states_on": states_on,
    }
    with_data = {
        "localizer": {"method": "magnitude", "density": DENSITY},
        "data": [f"./{file}" for file in files],
        "stitch": stitch,
    }
    fields = {
        "base": "./models/base",
        "finetuned": [f"./models/ft{number}" for number in range(1, setting.finetunes + 1)],
        **(with_data if setting.inputs else {"localizer": {"method": "joint"}, "stitch": "refit"}),
    }
    recipe = folder / f"{states_on}.yaml"
    recipe.write_text(json.dumps(fields))
    return recipe


def run(folder: Path, recipe: Path, states_on: str, timeout: float) -> Measured:
    """One refit. Raises RuntimeError with what it said if it failed."""
    asked = ["merge", recipe.name]
    dry = subprocess.run(
        [sys.executable, "-m", "hf_locstitch", *asked, "--dry-run", "--json"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    planned = json.loads(dry.stdout)["refitting"]["peak"]
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--out", "out", "--no-figures", "--quiet"]
    used = measure([sys.executable, "-c", COMMAND, *asked, *flags], folder, timeout)
    if used.error:
        raise RuntimeError(f"the refit with hidden states on {states_on} failed: {used.error}")
    shutil.rmtree(out)
    said = (folder / "stderr.txt").read_text().split()
    return Measured(states_on, planned, used.peak_anonymous, int(said[-1]), used.wall, used.cpu)


def report(setting: Setting, found: Sequence[Measured]) -> str:
    """A Markdown table."""
    if not setting.inputs:
        found = [replace(one, states_on="none: without data") for one in found]
    parameters = shape_of(setting.billions).parameters
    inputs = f"{setting.inputs} inputs each of {setting.tokens} tokens, {setting.batch} together"
    head = ["hidden states on", "planned MB", "memory MB", "GPU MB", "wall s", "CPU s"]
    rows = [
        [
            one.states_on, f"{one.planned / 1e6:.0f}", f"{one.peak / 1e6:.0f}",
            f"{one.gpu / 1e6:.0f}" if one.gpu else "", f"{one.wall:.0f}", f"{one.cpu:.0f}",
        ]
        for one in found
    ]  # fmt: skip
    title = f"{parameters / 1e9:.2f} B parameters, {setting.finetunes} finetunes, density {DENSITY:g}, {inputs}"
    return f"{title}, lambda of {', '.join(f'{value:g}' for value in setting.lambdas)}\n\n{table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of a refit, beside what the plan says of them.")
    parser.add_argument("--billions", type=float, default=0.1, help="of parameters, about (default: 0.1)")
    parser.add_argument("--finetunes", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=32, help="of each finetune (default: 32); 0: without data")
    parser.add_argument("--tokens", type=int, default=64, help="of each input (default: 64)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[1.0])
    parser.add_argument("--held-out", type=float, default=0.0, help="share of the inputs that judges several lambdas")
    parser.add_argument("--states-on", nargs="+", default=["device", "disk"], choices=["device", "cpu", "disk"])
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one refit")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here and reuse them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args()
    if args.inputs == 0:
        args.states_on = ["device"]
    setting = Setting(
        args.billions, args.finetunes, args.inputs, args.tokens, args.batch, tuple(args.lambdas), args.held_out
    )
    shape = shape_of(setting.billions)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refit-memory-")))
        if not (work / "models").exists():
            write_models(work / "models", shape, setting.finetunes, 2_000_000_000)
        files = write_inputs(work, setting, shape.vocabulary)
        recipes = {states_on: write_recipe(work, setting, files, states_on) for states_on in args.states_on}
        found = [run(work, recipe, states_on, args.timeout) for states_on, recipe in recipes.items()]
    print(report(setting, found))
    if args.json:
        content = {"setting": asdict(setting), "runs": [asdict(one) for one in found]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
