"""The page: every claim with its verdict, written from what was measured and from nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from hf_locstitch.report.figures.draw import save
from reproduction import claims_masks, claims_merges
from reproduction.claim import Claim, table
from reproduction.results import Results
from reproduction.rows import Grid

ASSETS = Path("assets", "reproduction")  # beside the page
NUMBERS = "results.json"
DIGITS = 5  # kept of a number
LINE = 120
ORDER = (
    claims_merges.dataless,
    claims_merges.with_data,
    claims_merges.scopes,
    claims_masks.overlap,
    claims_masks.location,
    claims_merges.memory,
    claims_masks.skills,
    claims_masks.storage,
    claims_merges.counts,
    claims_masks.grafts,
)
DESCRIBED = {
    "MiniLM": "a pretrained encoder on short texts",
    "decoders": "tiny Llamas on exercises with words",
    "vision": "small vision transformers on handwritten digits",
}
INTRODUCTION = """# The paper's claims, reproduced

`make reproduce` measures what He, Hu, Lin, Zhang and Zhao claim of Localize-and-Stitch
([arXiv 2408.13656](https://arxiv.org/abs/2408.13656)), on models small enough for two cores, and writes this page: its
tables, figures, verdicts and sentences are made from [the numbers](assets/reproduction/results.json) by
`benchmarks/reproduce.py`. The claims are in our words; two of them ("asked here") are questions that the algorithm
raises.

**Testbeds** ([more on them](quality.md#the-testbeds)): {testbeds}.{missing} Every seed has finetunes and, unless
it is pretrained, a base of its own. All merges are made by the package's public functions. All of it took {minutes}
minutes of one core. Another machine trains other finetunes, which have other numbers.

**Numbers.** A model's accuracy at a task is divided by that of the task's own finetune; a row's number is the mean over
the tasks on test examples. Scales and densities that are "tuned" are chosen by the same number on validation examples:
task arithmetic's scale of {scales}; TIES's density of {tuned} and scale of {ties}; our density of {tuned}. Everything
else is chosen beforehand and the same everywhere.

**Verdicts** follow one rule. A comparison is a difference that is positive if the claim holds, taken seed by seed. It
holds on a testbed ("yes") if the 95 % confidence interval of its mean over the seeds (Student's t) is above
zero; the opposite holds ("no") if it is below; else it cannot be told from chance ("open"). A claim is confirmed
if all its comparisons hold on all testbeds, not confirmed if none does anywhere, and partly confirmed otherwise. With
so few seeds only differences that are large beside their spread count; among so many comparisons a few come out by
chance; and what holds here need not hold for large
models."""


def claims(results: Results, grid: Grid) -> list[Claim]:
    """In the page's order."""
    return [claim(results, grid) for claim in ORDER]


def markdown(results: Results, grid: Grid, found: Sequence[Claim]) -> str:
    """The whole page."""
    lines = []
    for number, claim in enumerate(found, start=1):
        title = f"[{number}. {claim.title}](#{claim.anchor(number)})"
        lines.append([title, claim.verdict, *(claim.tallied(testbed) for testbed in results.testbeds)])
    overview = table(["claim", "verdict", *results.testbeds], lines)
    explained = "Of each claim's comparisons on a testbed, how many hold, are open, and go the other way:"
    parts = [*introduction(results, grid).split("\n\n"), explained, overview]
    parts += [part for number, claim in enumerate(found, start=1) for part in claim.parts(number, ASSETS.as_posix())]
    return "\n\n".join(map(wrapped, parts)) + "\n"


def wrapped(part: str) -> str:
    """Prose in lines of the documentation's length; tables, figures and headings as they are."""
    if part.startswith(("|", "!", "#")):
        return part
    return fill(part, LINE, break_long_words=False, break_on_hyphens=False)


def introduction(results: Results, grid: Grid) -> str:
    described = []
    for testbed, seeds in results.testbeds.items():
        content = seeds[0].content
        more = len(content["tasks"]) - content["main"]
        of_more = f" (and {more} more for the number of tasks)" if more else ""
        numbers = ", ".join(str(seed.number) for seed in seeds)
        what = DESCRIBED[testbed]
        described.append(f"**{testbed}**, {what}, {content['main']} tasks{of_more}, seeds {numbers}")
    missing = [f"{name}, {what}" for name, what in DESCRIBED.items() if name not in results.testbeds]
    return INTRODUCTION.format(
        testbeds="; ".join(described),
        missing=f" This run left out: {', '.join(missing)}." if missing else "",
        scales=", ".join(f"{scale:g}" for scale in grid.scales),
        tuned=", ".join(f"{100 * density:g}" for density in grid.tuned) + " %",
        minutes=f"{sum(seed.content['cpu_seconds'] for own in results.testbeds.values() for seed in own) / 60:.0f}",
        ties=" or ".join(f"{scale:g}" for scale in grid.ties_scales),
    )


def write_page(contents: Sequence[Mapping[str, Any]], page: Path, grid: Grid) -> None:
    """Write the page, and beside it its figures and numbers. contents: of every seed of every testbed."""
    kept = rounded(contents)
    results = Results.of(kept)
    found = claims(results, grid)
    assets = page.parent / ASSETS
    assets.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as drawn:
        for claim in found:
            for at, figure in enumerate(claim.figures.values()):
                _, svg = save(figure, Path(drawn, f"{claim.name}{at or ''}"))
                (assets / svg.name).write_bytes(svg.read_bytes())
    (assets / NUMBERS).write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
    page.write_text(markdown(results, grid, found), encoding="utf-8")


def rounded(plain: Any) -> Any:
    """Plain data with DIGITS digits of each number, so that the page can be made from the file alone."""
    if isinstance(plain, float):
        return float(f"{plain:.{DIGITS}g}")
    if isinstance(plain, Mapping):
        return {key: rounded(value) for key, value in plain.items()}
    return [rounded(value) for value in plain] if isinstance(plain, list | tuple) else plain
