"""Claims about what merges are good for."""

from __future__ import annotations

from collections.abc import Sequence

from reproduction.claim import Claim, above
from reproduction.figures import draw_curves, draw_dots
from reproduction.results import Results, SeedResult
from reproduction.rows import COUNTED, REMEMBERED, RIVALS, WITH_DATA, Grid
from reproduction.verdict import Comparison

OURS, PAPERS = "magnitude, tuned", "magnitude 5%"
DENSITY = "density, %"
KEPT = "share of the finetunes' accuracy"


def percent(densities: Sequence[float], row: str) -> dict[float, str]:
    """Density in per cent -> row. row: with `{}` for it."""
    return {100 * density: row.format(f"{100 * density:g}%") for density in densities}


def dataless(results: Results, grid: Grid) -> Claim:
    """Claim 1."""
    locstitch, ties = percent(grid.densities, "magnitude {}"), percent(grid.tuned, "TIES {}")
    rows = ["base", *RIVALS[:2], *ties.values(), RIVALS[-1], *locstitch.values(), OURS]
    curves = {
        testbed: {
            name: {x: [seed.mean(row) for seed in seeds] for x, row in own.items()}
            for name, own in (("Localize-and-Stitch, no data", locstitch), ("TIES, scale 1", ties))
        }
        for testbed, seeds in results.testbeds.items()
    }
    levels = {
        testbed: {row: [seed.mean(row) for seed in seeds] for row in RIVALS}
        for testbed, seeds in results.testbeds.items()
    }
    return Claim(
        "dataless",
        "Without data, against other methods",
        "Localize-and-Stitch without data (the largest entries of each task vector, 5 % of them in the paper) merges "
        "better than simple averaging, task arithmetic and TIES.",
        f"Mean {KEPT}. Tuned: scale, density or both chosen on validation examples.",
        {row: results.each(lambda seed, row=row: seed.mean(row)) for row in rows},
        [
            above(results, f"{own} − {rival}", lambda seed, own=own: seed.mean(own), lambda seed, r=rival: seed.mean(r))
            for own in (PAPERS, OURS)
            for rival in (*RIVALS, ties[100 * max(grid.tuned)])
        ],
        {"Merges against density": draw_curves(curves, DENSITY, KEPT, levels)},
        notes=[f"Chosen on validation, seed by seed: {_chosen(results)}."],
    )


def _chosen(results: Results) -> str:
    """Of every tuned row, by testbed, what each seed took."""
    tuned = (OURS, "TIES, tuned", "task arithmetic, tuned")
    return "; ".join(
        f"{testbed}: {', '.join(' / '.join(seed.chosen(row) for seed in seeds) for row in tuned)}"
        for testbed, seeds in results.testbeds.items()
    )


def with_data(results: Results, grid: Grid) -> Claim:
    """Claim 2."""
    at = f"{100 * grid.sparse:g}%"
    dense = f"magnitude {at}"
    rows = [f"{name} {at}" for name in (*WITH_DATA, "magnitude")] + [PAPERS]
    kinds = {"merged": SeedResult.mean, "alone": SeedResult.alone}
    panels = {
        testbed: {row: {kind: [of(seed, row) for seed in seeds] for kind, of in kinds.items()} for row in rows}
        for testbed, seeds in results.testbeds.items()
    }
    learned = [f"{name} {at}" for name in WITH_DATA]
    return Claim(
        "with-data",
        "With data, at the same density",
        "Masks found with a few examples of each task merge better, at the same density, than those found without; in "
        "the paper at 1 % even better than the dataless ones at 5 %.",
        f"Mean {KEPT}, merged and of each mask alone.",
        {
            f"{row}, {kind}": results.each(lambda s, r=row, of=of: of(s, r))
            for kind, of in kinds.items()
            for row in rows
        },
        [
            above(
                results,
                f"{row} − {other}, {kind}",
                lambda s, r=row, of=of: of(s, r),
                lambda s, r=other, of=of: of(s, r),
            )
            for other, kind, of in (
                (dense, "merged", SeedResult.mean),
                (dense, "alone", SeedResult.alone),
                (PAPERS, "merged", SeedResult.mean),
            )
            for row in learned
        ],
        {"Masks found with data and without": draw_dots(panels, KEPT)},
    )


def scopes(results: Results, grid: Grid) -> Claim:
    """Claim 3."""
    scoped = {
        "over the whole model": percent(grid.by_tensor, "magnitude {}"),
        "in each tensor": percent(grid.by_tensor, "magnitude {}, scope tensor"),
    }
    curves = {
        testbed: {
            name: {x: [seed.mean(row) for seed in seeds] for x, row in own.items()} for name, own in scoped.items()
        }
        for testbed, seeds in results.testbeds.items()
    }
    whole, each = scoped.values()
    return Claim(
        "scope",
        "The largest entries of the whole model, or of each tensor",
        "The algorithm takes the top k over all localizable parameters together. Asked here: is that better than the "
        "same share of each tensor?",
        f"Mean {KEPT} of merges without data.",
        {row: results.each(lambda seed, row=row: seed.mean(row)) for own in scoped.values() for row in own.values()},
        [
            above(
                results, f"{whole[x]}: model − tensor", lambda s, x=x: s.mean(whole[x]), lambda s, x=x: s.mean(each[x])
            )
            for x in whole
        ],
        {"Scope of the top k": draw_curves(curves, DENSITY, KEPT)},
    )


def memory(results: Results, grid: Grid) -> Claim:
    """Claim 6."""
    learned = f"mask {100 * grid.sparse:g}%"
    rows = ["base", "experts", *REMEMBERED]
    panels = {
        testbed: {row: {"": [seed.ability(row) for seed in seeds]} for row in rows}
        for testbed, seeds in results.testbeds.items()
    }
    first = {testbed: seeds[0].content for testbed, seeds in results.testbeds.items()}
    said = "; ".join(f"{testbed}: {content['measured']['what']}" for testbed, content in first.items())
    short = {t: "loss" if content["measured"]["better"] < 0 else "accuracy" for t, content in first.items()}

    def left(seed: SeedResult, row: str) -> float:
        return seed.content["measured"]["better"] * seed.ability(row)

    return Claim(
        "memory",
        "What is left of the base",
        "A merge that changes few parameters keeps the pretrained model's own abilities better than one of all.",
        f"What nobody was finetuned on. {said}. Experts: the finetunes, their mean.",
        {row: results.each(lambda seed, row=row: seed.ability(row)) for row in rows},
        [
            above(results, f"{own} better than {rival}", lambda s, r=own: left(s, r), lambda s, r=rival: left(s, r))
            for own in ("magnitude 10%", learned)
            for rival in RIVALS
        ],
        {"What is left of the base": draw_dots(panels, short)},
        digits=4,
    )


def counts(results: Results, grid: Grid) -> Claim:
    """Claim 9."""
    del grid
    numbers = {testbed: results.counts(testbed) for testbed in results.testbeds}
    curves = {
        testbed: {row: {n: [seed.mean(row, n) for seed in seeds] for n in numbers[testbed]} for row in COUNTED}
        for testbed, seeds in results.testbeds.items()
    }
    every = sorted({n for own in numbers.values() for n in own})
    comparisons = [
        Comparison(
            f"{n} tasks: {OURS} − {rival}",
            {
                testbed: [seed.mean(OURS, n) - seed.mean(rival, n) for seed in seeds]
                for testbed, seeds in results.testbeds.items()
                if n in numbers[testbed]
            },
        )
        for n in (every[0], every[-1])
        for rival in RIVALS
    ]
    return Claim(
        "tasks",
        "The number of tasks",
        "Localize-and-Stitch stays ahead as more finetunes are merged.",
        f"Mean {KEPT}, over the tasks merged: the first of each testbed, in a fixed order.",
        {
            f"{n} tasks, {row}": {t: own[row][n] for t, own in curves.items() if n in numbers[t]}
            for n in every
            for row in COUNTED
        },
        comparisons,
        {"Merges against the number of tasks": draw_curves(curves, "merged tasks", KEPT)},
    )
