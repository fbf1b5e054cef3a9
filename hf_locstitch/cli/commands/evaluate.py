"""`evaluate`: models judged side by side."""

from __future__ import annotations

import argparse
import sys
from inspect import signature
from pathlib import Path
from typing import Any

from hf_locstitch.cli.next_steps import after_evaluation, next_lines
from hf_locstitch.cli.parser import REF, add_command, add_diagnostics, count_or
from hf_locstitch.cli.printing import put, put_json, speaks, tell
from hf_locstitch.cli.terminal import width_of
from hf_locstitch.runtime.packages import WITH_DATA, need
from hf_locstitch.tasks.metrics import METRICS

DTYPES = ["auto", "float32", "bfloat16", "float16"]


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        help="score models side by side, with lm-eval and on labelled sets",
        description="Score models side by side: language models with lm-eval, models of any kind on labelled sets. "
        f"{REF}: a folder or org/name[/subfolder][@revision]. "
        "Scores already measured on the same content are reused. Several GPUs share the examples under "
        "`accelerate launch -m hf_locstitch evaluate ...`.",
        examples=[
            "hf-locstitch evaluate merged --suite quick --parents",
            "hf-locstitch evaluate me/merged org/other --tasks gsm8k:8 --limit 200",
            "hf-locstitch evaluate merged --data test.jsonl --average --push",
        ],
        guide="guides/evaluation.md",
    )
    parser.add_argument("refs", nargs="+", metavar=REF, help="the models; the first is the one being judged")
    _add_what(parser.add_argument_group("what to evaluate"))
    _add_compared(parser.add_argument_group("compare with"))
    _add_how(parser.add_argument_group("how to evaluate"))
    _add_lm_eval(parser.add_argument_group("how lm-eval evaluates"))
    _add_output(parser.add_argument_group("output"))
    add_diagnostics(parser)


def _add_what(group: Any) -> None:
    group.add_argument(
        "--suite",
        choices=["paper", "quick"],
        help="paper: mmlu:5 arc_easy:0 arc_challenge:25 truthfulqa_mc1:0 truthfulqa_mc2:0; quick: 100 examples each of "
        "arc_easy:0 arc_challenge:0 truthfulqa_mc1:0",
    )
    group.add_argument("--tasks", nargs="+", default=[], metavar="NAME[:SHOTS]", help="lm-eval tasks or groups")
    group.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with more lm-eval task files")
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="[NAME=]DATA",
        help="labelled sets: a file, a surrogate, org/name, or a YAML file of sets; one with the NAME of a finetune is "
        "judged by that finetune's head",
    )
    group.add_argument(
        "--objective",
        metavar="KIND",
        help="how the sets are judged, such as causal-lm, or a YAML mapping with its settings: '{kind: masked-lm, "
        "label_words: [bad, good]}' (default: by the architecture)",
    )
    group.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help=f"of the sets: {', '.join(METRICS.names())}"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only N examples of each task and set")


def _add_compared(group: Any) -> None:
    group.add_argument(
        "--parents", action="store_true", help="also evaluate the base and the finetunes of the first REF, a merge"
    )
    group.add_argument("--average", action="store_true", help="also evaluate their plain average, made on the fly")
    group.add_argument(
        "--base", metavar=REF, help="the base to compare with (default: the one in the merge's manifest)"
    )
    group.add_argument(
        "--ft",
        nargs="+",
        metavar=REF,
        help="the finetuned models to compare with (default: those in the merge's manifest)",
    )


def _add_how(group: Any) -> None:
    group.add_argument(
        "--batch-size",
        type=count_or("auto"),
        default="auto",
        metavar="auto|N",
        help="auto: the largest that fits (default)",
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the models (default: their own)")
    group.add_argument("--no-cache", dest="cache", action="store_false", help="ignore cached scores")


def _add_lm_eval(group: Any) -> None:
    group.add_argument("--chat-template", action="store_true", help="apply the model's chat template to the prompts")
    group.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="under a chat template, make each example of the prompt a turn (default), or not",
    )
    group.add_argument("--system-instruction", metavar="TEXT", help="text before the prompts")
    group.add_argument(
        "--gen-kwargs", nargs="+", metavar="KEY=VALUE", help="of generation, over the tasks' own: temperature=0.7"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="most tokens of a prompt and its answer")
    group.add_argument(
        "--seed", nargs="+", type=int, metavar="N", help="one, or four: of Python, NumPy, torch, examples in prompts"
    )
    group.add_argument("--backend", choices=["hf", "vllm"], help="hf: transformers (default); vllm, if installed")
    group.add_argument(
        "--model-args", nargs="+", metavar="KEY=VALUE", help="more arguments of lm-eval's class for the backend"
    )
    group.add_argument(
        "--log-samples", type=Path, metavar="DIR", help="write every prompt and answer there; ignores cached scores"
    )


def _add_output(group: Any) -> None:
    group.add_argument(
        "--push",
        action="store_true",
        help="write the scores into the model card of the first REF: a folder, or a repo in one commit",
    )
    group.add_argument("--track", choices=["trackio", "wandb"], help="also log the scores there")
    group.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    group.add_argument("--quiet", action="store_true", help="show no progress bars")


def run(args: argparse.Namespace) -> int:
    """hf-locstitch evaluate"""
    need("evaluate", *WITH_DATA)
    from hf_locstitch.evaluation.evaluate import evaluate as score
    from hf_locstitch.tasks.lm_eval_options import LmEvalOptions

    flags = vars(args)
    names = [name for name in signature(score).parameters if name in flags and name != "refs"]
    options = {name: flags[name] for name in names}
    if options["batch_size"] == "auto":
        options["batch_size"] = None
    own = {name: flags[name] for name in LmEvalOptions.model_fields if flags[name] is not None}
    report = score(args.refs, **options, lm_eval=own, finetuned=args.ft, show_progress=False if args.quiet else None)
    if not speaks():
        return 0
    if args.json:
        put_json(report.as_json())
        return 0
    put(report.describe(width_of(sys.stdout)))
    for step in [] if args.quiet else next_lines(after_evaluation(args.typed, args.refs[0])):
        tell(step)
    return 0
