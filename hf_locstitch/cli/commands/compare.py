"""`compare`: several merges, and the best of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hf_locstitch.cli.flags import add_printing, add_push_options, add_task_code
from hf_locstitch.cli.parser import add_command, add_diagnostics
from hf_locstitch.cli.printing import announcing, put_plan, put_result
from hf_locstitch.cli.terminal import width_of


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        help="merge in several ways, score every merge, choose the best",
        description="Merge the same finetuned models by several methods and settings (`compare:` in a recipe), score "
        "every merge, and write out the scores, a figure and the best recipe. Masks of all densities come from one "
        "scan.",
        examples=[
            "hf-locstitch compare recipe.yaml --dry-run --out compared",
            "hf-locstitch compare recipe.yaml --out compared --push-to me/best",
        ],
        guide="guides/comparing.md",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="a recipe with `compare:`")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="write the report to this folder")
    parser.add_argument(
        "--push-to", metavar="ORG/NAME", help="push the best merge to this repo, or ORG/NAME@BRANCH, in one commit"
    )
    add_push_options(parser)
    add_task_code(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--max-memory", metavar="SIZE", help="memory limit of a merge, such as 1GB")
    output.add_argument(
        "--device", metavar="auto|cpu|cuda[:N]|...", help="where models run and values are solved for (default: auto)"
    )
    add_printing(output)
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch compare"""
    from hf_locstitch.comparison.compare import carry_out, check_possible, plan_comparison
    from hf_locstitch.plan.recipe_file import check_task_code, load_recipe
    from hf_locstitch.runtime.progress import Progress

    fields = load_recipe(args.recipe)
    if not args.allow_task_code:
        check_task_code(fields, str(args.recipe))
    target = {"push_to": args.push_to, "private": bool(args.private), "create_pr": bool(args.create_pr)}
    planned = plan_comparison({**fields, **target}, args.max_memory, args.device, where=str(args.recipe))
    if args.dry_run:
        check_possible(planned, args.out, Progress(False))
        put_plan(planned, args.json)
        return 0
    announce = announcing(planned.describe, args.quiet)
    report = carry_out(planned, args.out, Progress(False if args.quiet else None), announce)
    put_result(report, args.json, report.describe(width_of(sys.stderr)))
    return 0
