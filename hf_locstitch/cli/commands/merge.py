"""`merge`: finetuned models into their base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_locstitch.cli.flags import (
    add_layout,
    add_localizing,
    add_non_finite,
    add_recipe,
    add_scale,
    add_target,
    add_task_code,
    add_vocabulary,
    add_work,
)
from hf_locstitch.cli.parser import REF, add_command, add_diagnostics, number
from hf_locstitch.cli.printing import put
from hf_locstitch.cli.requests import carry_out, recipe_fields
from hf_locstitch.errors import OutputError
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.stitchers import MEAN, STITCHERS


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "merge",
        help="merge finetuned models into their base",
        description=f"Merge finetuned models into their base. {REF}: a folder or org/name[/subfolder][@revision].",
        examples=[
            "hf-locstitch merge --base org/base --ft org/math org/code --dry-run",
            "hf-locstitch merge --base org/base --ft org/math org/code --out merged",
            "hf-locstitch merge recipe.yaml --localizer joint --stitch refit --out merged",
            "hf-locstitch merge recipe.yaml --push-to me/merged --private",
        ],
        guide="guides/recipes.md",
    )
    add_recipe(parser)
    parser.add_argument("--ft", nargs="+", metavar=REF, help="the finetuned models, or PEFT adapters")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="names for them (default: the last part of each REF)"
    )
    add_target(parser)

    group = parser.add_argument_group("how to merge")
    group.add_argument(
        "--method",
        choices=METHODS.names(),
        metavar="NAME",
        help=f"{', '.join(METHODS.names())} (default: locstitch)",
    )
    add_localizing(group)
    group.add_argument(
        "--stitch",
        choices=[MEAN, *STITCHERS.names()],
        help="values under the masks: the mean of the finetuned values (default), or solved for from the task vectors "
        "alone, or with --data fitted to what the finetuned models compute on it",
    )
    add_scale(group)
    group.add_argument(
        "--weights", nargs="+", type=number, metavar="F", help="factor on the task vector of each --ft (default: 1)"
    )
    group.add_argument(
        "--rest-from", metavar="NAME", help="finetune to take all other tensors from (default: the base)"
    )
    group.add_argument("--files-from", metavar="NAME", help="finetune to take tokenizer and config from")
    add_vocabulary(group)
    add_non_finite(group)
    add_task_code(group)

    output = parser.add_argument_group("output")
    output.add_argument(
        "--convert",
        nargs="?",
        const=Path("-"),
        type=Path,
        metavar="FILE",
        help="write the recipe that RECIPE.yaml and the flags stand for to this file (default: print it) and stop",
    )
    add_layout(output)
    add_work(output, device=True)
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch merge"""
    if args.convert is not None:
        return _convert(args)
    from hf_locstitch.plan.planning import make_plan

    return carry_out(args, make_plan)


def _convert(args: argparse.Namespace) -> int:
    """Write the recipe that a file and flags stand for."""
    from hf_locstitch.plan.adapter_inputs import with_base
    from hf_locstitch.plan.recipe import make_recipe
    from hf_locstitch.plan.recipe_file import dump_recipe

    recipe = make_recipe(with_base(recipe_fields(args)), where=str(args.recipe or "command"))
    text = dump_recipe(recipe, whole=True)
    if str(args.convert) == "-":
        put(text.rstrip("\n"))
        return 0
    try:
        with args.convert.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"--convert cannot write {args.convert}: {error.strerror}. Name another file.") from error
    return 0
