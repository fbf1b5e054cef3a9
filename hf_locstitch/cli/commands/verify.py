"""`verify`: a merge read back."""

from __future__ import annotations

import argparse
from typing import Any

from hf_locstitch.cli.parser import REF, add_command, add_diagnostics, count_or
from hf_locstitch.cli.printing import put_json, tell


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        help="check a merge or a localized checkpoint: files, masks, values",
        description="Read a merge or a localized checkpoint back: its files against the manifest, its masks against "
        "the densities, its values against the inputs. Writes nothing. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
        examples=[
            "hf-locstitch verify merged",
            "hf-locstitch verify me/merged --tensors all",
        ],
        guide="guides/checking.md",
    )
    parser.add_argument("ref", metavar=REF, help="the merge or localized checkpoint")
    parser.add_argument("--base", metavar=REF, help="the base, if it is not where the manifest says")
    parser.add_argument(
        "--ft",
        nargs="+",
        metavar=REF,
        help="the finetuned models, or of a stitch its localized checkpoints, in its order",
    )
    parser.add_argument(
        "--tensors",
        type=count_or("all"),
        default=8,
        metavar="all|N",
        help="how many tensors to recompute (default: 8)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--quiet", action="store_true", help="print only failed checks, and show no progress bars")
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch verify"""
    from hf_locstitch.inspection.verification.verify import verify as check

    show = False if args.quiet else None
    report = check(args.ref, base=args.base, finetuned=args.ft, tensors=args.tensors, show_progress=show)
    if args.json:
        put_json(report.as_json())
    elif text := report.describe(quiet=args.quiet):
        tell(text)
    return 0 if report.ok else 1
