"""`finetune`: a model to merge."""

from __future__ import annotations

import argparse
from typing import Any

from hf_locstitch.cli.flags import add_printing, add_recipe, add_target
from hf_locstitch.cli.next_steps import after_finetune, next_lines
from hf_locstitch.cli.parser import REF, add_command, add_diagnostics, number
from hf_locstitch.cli.printing import announcing, put_plan, put_result
from hf_locstitch.runtime.packages import WITH_DATA, need
from hf_locstitch.tasks.objectives import OBJECTIVES


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "finetune",
        help="train a finetuned model to merge, by transformers and PEFT",
        description="Finetune a base on labelled examples, or on answers, as a checkpoint or adapter that `merge` "
        f"takes at once. {REF}: a folder or org/name[/subfolder][@revision].",
        examples=[
            "hf-locstitch finetune --base FacebookAI/roberta-base --data sst2 --out sst2",
            "hf-locstitch finetune --base org/base --data x.jsonl --lora 16 --out lora",
        ],
        guide="guides/finetune.md",
    )
    add_recipe(parser)
    add_training(parser)
    add_target(parser)
    add_printing(parser.add_argument_group("output"))
    add_diagnostics(parser)


def add_training(parser: argparse.ArgumentParser) -> None:
    """To the parser of `finetune`."""
    parser.add_argument(
        "--data", metavar="DATA", help="a task of the paper such as sst2, alpaca, gsm8k, hotpotqa, a file or org/name"
    )
    parser.add_argument("--number", type=int, metavar="N", help="examples, or of each class (default: 64)")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES.names(),
        metavar="KIND",
        help=f"what is to be learned: {', '.join(OBJECTIVES.names())} (default: as the task or the base's architecture "
        "has it)",
    )
    group = parser.add_argument_group("how to train")
    group.add_argument("--epochs", type=int, metavar="N", help="default: 3; masked-lm and clip-zero-shot: 10")
    group.add_argument(
        "--lr", type=number, metavar="F", help="learning rate (default: 2e-5; clip-zero-shot: 1e-5; with --lora: 2e-4)"
    )
    group.add_argument(
        "--batch", type=int, metavar="N", help="examples in a step (default: 8; masked-lm: 4; clip-zero-shot: 128)"
    )
    group.add_argument(
        "--optimizer", choices=["sgd", "adamw_torch"], help="default: adamw_torch; masked-lm without --lora: sgd"
    )
    group.add_argument(
        "--freeze",
        nargs="*",
        metavar="GLOB",
        help="parameters that stay the base's; none without a value (default: none; masked-lm: all outside the "
        "transformer blocks; clip-zero-shot: all outside the vision tower)",
    )
    group.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter instead of the weights")
    group.add_argument("--seed", type=int, metavar="N", help="of new heads, the order and dropout (default: 0)")
    group.add_argument("--device", choices=["auto", "cpu"], help="where to train (default: auto)")


def run(args: argparse.Namespace) -> int:
    """hf-locstitch finetune"""
    need("finetune", *WITH_DATA, *(["peft"] if args.lora else []))
    from hf_locstitch.engine.preflight import check_output_given
    from hf_locstitch.plan.recipe_file import load_recipe
    from hf_locstitch.runtime.progress import Progress
    from hf_locstitch.training.finetune import carry_out, check_possible
    from hf_locstitch.training.planning import plan_finetune
    from hf_locstitch.training.request import FinetuneRequest, make_request

    flags = {key: value for key, value in vars(args).items() if value is not None}
    fields = load_recipe(args.recipe) if args.recipe is not None else {}
    fields |= {key: flags[key] for key in FinetuneRequest.model_fields if key in flags}
    where = str(args.recipe or "command")
    request = make_request(fields, where, number=args.number, objective=args.objective)
    if not args.dry_run:
        check_output_given(request.out, request.push_to)
    plan = plan_finetune(request)
    if args.dry_run:
        check_possible(plan)
        put_plan(plan, args.json)
        return 0
    announce = announcing(plan.describe, args.quiet)
    result = carry_out(plan, Progress(False if args.quiet else None), announce)
    following = [] if args.quiet else next_lines(after_finetune(plan, result))
    put_result(result, args.json, result.describe(), *following)
    return 0
