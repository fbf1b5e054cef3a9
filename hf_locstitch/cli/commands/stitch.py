"""`stitch`: localized checkpoints into their base, or a merge again with other parts."""

from __future__ import annotations

import argparse
from typing import Any

from hf_locstitch.cli.flags import add_layout, add_non_finite, add_recipe, add_scale, add_target, add_work
from hf_locstitch.cli.parser import REF, add_command, add_diagnostics
from hf_locstitch.cli.requests import carry_out


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "stitch",
        help="merge localized checkpoints into their base",
        description="Merge localized checkpoints into the base that they were localized against: the same weights as "
        f"one merge of the finetuned models. Or take a merge apart, and stitch it with other finetunes or fewer. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
        examples=[
            "hf-locstitch stitch --base org/base --localized me/math me/code --out merged",
            "hf-locstitch stitch --from me/merged --add me/law --remove code --out new",
        ],
        guide="guides/localized-checkpoints.md",
    )
    add_recipe(parser)
    parser.add_argument("--localized", nargs="+", metavar=REF, help="the localized checkpoints")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names for them (default: those they have)")
    merge = parser.add_argument_group("a merge to stitch again")
    merge.add_argument("--from", dest="from_", metavar=REF, help="a merge by hf-locstitch: its masks are used again")
    merge.add_argument("--add", nargs="+", metavar=REF, help="localized checkpoints to add to it")
    merge.add_argument("--remove", nargs="+", metavar="NAME", help="names of its finetunes to leave out")
    merge.add_argument(
        "--ft",
        nargs="+",
        metavar=REF,
        help="its finetunes that stay, in its order, if they are not where it says; so --base, too",
    )
    add_target(parser)
    group = parser.add_argument_group("how to stitch")
    add_scale(group)
    add_non_finite(group)
    output = parser.add_argument_group("output")
    add_layout(output)
    add_work(output, device=False)
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch stitch"""
    from hf_locstitch.plan.planning import make_plan

    return carry_out(args, make_plan)
