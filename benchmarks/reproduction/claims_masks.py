"""Claims about masks: where they lie, what they hold, what they weigh, and that they are parts."""

from __future__ import annotations

from statistics import mean

from reproduction.claim import Claim
from reproduction.claims_merges import DENSITY, KEPT, percent
from reproduction.figures import draw_curves, draw_dots
from reproduction.masks import GROUPS
from reproduction.results import Results, SeedResult
from reproduction.rows import WITH_DATA, Grid
from reproduction.verdict import Comparison

LITTLE = 0.1  # a Jaccard index that counts as little
WHOLE = 0.95  # share of a finetune's accuracy that counts as all of it


def _sparse(grid: Grid) -> list[str]:
    at = f"{100 * grid.sparse:g}%"
    return [f"{name} {at}" for name in (*WITH_DATA, "magnitude")]


def overlap(results: Results, grid: Grid) -> Claim:
    """Claim 4."""
    rows = [*_sparse(grid), "magnitude 5%", "magnitude 10%"]
    chances = {"measured": "jaccard", "chance, anywhere": "anywhere", "chance, within tensors": "within tensors"}
    panels = {
        testbed: {
            row: {name: [seed.jaccard(row, key) for seed in seeds] for name, key in chances.items()} for row in rows
        }
        for testbed, seeds in results.testbeds.items()
    }
    return Claim(
        "overlap",
        "Masks of different tasks overlap little",
        "The localized regions of different tasks have little in common, so that stitching seldom averages.",
        "Mean Jaccard index over every two masks. By chance: with as many ones anywhere, or with as many in each "
        "tensor as they have.",
        {
            f"{row}, {name}": results.each(lambda seed, r=row, k=key: seed.jaccard(r, k))
            for row in rows
            for name, key in chances.items()
        },
        [Comparison(f"{LITTLE:g} − {row}", results.each(lambda s, r=row: LITTLE - s.jaccard(r))) for row in rows],
        {"Overlap of the masks": draw_dots(panels, "Jaccard index", LITTLE)},
        notes=[
            f"That {LITTLE:g} counts as little is this page's choice. Overlap beyond the second kind of chance is "
            "about single weights, not about tensors that change most in every finetune."
        ],
    )


def location(results: Results, grid: Grid) -> Claim:
    """Claim 5."""
    rows = [*_sparse(grid), "magnitude 10%"]
    panels = {
        testbed: {
            name: {
                row: [seed.density_ratio(row, "groups")[name] for seed in seeds]
                for row in rows
                if name in seeds[0].content["layout"][row]["groups"]
            }
            for name in GROUPS
        }
        for testbed, seeds in results.testbeds.items()
    }
    layers = {
        testbed: {
            row: {
                float(name.removeprefix("layer ")): [seed.density_ratio(row, "layers")[name] for seed in seeds]
                for name in seeds[0].content["layout"][row]["layers"]
            }
            for row in rows
        }
        for testbed, seeds in results.testbeds.items()
    }
    return Claim(
        "location",
        "Where masks lie",
        "Asked here: do norms and attention hold more of the masks than their share of the parameters, and MLPs less?",
        "Share of a mask's ones in a group of tensors, over the group's share of the parameters: 1 is what chance "
        "gives. Biases are those of linear layers; the decoders have none.",
        {
            f"{name}, {row}": {testbed: own[name][row] for testbed, own in panels.items() if row in own[name]}
            for name in GROUPS
            for row in rows
        }
        | {
            f"layer {at:g}, {row}": {testbed: own[row][at] for testbed, own in layers.items() if at in own[row]}
            for row in (rows[1], rows[-1])
            for at in sorted({at for own in layers.values() for at in own[row]})
        },
        [
            Comparison(
                f"{name}, {row}: {'1 − ratio' if sign < 0 else 'ratio − 1'}",
                results.each(lambda s, n=name, r=row, sign=sign: sign * (s.density_ratio(r, "groups")[n] - 1)),
            )
            for name, sign in (("norms", 1), ("attention", 1), ("MLP", -1))
            for row in rows
        ],
        {
            "Masks by group of tensors": draw_dots(panels, "ratio to the share of parameters", 1.0),
            "Masks by layer": draw_curves(layers, "layer", "ratio to the share of parameters"),
        },
        digits=2,
    )


def skills(results: Results, grid: Grid) -> Claim:
    """Claim 7."""

    def same(seed: SeedResult) -> list[bool]:
        return [same for one in seed.content["skills"].values() for same in one["same"].values()]

    def shares(seed: SeedResult, accuracies: dict[str, dict[str, float]], own: bool) -> float:
        """Mean share at the task that was removed, or at the others."""
        experts = seed.content["experts"]["test"]
        return mean(
            accuracy[task] / experts[task]
            for removed, accuracy in accuracies.items()
            for task in seed.tasks
            if (task == removed) is own
        )

    def with_all(seed: SeedResult) -> dict[str, dict[str, float]]:
        found = seed.content["test"][f"{seed.content['main']} magnitude 10%"]
        return dict.fromkeys(seed.content["skills"], found)

    def without(seed: SeedResult) -> dict[str, dict[str, float]]:
        return {task: one["test"] for task, one in seed.content["skills"].items()}

    def base(seed: SeedResult) -> dict[str, dict[str, float]]:
        return dict.fromkeys(seed.content["skills"], seed.content["base"]["test"])

    rows = {"merge of all": with_all, "after removing it": without, "base": base}
    kinds = {"the task": True, "the others": False}
    panels = {
        testbed: {
            row: {kind: [shares(seed, of(seed), own) for seed in seeds] for kind, own in kinds.items()}
            for row, of in rows.items()
        }
        for testbed, seeds in results.testbeds.items()
    }
    checks = {testbed: [check for seed in seeds for check in same(seed)] for testbed, seeds in results.testbeds.items()}
    made = ", ".join(f"{testbed} {sum(own)} of {len(own)}" for testbed, own in checks.items())
    return Claim(
        "skills",
        "Adding and removing a skill",
        "Skills can be added to a merge and taken out again by their masks alone: nothing has to be merged anew.",
        f"Mean {KEPT}, of merges at 10 %, at a task that is removed with `stitch --remove` and at the others. Adding "
        "it again with `stitch --add` gives the merge of all.",
        {
            f"{row}, {kind}": {testbed: own[row][kind] for testbed, own in panels.items()}
            for kind in kinds
            for row in rows
        },
        [
            Comparison("same bytes as one merge − 1/2", results.each(lambda seed: mean(same(seed)) - 0.5)),
            Comparison(
                "the task: merge of all − after removing it",
                results.each(lambda s: shares(s, with_all(s), True) - shares(s, without(s), True)),
            ),
        ],
        {"A skill removed": draw_dots(panels, KEPT)},
        notes=[f"The same bytes as one merge of the members, removed and added: {made}."],
    )


def storage(results: Results, grid: Grid) -> Claim:
    """Claim 8."""
    rows = percent(grid.densities, "magnitude {}")
    curves = {
        testbed: {"mask and values": {x: [100 * seed.size(row) for seed in seeds] for x, row in rows.items()}}
        for testbed, seeds in results.testbeds.items()
    }
    small = {x: row for x, row in rows.items() if x <= 10}
    first = {
        t: next(iter(seeds[0].content["bytes"]["magnitude 10%"].values())) for t, seeds in results.testbeds.items()
    }
    sizes = ", ".join(f"{testbed} {one['finetuned'] / 1e6:.2f} MB" for testbed, one in first.items())
    return Claim(
        "storage",
        "Storage",
        "A skill is stored in about as small a share of a finetune as its mask keeps of the parameters; at 1 % this is "
        "a compression by nearly a hundred.",
        f"Size of a localized checkpoint's mask and values in per cent of the finetune's weights ({sizes}, float32).",
        {row: results.each(lambda seed, r=row: 100 * seed.size(r)) for row in rows.values()},
        [
            Comparison(f"{2 * x:g} % − {row}", results.each(lambda s, x=x, r=row: 2 * x - 100 * s.size(r)))
            for x, row in small.items()
        ],
        {"Size of localized checkpoints": draw_curves(curves, DENSITY, "% of the finetune's size")},
        digits=2,
        notes=[
            "Masks range over the blocks only: the more of a model is embeddings, the smaller is what is stored. "
            "Files have headers of some kB, which count in models of a MB or less."
        ],
    )


def grafts(results: Results, grid: Grid) -> Claim:
    """Claim 10."""
    rows = percent(grid.densities, "magnitude {}")
    learned = _sparse(grid)[:-1]
    curves = {
        testbed: {
            "magnitude": {x: [seed.alone(row) for seed in seeds] for x, row in rows.items()},
            **{row: {100 * grid.sparse: [seed.alone(row) for seed in seeds]} for row in learned},
        }
        for testbed, seeds in results.testbeds.items()
    }
    every = ["base", *rows.values(), *learned]
    return Claim(
        "grafts",
        "What one mask keeps of its finetune",
        "A mask of about 1 % of the parameters holds nearly all of what its finetune has learned.",
        f"Mean {KEPT}, of the base with one mask and its values.",
        {r: results.each(lambda s, r=r: s.mean("base") if r == "base" else s.alone(r)) for r in every},
        [
            Comparison(f"{row} − {WHOLE:g}", results.each(lambda seed, r=row: seed.alone(r) - WHOLE))
            for row in [*learned, *rows.values()]
        ],
        {"Masks alone": draw_curves(curves, DENSITY, KEPT)},
        notes=[f"That {WHOLE:g} counts as nearly all is this page's choice."],
    )
