"""`export`: an adapter of PEFT's from a merge or a localized checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from hf_locstitch.cli.flags import add_printing, add_target
from hf_locstitch.cli.parser import REF, add_command, add_diagnostics
from hf_locstitch.cli.printing import announcing, put_plan, put_result
from hf_locstitch.exports.forms import FORMS
from hf_locstitch.runtime.packages import MODELS, need


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        help="turn a localized checkpoint or a merge into a PEFT adapter",
        description="Turn a localized checkpoint, or a merge with masks, into an adapter over its base, for PEFT. "
        f"{REF}: a folder or org/name[/subfolder][@revision].",
        examples=["hf-locstitch export ./merged --as peft --out merged-adapter"],
        guide="guides/export.md",
    )
    parser.add_argument("ref", metavar=REF, help="the localized checkpoint or merge")
    parser.add_argument(
        "--as", dest="form", choices=FORMS.names(), default="peft", help="peft: an adapter of PEFT (default)"
    )
    parser.add_argument("--base", metavar=REF, help="the base, if it is not where the manifest says")
    add_target(parser)
    add_printing(parser)
    add_diagnostics(parser)


def run(args: argparse.Namespace) -> int:
    """hf-locstitch export"""
    need("export", "peft", *MODELS)
    from hf_locstitch.engine.delivery import Delivery, make_target
    from hf_locstitch.engine.preflight import check_output_given
    from hf_locstitch.exports.export import carry_out, check_possible, plan_export
    from hf_locstitch.runtime.progress import Progress

    if not args.dry_run:
        check_output_given(args.out, args.push_to)
    plan = plan_export(args.ref, form=args.form, base=args.base)
    delivery = Delivery("export", args.out, make_target(args.push_to, bool(args.create_pr)), bool(args.private))
    if args.dry_run:
        if args.out or args.push_to:
            check_possible(plan, delivery)
        put_plan(plan, args.json)
        return 0
    announce = announcing(plan.describe, args.quiet)
    result = carry_out(plan, delivery, Progress(False if args.quiet else None), announce)
    put_result(result, args.json, result.describe())
    return 0
