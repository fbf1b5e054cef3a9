"""`make demo`: train tiny models, push them to a Hub on this machine, merge them there, compare, publish.

Nothing leaves the machine. Everything that talks to the Hub runs in its own process, because the client reads its
settings only once, at import; the commands are those that a user would type. With names of repositories,
`python -m demo.main demo/base demo/...` evaluates them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from demo.benchmark import add_benchmark
from demo.skills import SKILLS, accuracy
from hf_locstitch.errors import OutputError, WorkError
from loopback_hub import LoopbackHub

# Stands for `hf` and `hf-locstitch` on the path: the same interpreter, whatever the PATH is.
PROGRAMS = {"hf": "huggingface_hub.cli.hf", "hf-locstitch": "hf_locstitch"}
DENSITIES = (0.01, 0.05, 0.1, 0.2)

Scores = Mapping[str, Mapping[str, float]]  # repo -> skill -> accuracy


def run_demo(work: Path | None = None, *, seed: int = 0, densities: Sequence[float] = DENSITIES) -> None:
    """Run the whole workflow and print a table of accuracies; a few minutes on two cores.

    work: a new or empty folder that keeps everything; None: a temporary one. Raises OutputError, WorkError.
    """
    with _folder(work) as folder, LoopbackHub(folder / "hub") as hub:
        run = command_runner({**_bare_environment(), **hub.environment(folder / "home")}, folder)
        say = _clock()

        from transformers.utils.logging import disable_progress_bar  # slow to import

        from demo.train import train_models

        disable_progress_bar()

        say("Training a base and three finetunes of it")
        models = train_models(folder / "models", seed=seed, progress=lambda line: print("  " + line, flush=True))

        say(f"Pushing them to a Hub on this machine, {hub.endpoint}")
        for name, path in models.items():
            run(["hf", "upload", f"demo/{name}", str(path)])

        say("Merging from that Hub to that Hub")
        merge = ["hf-locstitch", "merge", "--base", "demo/base", "--ft", *(f"demo/{skill}" for skill in SKILLS)]
        merges = {f"density {density:g}": f"merged-{density:g}" for density in densities}
        run([*merge, "--method", "average", "--push-to", "demo/average"])
        page = f"merged-{densities[len(densities) // 2 - 1]:g}"  # the merge that gets figures and scores
        for density, name in zip(densities, merges.values(), strict=True):
            kept = ["--out", str(folder / name)] if work else []
            kept += [] if name == page else ["--no-figures"]
            run([*merge, "--density", f"{density:g}", *kept, "--push-to", f"demo/{name}"])
        merges["solved"] = "merged-joint"
        kept = ["--out", str(folder / "merged-joint")] if work else []
        joint = ["--localizer", "joint", "--stitch", "refit", "--no-figures"]
        run([*merge, *joint, *kept, "--push-to", "demo/merged-joint"])

        say("Loading every model from the Hub and testing it on held-out exercises")
        columns = {"base": "demo/base", "average": "demo/average"}
        columns |= {title: f"demo/{name}" for title, name in merges.items()}
        scores = _evaluate(run, [*columns.values(), *(f"demo/{skill}" for skill in SKILLS)])
        say("Share of exercises answered correctly\n")
        print(_table(scores, columns))
        print("\n  solved: one joint mask of 30 %, its values solved for from the task vectors alone")

        say("Scoring one of them and its parents with lm-eval, and writing the scores into its model card")
        add_benchmark(hub, folder / "tasks")
        asked = ["--tasks", *SKILLS, "--include-path", str(folder / "tasks"), "--batch-size", "100"]
        asked += ["--parents", "--average", "--push"]
        print("\n" + run(["hf-locstitch", "evaluate", f"demo/{page}", *asked]))
        print(_page(hub, page, folder / "page" if work else None))
        print(_farewell(folder if work else None, list(merges.values())))


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is None:
        with tempfile.TemporaryDirectory(prefix="hf-locstitch-demo-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    if work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise OutputError(f"{work} is not an empty folder. Name a new one with --work.")
    work.mkdir(parents=True, exist_ok=True)
    yield work.absolute()


def _bare_environment() -> dict[str, str]:
    """This process's environment without variables that point to another Hub, token or cache."""
    prefixes = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
    return {key: value for key, value in os.environ.items() if not key.upper().startswith(prefixes)}


def command_runner(environment: Mapping[str, str], folder: Path) -> Callable[[Sequence[str]], str]:
    """A function that prints a command, runs it in the folder and returns its output.

    Where the user is there may be a folder `demo`, such as that of `make demo WORK=demo`: `demo/base` would be in it.
    """
    modules = os.pathsep.join(os.path.abspath(path) for path in sys.path)

    def run(command: Sequence[str]) -> str:
        program, *arguments = command
        if program in PROGRAMS:
            print("  $ " + " ".join(command), flush=True)
        done = subprocess.run(
            [sys.executable, "-m", PROGRAMS.get(program, program), *arguments],
            cwd=folder,
            env={
                **environment,
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "PYTHONPATH": modules,
                "TOKENIZERS_PARALLELISM": "false",
            },
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last_lines = "\n".join(done.stderr.splitlines()[-5:])
            raise WorkError(f"`{' '.join(command)}` failed with exit status {done.returncode}:\n{last_lines}")
        return done.stdout

    return run


def _clock() -> Callable[[str], None]:
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"\n[{time.monotonic() - start:3.0f} s] {line}", flush=True)

    return say


def _evaluate(run: Callable[[Sequence[str]], str], repos: Sequence[str]) -> Scores:
    return json.loads(run([__name__, *repos]).splitlines()[-1])


def _table(scores: Scores, columns: Mapping[str, str]) -> str:
    """A row for each skill and one for the mean. columns: title -> repo; the finetunes share one more column."""
    values = {title: [scores[repo][skill] for skill in SKILLS] for title, repo in columns.items()}
    own = [scores[f"demo/{skill}"][skill] for skill in SKILLS]
    values = {"base": values.pop("base"), "own finetune": own, **values}
    rows = [["", *values]]
    for number, skill in enumerate(SKILLS):
        rows.append([skill, *(f"{100 * column[number]:.0f} %" for column in values.values())])
    rows.append(["mean", *(f"{100 * sum(column) / len(column):.0f} %" for column in values.values())])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in rows)


def _page(hub: LoopbackHub, name: str, kept: Path | None) -> str:
    """The files of the model's page; copied into the folder `kept` if given."""
    repo = f"demo/{name}"
    pictures = [file for file in hub.files(repo) if file.startswith("figures/") and file.endswith(".png")]
    for file in ["README.md", *pictures] if kept else []:
        (kept / file).parent.mkdir(parents=True, exist_ok=True)  # type: ignore[operator]
        (kept / file).write_bytes(hub.read(repo, file))  # type: ignore[operator]
    where = str(kept) if kept else f"{repo} on that Hub"
    return "\n".join(
        [f"  The model card, README.md, and its figures are in {where}:", *(f"  {file}" for file in pictures)]
    )


def _farewell(kept: Path | None, merged: Sequence[str]) -> str:
    where = "Everything was in a temporary folder; `make demo WORK=DIR` keeps it."
    if kept:
        where = "\n".join(
            ["The merged models (README.md is the model card):", *(f"  {kept / name}" for name in merged)]
        )
    return f"""
{where}

Next, merge your own models, or these from the Hugging Face Hub:
  hf-locstitch merge --base meta-llama/Llama-3.2-3B \\
    --ft MergeBench/Llama-3.2-3B_math MergeBench/Llama-3.2-3B_coding --density 0.1 --out merged"""


def _scores(repos: Sequence[str]) -> Scores:
    """Accuracy of models on the Hub at every skill."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_locstitch.runtime.chunks import one_torch_thread

    scores: dict[str, dict[str, float]] = {}
    with one_torch_thread():
        for repo in repos:
            model = AutoModelForCausalLM.from_pretrained(repo)
            tokenizer = AutoTokenizer.from_pretrained(repo)
            scores[repo] = {skill: accuracy(model, tokenizer, skill) for skill in SKILLS}
    return scores


if __name__ == "__main__":
    print(json.dumps(_scores(sys.argv[1:])))
