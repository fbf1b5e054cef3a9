"""`inspect`: what a merge is made of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_locstitch.cli.parser import REF, add_command, add_diagnostics
from hf_locstitch.cli.printing import put, put_json


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        help="show what a merge is made of: densities, overlaps, mask layout, anomalies",
        description="Show what a merge is made of, or what merging localized checkpoints would give: densities, "
        "overlaps, where the masks lie, norms, anomalies. Reads small files only, unless --inputs is given. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
        examples=[
            "hf-locstitch inspect merged --figures figures",
            "hf-locstitch inspect me/math-localized me/code-localized",
        ],
        guide="guides/checking.md",
    )
    parser.add_argument("refs", nargs="+", metavar=REF, help="the merge, or one or more localized checkpoints")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the figures into this folder")
    parser.add_argument(
        "--inputs", action="store_true", help="also sample the inputs (default: use what the merge recorded)"
    )
    parser.add_argument("--base", metavar=REF, help="the base, if it is not where the manifest says; implies --inputs")
    parser.add_argument(
        "--ft", nargs="+", metavar=REF, help="the finetuned models, in the order of the merge; implies --inputs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch inspect"""
    from hf_locstitch.inspection.inspect import inspect as look

    report = look(*args.refs, figures=args.figures, base=args.base, finetuned=args.ft, inputs=args.inputs)
    put_json(report.as_json()) if args.json else put(report.describe())
    return 0
