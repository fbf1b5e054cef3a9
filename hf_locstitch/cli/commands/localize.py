"""`localize`: a finetuned model to its mask and the values under it."""

from __future__ import annotations

import argparse
from typing import Any

from hf_locstitch.cli.flags import add_localizing, add_non_finite, add_recipe, add_target, add_work
from hf_locstitch.cli.parser import REF, add_command, add_diagnostics
from hf_locstitch.cli.requests import carry_out
from hf_locstitch.stitch.stitchers import MEAN


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "localize",
        help="reduce a finetuned model to its mask and the values under it",
        description="Make a localized checkpoint: the mask of one finetuned model and the values under it, a few "
        "percent of the model. `stitch` merges any number of them. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
        examples=[
            "hf-locstitch localize --base org/base --ft org/math --out math-localized",
            "hf-locstitch localize recipe.yaml --density 0.02 --push-to me/math-localized",
        ],
        guide="guides/localized-checkpoints.md",
    )
    add_recipe(parser)
    parser.add_argument(
        "--ft", nargs="+", metavar=REF, help="the finetuned model, or a PEFT adapter"
    )  # one; the recipe tells
    parser.add_argument(
        "--name", dest="names", nargs=1, metavar="NAME", help="a name for it (default: the last part of REF)"
    )
    add_target(parser)
    group = parser.add_argument_group("how to localize")
    add_localizing(group)
    group.add_argument(
        "--stitch",
        choices=[MEAN, "refit"],
        help="values under the mask: the finetuned ones (default), or solved for again: a small mask then holds more",
    )
    add_non_finite(group)
    add_work(parser.add_argument_group("output"), device=True)
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch localize"""
    from hf_locstitch.plan.planning import make_localize_plan

    return carry_out(args, make_localize_plan)
